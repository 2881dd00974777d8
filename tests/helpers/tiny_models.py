"""Small modules and pipeline parts built from configurations: no download, no compilation."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel


class Net(nn.Module):
    """A class outside any released package."""

    def __init__(self, *, scale: float = 1.0) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(4, 4), nn.SiLU(), nn.Linear(4, 4, bias=False))
        self.scale = scale
        self.register_buffer("steps", torch.arange(3.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.inner(x) * self.scale
        return result


def tiny_unet(*, seed: int = 0, **options: Any) -> Any:
    torch.manual_seed(seed)
    config: dict[str, Any] = {
        "sample_size": 8,
        "block_out_channels": (4, 8),
        "layers_per_block": 1,
        "norm_num_groups": 2,
        "cross_attention_dim": 8,
        "attention_head_dim": 2,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    }
    return UNet2DConditionModel(**{**config, **options}).eval()


def tiny_vae(*, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return AutoencoderKL(block_out_channels=(4,), norm_num_groups=2, sample_size=32).eval()


def tiny_text_encoder(*, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    config = CLIPTextConfig(
        vocab_size=99,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=16,
        bos_token_id=1,
        eos_token_id=2,
    )
    return CLIPTextModel(config).eval()
