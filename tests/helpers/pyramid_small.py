"""A model of the structure of Pyramid-Flow's ``PyramidDiTForVideoGeneration``, small enough to compile in a test.

It is no diffusers pipeline. Its denoiser takes a nested list that grows with the history of the video, its text encoder
texts and a device, and the causal convolutions of its VAE keep frames on themselves from chunk to chunk.
"""

from __future__ import annotations

import random
from collections import deque
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from torch import nn
from torch.nn.functional import interpolate, pad, pixel_shuffle, pixel_unshuffle

WIDTH = 8
CHANNELS = 4
SCALE = 8
FRAMES = 8
WORDS = 16


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(WIDTH, WIDTH)
        self.context = nn.Linear(WIDTH, WIDTH)

    def forward(self, tokens: torch.Tensor, context: torch.Tensor, hidden_length: list[int]) -> torch.Tensor:
        """``hidden_length`` says how the tokens are divided, which their shape says too where there is one sequence."""
        return torch.cat([self.mixed(part, context) for part in tokens.split(hidden_length, dim=1)], dim=1)  # type: ignore[no-untyped-call]

    def mixed(self, tokens: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        weights = torch.softmax(tokens @ context.transpose(1, 2), dim=-1)
        return tokens + torch.tanh(self.mix(tokens) + weights @ self.context(context))


class DiT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.into = nn.Linear(CHANNELS, WIDTH)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.out = nn.Linear(WIDTH, CHANNELS)

    def forward(
        self,
        sample: list[list[torch.Tensor]],
        timestep_ratio: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        encoder_attention_mask: torch.Tensor,
        pooled_projections: torch.Tensor,
    ) -> list[torch.Tensor]:
        made = []
        context = encoder_hidden_states * encoder_attention_mask[..., None] + pooled_projections[:, None]
        for clips in sample:
            tokens = self.into(torch.cat([clip.flatten(2).transpose(1, 2) for clip in clips], dim=1))
            tokens = tokens + torch.cos(timestep_ratio / 1000)[:, None, None]
            for block in self.blocks:
                tokens = block(tokens, context, [tokens.shape[1]]) + tokens.mean(dim=1, keepdim=True)
            last = tokens[:, -clips[-1][0, 0].numel() :]
            made.append(self.out(last).transpose(1, 2).reshape(clips[-1].shape))
        return made


class Clip(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(128, WIDTH)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.words(input_ids)).mean(dim=1)


class T5(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(128, WIDTH)
        self.mix = nn.Linear(WIDTH, WIDTH)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return self.mix(self.words(input_ids)) * attention_mask[..., None]


class TextEncoder(nn.Module):
    """Takes texts and a device, which no graph can."""

    def __init__(self) -> None:
        super().__init__()
        self.text_encoder = Clip()
        self.text_encoder_2 = T5()

    def forward(self, texts: str | list[str], device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        listed = [texts] if isinstance(texts, str) else texts
        letters = [[ord(letter) % 127 + 1 for letter in text[:WORDS]] for text in listed]
        ids = torch.tensor([row + [0] * (WORDS - len(row)) for row in letters], device=device)
        mask = (ids > 0).to(torch.float32)
        return self.text_encoder_2(ids, attention_mask=mask), mask, self.text_encoder(ids)


class CausalConv(nn.Module):
    """Sees two frames back; with ``temporal_chunk`` those of the chunk before, which it has kept."""

    def __init__(self, inside: int, outside: int) -> None:
        super().__init__()
        self.conv = nn.Conv3d(inside, outside, (3, 1, 1))
        self.cache_front_feat: deque[torch.Tensor] = deque()

    def forward(self, x: torch.Tensor, is_init_image: bool = True, temporal_chunk: bool = False) -> torch.Tensor:
        is_first = is_init_image or not temporal_chunk
        x = pad(x, (0, 0, 0, 0, 2, 0)) if is_first else torch.cat([self.cache_front_feat.pop(), x], dim=2)
        if temporal_chunk:
            del self.cache_front_feat
            self.cache_front_feat = deque([x[:, :, -2:].clone()])
        return self.conv(x)


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = CausalConv(3 * SCALE**2, 2 * CHANNELS)

    def forward(self, x: torch.Tensor, is_init_image: bool = True, temporal_chunk: bool = False) -> torch.Tensor:
        small = pixel_unshuffle(x.transpose(1, 2), SCALE).transpose(1, 2)
        return self.conv(small, is_init_image, temporal_chunk)


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = CausalConv(CHANNELS, WIDTH)
        self.last = CausalConv(WIDTH, 3 * SCALE**2)

    def forward(self, z: torch.Tensor, is_init_image: bool = True, temporal_chunk: bool = False) -> torch.Tensor:
        x = torch.tanh(self.first(z, is_init_image, temporal_chunk)).repeat_interleave(FRAMES, dim=2)
        x = x[:, :, FRAMES - 1 :] if is_init_image else x
        x = self.last(x, is_init_image, temporal_chunk)
        return torch.tanh(pixel_shuffle(x.transpose(1, 2), SCALE).transpose(1, 2))


class Posterior:
    def __init__(self, moments: torch.Tensor) -> None:
        self.mean, self.spread = moments.chunk(2, dim=1)

    def sample(self) -> torch.Tensor:
        return self.mean + self.spread * torch.randn(self.mean.shape)


class VAE(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = Encoder()
        self.decoder = Decoder()
        self.post_quant_conv = CausalConv(CHANNELS, CHANNELS)

    def encode(self, x: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(latent_dist=Posterior(self.encoder(x, is_init_image=True, temporal_chunk=False)))

    def decode(self, z: torch.Tensor, window_size: int = 1) -> SimpleNamespace:
        chunks = [z[:, :, : window_size + 1], *z[:, :, window_size + 1 :].split(window_size, dim=2)]  # type: ignore[no-untyped-call]
        decoded = []
        for index, chunk in enumerate(chunk for chunk in chunks if chunk.shape[2]):
            hidden = self.post_quant_conv(chunk, is_init_image=index == 0, temporal_chunk=True)
            decoded.append(self.decoder(hidden, is_init_image=index == 0, temporal_chunk=True))
        return SimpleNamespace(sample=torch.cat(decoded, dim=2))


class PyramidDiTForVideoGeneration:
    """Two stages; ``load_vae=False`` leaves the VAE out, as training does."""

    def __init__(self, *, seed: int = 0, load_vae: bool = True, load_text_encoder: bool = True) -> None:
        generator_state = torch.get_rng_state()
        torch.manual_seed(seed)
        self.dit = DiT().eval()
        self.text_encoder = TextEncoder().eval() if load_text_encoder else None
        self.vae = VAE().eval() if load_vae else None
        torch.set_rng_state(generator_state)
        for module in (self.dit, self.text_encoder, self.vae):
            if module is not None:
                module.requires_grad_(False)
        self.stages = [1, 2]

    def __call__(self, video: torch.Tensor, text: list[str]) -> torch.Tensor:
        raise AssertionError("a step of training")

    @torch.no_grad()
    def generate(
        self,
        prompt: str | list[str] = "",
        height: int | None = None,
        width: int | None = None,
        temp: int = 1,
        num_inference_steps: int | list[int] = 2,
        video_num_inference_steps: int | list[int] = 2,
        guidance_scale: float = 7.0,
        video_guidance_scale: float = 7.0,
        negative_prompt: str | list[str] = "blurry",
        generator: torch.Generator | None = None,
        output_type: str = "pil",
        save_memory: bool = True,
    ) -> Any:
        assert height is not None
        assert width is not None
        latents = self._latents(prompt, temp, height, width, generator)
        return self._video(
            latents, [], prompt, negative_prompt, video_num_inference_steps, guidance_scale, output_type, save_memory
        )

    @torch.no_grad()
    def generate_i2v(
        self,
        prompt: str | list[str] = "",
        input_image: Image.Image | None = None,
        temp: int = 1,
        num_inference_steps: int | list[int] = 2,
        guidance_scale: float = 7.0,
        video_guidance_scale: float = 4.0,
        negative_prompt: str | list[str] = "blurry",
        generator: torch.Generator | None = None,
        output_type: str = "pil",
        save_memory: bool = True,
    ) -> Any:
        assert input_image is not None
        assert self.vae is not None
        latents = self._latents(prompt, temp, input_image.height, input_image.width, generator)
        pixels = torch.from_numpy(np.array(input_image)).permute(2, 0, 1)[None, :, None].to(torch.float32) / 127.5 - 1
        first = self.vae.encode(pixels).latent_dist.sample()
        return self._video(
            latents, [first], prompt, negative_prompt, num_inference_steps, guidance_scale, output_type, save_memory
        )

    @staticmethod
    def _latents(prompt: Any, temp: int, height: int, width: int, generator: torch.Generator | None) -> torch.Tensor:
        count = len(prompt) if isinstance(prompt, list) else 1
        shape = (count, CHANNELS, temp, height // SCALE, width // SCALE)
        return randn_tensor(shape, generator=generator)

    def _video(
        self,
        latents: torch.Tensor,
        made: list[torch.Tensor],
        prompt: str | list[str],
        negative_prompt: str | list[str],
        steps: int | list[int],
        guidance_scale: float,
        output_type: str,
        save_memory: bool,
    ) -> Any:
        assert self.text_encoder is not None
        texts = [self.text_encoder(text, latents.device) for text in (negative_prompt, prompt)]
        if guidance_scale <= 0:
            texts = texts[1:]
        context = [torch.cat(values) for values in zip(*texts, strict=True)]
        for index in range(latents.shape[2]):
            history = torch.cat(made, dim=2) if made else None
            made.append(self._unit(latents[:, :, index : index + 1], history, context, steps, guidance_scale))
        video = torch.cat(made, dim=2)
        if output_type == "latent":
            return video
        assert self.vae is not None
        frames = self.vae.decode(video, window_size=1 if save_memory else 2).sample
        pixels = frames.mul(127.5).add(127.5).clamp(0, 255).byte().permute(0, 2, 3, 4, 1).flatten(0, 1)
        return [Image.fromarray(frame) for frame in pixels.numpy()]

    def _unit(
        self,
        latents: torch.Tensor,
        history: torch.Tensor | None,
        context: list[torch.Tensor],
        steps: int | list[int],
        guidance_scale: float,
    ) -> torch.Tensor:
        height, width = latents.shape[-2:]
        latents = latents[..., ::2, ::2]
        copies = 2 if guidance_scale > 0 else 1
        for stage, _ in enumerate(self.stages):
            small = stage == 0
            if not small:
                latents = interpolate(latents, size=(1, height, width)) + self._block_noise(height, width)
            past = []
            if history is not None:
                # What is further back is seen at half the size, all of it in one clip.
                past = [history[:, :, -1:, :: 1 + small, :: 1 + small]]
                past = [history[:, :, :-1, ::2, ::2], *past] if history.shape[2] > 1 else past
            for step in range(steps if isinstance(steps, int) else steps[stage]):
                clips = [torch.cat([clip] * copies) for clip in (*past, latents)]
                noise = self.dit(
                    sample=[clips],
                    timestep_ratio=torch.full((len(clips[0]),), 1000.0 - 100 * step - 400 * stage),
                    encoder_hidden_states=context[0],
                    encoder_attention_mask=context[1],
                    pooled_projections=context[2],
                )[0]
                if copies == 2:
                    negative, positive = noise.chunk(2)
                    noise = negative + guidance_scale * (positive - negative)
                latents = latents - 0.05 * noise
        return latents

    @staticmethod
    def _block_noise(height: int, width: int) -> torch.Tensor:
        """From every stream of the program, whatever ``generator=`` says."""
        drawn = torch.randn(1, CHANNELS, 1, height, width)
        return 0.1 * (drawn + float(np.random.standard_normal()) + random.random())
