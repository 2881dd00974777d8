"""Pipelines and modules that are small enough to compile in a test."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

# Compile the generated wrapper without optimisation: it is most of the time that a tiny graph takes.
FAST_BUILD = {"aot_inductor.compile_wrapper_opt_level": "O0"}


class Block(nn.Module):
    """Tied weights, a non-persistent buffer, a lifted constant, a constant output and a ``None`` output."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(16, 16)
        self.second = nn.Linear(16, 16)
        self.tied = self.first
        self.register_buffer("offset", torch.arange(16.0), persistent=False)

    def forward(self, x: torch.Tensor, scale: float = 1.0, return_dict: bool = True) -> Any:
        lifted = torch.tensor([0.25, 0.5]).sum()
        y = self.tied(torch.nn.functional.silu(self.second(self.first(x)))) * scale + self.offset + lifted
        return {"sample": y, "scale": scale, "extra": None} if return_dict else (y,)


class Denoiser(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(8, 8)

    def forward(self, latents: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
        return latents - 0.1 * torch.tanh(self.mix(latents)) * torch.cos(step)


class PlainPipeline:
    """A pipeline that is none of diffusers': one denoiser, called step after step."""

    def __init__(self, seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.transformer: Any = Denoiser().eval()

    def __call__(
        self,
        prompt: str | list[str] = "",
        height: int = 8,
        width: int = 8,
        num_inference_steps: int = 3,
        generator: torch.Generator | None = None,
    ) -> torch.Tensor:
        batch_size = len(prompt) if isinstance(prompt, list) else 1
        latents = torch.randn(batch_size, height, width, generator=generator)
        with torch.no_grad():
            for step in range(num_inference_steps):
                latents = self.transformer(latents, torch.tensor(float(step)))
        return latents


def tokenizer(folder: Path) -> Any:
    from transformers import CLIPTokenizer

    letters = [chr(code) for code in range(33, 127)]
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=16)


def stable_diffusion(folder: Path, *, seed: int = 0) -> Any:
    """A ``StableDiffusionPipeline`` with a few thousand random weights that draws 16x16 pixels."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(seed)
    unet = UNet2DConditionModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=8,
        norm_num_groups=4,
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=16,
    )
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=190,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=16,
            bos_token_id=188,
            eos_token_id=189,
            pad_token_id=189,
        )
    )
    return StableDiffusionPipeline(
        unet=unet.eval(),
        vae=vae.eval(),
        text_encoder=text_encoder.eval(),
        tokenizer=tokenizer(folder),
        scheduler=DDIMScheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def draw(pipe: Any, *, seed: int = 1, **arguments: Any) -> torch.Tensor:
    """Pixels or latents of one call with a seeded generator."""
    generator = torch.Generator().manual_seed(seed)
    call = {"prompt": "a cat", "num_inference_steps": 3, "generator": generator, **arguments}
    if isinstance(pipe, PlainPipeline):
        return pipe(**call)
    return torch.from_numpy(pipe(output_type="np", **call).images.copy())
