#!/usr/bin/env python3
"""Run a fine-tune and a fused LoRA with the graphs that were frozen for the base model.

Weights stay outside of a graph, so every pipeline of the same architecture uses it with weights of its own.
"""

from __future__ import annotations

import torch
from diffusers import StableDiffusionPipeline

import pipevault
from pipevault.demo import MODEL_DIR


def main() -> None:
    cache = pipevault.PipelineCache()
    base = cache.load(StableDiffusionPipeline.from_pretrained(MODEL_DIR), batch_size=1)
    print("base:", digest(base))

    tuned = StableDiffusionPipeline.from_pretrained(MODEL_DIR)
    fine_tune(tuned.unet)
    cache.load(tuned, batch_size=1)
    print("fine-tune:", pipevault.outcome(tuned).status, digest(tuned))

    fuse_lora(base.unet)  # into a pipeline that is loaded already: its graphs follow the weights
    print("fused LoRA:", digest(base))


def fine_tune(unet: torch.nn.Module) -> None:
    """Change every weight a little, as a training run would."""
    with torch.no_grad():
        for weight in unet.parameters():
            weight.mul_(1.01)


def fuse_lora(unet: torch.nn.Module, rank: int = 2, scale: float = 0.1) -> None:
    """Do what ``pipe.fuse_lora()`` does: add the product of two small matrices to each attention weight."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in unet.named_parameters():
            if name.endswith("to_q.weight"):
                up = torch.randn(weight.shape[0], rank, generator=generator)
                down = torch.randn(rank, weight.shape[1], generator=generator)
                weight.add_(scale * up @ down)


def digest(pipe: StableDiffusionPipeline) -> str:
    """Return the SHA-256 of the pixels of one picture."""
    output = pipe("a handwritten five", num_inference_steps=12, guidance_scale=3.0, seed=5)
    return str(pipevault.record_of(output).results["pixels"][0])


if __name__ == "__main__":
    main()
