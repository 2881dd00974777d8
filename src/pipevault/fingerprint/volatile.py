"""Attributes that decide no graph: its origin, and what calls, training tools and idle adapters leave on it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from pipevault.compat import diffusers, peft, transformers
from pipevault.fingerprint.classes import class_identity
from pipevault.fingerprint.names import is_released

SKIPPED_PREFIXES = ("_pipevault", "_deployable_module")
_MODULE_INTERNALS = frozenset(nn.Module().__dict__) - {"training"}
_VOLATILE_NAMES = frozenset(
    {
        # where a model came from, and what wrote it
        *("_name_or_path", "name_or_path", "base_model_name_or_path", "_commit_hash", "revision", "_diffusers_version"),
        *("transformers_version", "peft_version", "_use_default_values", "_class_name", "architectures"),
        *("dtype", "torch_dtype"),
        # where a model is, and how it was loaded
        *("device", "hf_device_map", "_is_hf_initialized", "warnings_issued", "_weight_conversions"),
        transformers.CONFIG_HASH_ATTRIBUTE,
        # what a call leaves behind
        *(transformers.CAPTURE_MARK, diffusers.REGISTRY_CACHE_ATTRIBUTE, "_use_kernels"),
        # what loading and fusing LoRA leaves behind; the layers themselves show as modules
        *("_hf_peft_config_loaded", "_safe_fusing"),
        # handles of hooks; the hooks themselves are read from the modules that they are on
        *("_require_grads_hook", "_require_grads_hooks"),
    }
)


class _SkippedNames(dict[str, bool]):
    """The names of attributes that are left out; remembers its answers, as the same names come again."""

    def __missing__(self, name: str) -> bool:
        skipped = name in _MODULE_INTERNALS or name in _VOLATILE_NAMES or name.startswith(SKIPPED_PREFIXES)
        self[name] = skipped
        return skipped


SKIPPED_NAMES = _SkippedNames()
BOOKKEEPING_NAMES = diffusers.CALL_COUNTERS | {"peft_config", "gradient_checkpointing", "_gradient_checkpointing_func"}


def is_bookkeeping(name: str, value: Any, values: Mapping[str, Any], cls: type) -> bool:
    """Return True if ``name``, of :data:`BOOKKEEPING_NAMES`, can change no inference of a module of ``cls``."""
    released = is_released(cls.__module__)
    if name in diffusers.CALL_COUNTERS:
        return released and cls.__module__.startswith("diffusers.")
    if name == "peft_config":
        return not value or (released and not any(base.__module__.startswith("peft.") for base in cls.__mro__))
    if name == "_gradient_checkpointing_func" and not values.get("gradient_checkpointing"):
        return True
    return released and not values.get("training", False)


def is_training_hook(hook: Any) -> bool:
    """Return True for the hook that marks embeddings as needing gradients; it outlives gradient checkpointing."""
    name, module = getattr(hook, "__qualname__", ""), getattr(hook, "__module__", None) or ""
    return name.endswith(".make_inputs_require_grads") and module.startswith(("transformers.", "diffusers.", "peft."))


def computing_module(module: nn.Module) -> nn.Module:
    """Return ``module``, or the base layer of a peft layer that does nothing else than call it."""
    # A scripted module's table has no ``get``.
    while "base_layer" in module._modules and (base := module._modules["base_layer"]) is not None and _is_idle(module):
        module = base
    return module


def named_computing_modules(module: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Yield every module under each of its names, as if idle peft layers were their base layers."""
    module = computing_module(module)
    yield path, module
    for name, child in module._modules.items():
        if child is not None:
            yield from named_computing_modules(child, f"{path}.{name}" if path else name)


def _is_idle(layer: nn.Module) -> bool:
    own = layer.__dict__
    is_changed = "forward" in own or own["_forward_hooks"] or own["_forward_pre_hooks"]
    if is_changed or not peft.is_idle_layer(layer) or not is_released(type(layer).__module__):
        return False
    return " code:" not in class_identity(type(layer))
