"""Pyramid-Flow's own code, from a checkout, with checkpoints of a few thousand random weights for both generations."""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import io
import os
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from families.family import fill
from families.text import clip_text, clip_tokenizer, t5_text, t5_tokenizer

CHECKOUT = "PYRAMID_FLOW_REPO"
"""The environment variable that names a checkout of github.com/jy0205/Pyramid-Flow. Its code needs einops too."""

GENERATIONS = ("pyramid_flux", "pyramid_mmdit")
_VARIANT = "diffusion_transformer_384p"
_WIDTH = 32
_CHANNELS = 4
_USED_IN_TRAINING = (
    *("torchvision", "torchvision.transforms", "torchvision.models", "timm", "timm.models", "timm.models.layers"),
    *("timm.models.hub", "IPython", "tensorboardX", "requests"),
)


def load_model(model_name: str, folder: Path, *, seed: int = 0, **options: Any) -> Any:
    """A ``PyramidDiTForVideoGeneration`` of the generation ``model_name``; its checkpoint is made in ``folder``."""
    pyramid_dit = _import_code()
    checkpoint = folder / f"{model_name}-{seed}"
    if not checkpoint.exists():
        _write_checkpoint(model_name, checkpoint, seed)
    with contextlib.redirect_stdout(io.StringIO()):
        return pyramid_dit.PyramidDiTForVideoGeneration(
            str(checkpoint),
            "fp32",
            model_name=model_name,
            model_variant=_VARIANT,
            scheduler_gamma=1 / 3 - 1e-6,  # 1/3 makes the covariance of the block noise singular
            **options,
        )


def _import_code() -> Any:
    """The package of the checkout. What only training needs is stood in for, where it is not installed."""
    checkout = os.environ[CHECKOUT]
    if checkout not in sys.path:
        sys.path.append(checkout)
    import diffusers.models  # noqa: F401  before the stand-ins, for it looks at what is installed
    import transformers  # noqa: F401

    with _stand_ins():
        return importlib.import_module("pyramid_dit")


class _StandIn(types.ModuleType):
    __path__: list[str] = []  # noqa: RUF012  a module's own

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _STAND_INS.get(name) or type(name, (), {})


def _compose(steps: list[Callable[[Any], Any]]) -> Callable[[Any], Any]:
    return lambda image: functools.reduce(lambda value, step: step(value), steps, image)


def _normalize(mean: Sequence[float], std: Sequence[float]) -> Callable[[torch.Tensor], torch.Tensor]:
    middle, spread = (torch.tensor(values).reshape(-1, 1, 1) for values in (mean, std))
    return lambda image: (image - middle) / spread


def _to_tensor(image: Any) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).to(torch.float32) / 255


_STAND_INS: dict[str, Any] = {
    "trunc_normal_": nn.init.trunc_normal_,
    "Compose": _compose,
    "Normalize": _normalize,
    "ToTensor": lambda: _to_tensor,
}
"""What generating uses of them all the same."""


@contextmanager
def _stand_ins() -> Iterator[None]:
    missing = [name for name in _USED_IN_TRAINING if importlib.util.find_spec(name.partition(".")[0]) is None]
    for name in missing:
        module = sys.modules[name] = _StandIn(name)
        parent, _, child = name.rpartition(".")
        setattr(sys.modules.get(parent, module), child, module)
    try:
        yield
    finally:
        for name in missing:
            del sys.modules[name]


def _write_checkpoint(model_name: str, folder: Path, seed: int) -> None:
    torch.manual_seed(seed)
    with torch.no_grad(), contextlib.redirect_stdout(io.StringIO()):
        fill(_vae()).save_pretrained(folder / "causal_video_vae")
        fill(_dit(model_name)).save_pretrained(folder / _VARIANT)
        for place, (encoder, tokenizer) in enumerate(_text_encoders(model_name)):
            suffix = f"_{place + 1}" if place else ""
            encoder.save_pretrained(folder / f"text_encoder{suffix}")
            tokenizer.save_pretrained(folder / f"tokenizer{suffix}")


def _vae() -> Any:
    blocks = (8, 8, 8, 8)
    sizes: dict[str, Any] = {
        "encoder_out_channels": _CHANNELS,
        "encoder_layers_per_block": (1, 1, 1, 1),
        "encoder_block_out_channels": blocks,
        "encoder_norm_num_groups": 4,
        "decoder_in_channels": _CHANNELS,
        "decoder_layers_per_block": (1, 1, 1, 1),
        "decoder_block_out_channels": blocks,
        "decoder_norm_num_groups": 4,
    }
    return importlib.import_module("video_vae.modeling_causal_vae").CausalVideoVAE(**sizes)


def _dit(model_name: str) -> Any:
    if model_name == "pyramid_flux":
        return importlib.import_module("pyramid_dit.flux_modules").PyramidFluxTransformer(
            in_channels=4 * _CHANNELS,
            num_layers=2,
            num_single_layers=2,
            attention_head_dim=64,
            num_attention_heads=1,
            joint_attention_dim=_WIDTH,
            pooled_projection_dim=_WIDTH,
        )
    return importlib.import_module("pyramid_dit.mmdit_modules").PyramidDiffusionMMDiT(
        sample_size=16,
        in_channels=_CHANNELS,
        num_layers=3,
        attention_head_dim=32,
        num_attention_heads=2,
        caption_projection_dim=64,
        pooled_projection_dim=2 * _WIDTH,
        pos_embed_max_size=32,
        max_num_frames=40,
        pos_embed_type="sincos",
        joint_attention_dim=_WIDTH,
        use_flash_attn=False,
    )


def _text_encoders(model_name: str) -> list[tuple[Any, Any]]:
    t5 = (t5_text(_WIDTH), t5_tokenizer())
    if model_name == "pyramid_flux":
        return [(clip_text(_WIDTH), clip_tokenizer()), t5]
    return [*((clip_text(_WIDTH, projection=_WIDTH), clip_tokenizer()) for _ in range(2)), t5]
