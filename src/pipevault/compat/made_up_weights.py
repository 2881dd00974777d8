"""Touch points with diffusers and transformers: models built of their configuration alone, as if weights were read."""

from __future__ import annotations

import importlib
import math
from collections.abc import Mapping
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import nn


def made_up_parts(loader: Any, location: str, dtype: torch.dtype) -> tuple[Any, dict[str, nn.Module]]:
    """Return the class of the pipeline at ``location``, a folder or a repository id, for a ``loader`` of diffusers; and
    its models by name, with the dtypes, ties and layouts that their weights would give them.

    The values are drawn from a fixed seed. Raises what a part raises whose configuration is missing, and ``TypeError``
    for one that has none.
    """
    import diffusers
    from torch import nn

    parts = {}
    config = loader.load_config(location)
    if loader is diffusers.DiffusionPipeline and isinstance(config["_class_name"], str):
        # It takes no optional parts that are given, as those of Wan: only their own class does.
        loader = getattr(diffusers, config["_class_name"], loader)
    for name, entry in config.items():
        if isinstance(entry, (list, tuple)) and len(entry) == 2 and all(isinstance(word, str) for word in entry):
            cls = _class_of(*entry)  # what it does not know is opened by diffusers, which refuses foreign code
            if isinstance(cls, type) and issubclass(cls, nn.Module):
                parts[name] = _made_up(cls, location, name, dtype)
    return loader, parts


def _class_of(library: str, name: str) -> Any:
    from diffusers import pipelines

    known = library in ("diffusers", "transformers")
    return getattr(importlib.import_module(library) if known else getattr(pipelines, library, None), name, None)


def _made_up(cls: Any, location: str, name: str, dtype: torch.dtype) -> nn.Module:
    import torch

    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # as from_pretrained does: buffers are computed in it
    try:
        with _empty_parameters():
            if hasattr(cls, "config_class") and cls.config_class is not None:
                config = cls.config_class.from_pretrained(location, subfolder=name)
                module = cls._from_config(config, dtype=dtype)
            elif hasattr(cls, "load_config"):
                module = cls.from_config(cls.load_config(location, subfolder=name))
            else:
                raise TypeError(f"{name} is a {cls.__name__}, which has no configuration to build it from")
    finally:
        torch.set_default_dtype(before)
    _fill(module, dtype)
    if hasattr(module, "tie_weights"):
        module.tie_weights()
    made: nn.Module = module.eval()
    return made


def _empty_parameters() -> Any:
    """Without accelerate models are initialised, which takes minutes for large ones."""
    try:
        from accelerate import init_empty_weights
    except ImportError:
        return nullcontext()
    return init_empty_weights(include_buffers=False)


def _fill(module: Any, dtype: torch.dtype) -> None:
    import torch
    from torch import nn

    generator = torch.Generator().manual_seed(0)
    kept = _kept_in_float32(module, dtype)

    def dtype_of(name: str, tensor: torch.Tensor) -> torch.dtype:
        if not tensor.is_floating_point():
            return tensor.dtype
        return torch.float32 if kept.intersection(name.split(".")) else dtype

    stored: Mapping[str, Any] = module.state_dict()
    for path, child in module.named_modules():
        for name, old in child._parameters.items():
            if old is None:
                continue
            values = torch.empty(old.shape, dtype=dtype_of(f"{path}.{name}", old))
            if values.dim() > 1:  # what goes through keeps its size
                bound = math.sqrt(3 * values.shape[0] / max(values.numel(), 1))
                values.uniform_(-bound, bound, generator=generator)
            else:
                values.uniform_(-0.03, 0.03, generator=generator).add_(1.0 if name == "weight" else 0.0)
            child._parameters[name] = nn.Parameter(values, requires_grad=old.requires_grad)
        for name, buffer in child._buffers.items():
            full_name = f"{path}.{name}".lstrip(".")
            if buffer is not None and full_name in stored:
                child._buffers[name] = buffer.to(dtype_of(full_name, buffer))


def _kept_in_float32(module: Any, dtype: torch.dtype) -> set[str]:
    """The names of modules whose weights from_pretrained leaves in float32; of transformers some in float16 alone."""
    import torch

    of_transformers = hasattr(module, "_from_config")
    names = set(getattr(module, "_keep_in_fp32_modules", None) or ())
    if of_transformers and dtype != torch.float16:
        names = set()
    return names | set(getattr(module, "_keep_in_fp32_modules_strict", None) or ())
