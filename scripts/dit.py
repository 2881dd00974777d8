"""A pipeline around a transformer of Flux's structure with 12 blocks and random weights: nothing is downloaded."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def build(width: int = 512) -> Any:
    """Return a ``FluxPipeline`` in float32: 4 double and 8 single blocks of ``width``, small encoders and VAE."""
    import sys

    import torch

    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    import diffusers

    from families.image import flux_parts

    torch.manual_seed(0)
    parts = flux_parts()
    heads = width // 64
    parts["transformer"] = diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=parts["transformer"].config.in_channels,
        num_layers=4,
        num_single_layers=8,
        attention_head_dim=64,
        num_attention_heads=heads,
        joint_attention_dim=parts["transformer"].config.joint_attention_dim,
        pooled_projection_dim=parts["transformer"].config.pooled_projection_dim,
        axes_dims_rope=(16, 24, 24),
        guidance_embeds=parts["transformer"].config.guidance_embeds,
    ).eval()
    return diffusers.FluxPipeline(**parts)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--width", type=int, default=512)
    options = parser.parse_args()
    build(options.width).save_pretrained(options.folder)
