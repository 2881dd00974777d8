"""Pipelines that draw pictures in no time, and sweeps made of figures."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from PIL import Image

from helpers.pipelines import PlainPipeline
from pipevault.evidence.sweep.result import SweepResult


class Painter(PlainPipeline):
    """Draws 8x8 pixels from each sample's own generator, shifted by the length of its prompt; counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[list[str]] = []

    def __call__(
        self,
        prompt: str | list[str] = "",
        height: int = 8,
        width: int = 8,
        num_inference_steps: int = 3,
        generator: Any = None,
    ) -> Any:
        prompts = prompt if isinstance(prompt, list) else [prompt]
        generators = generator if isinstance(generator, list) else [generator]
        assert len(generators) == len(prompts)
        self.calls.append(prompts)
        pictures = []
        for text, one in zip(prompts, generators, strict=True):
            pixels = torch.randint(0, 200, (height, width, 3), generator=one) + len(text)
            pictures.append(Image.fromarray(pixels.to(torch.uint8).numpy()))
        return SimpleNamespace(images=pictures)


def sweep_result(
    *,
    prompts: Sequence[str] = ("a", "b"),
    seeds: Sequence[int] = tuple(range(8)),
    scores: dict[str, Any] | None = None,
    **changes: Any,
) -> SweepResult:
    """Of pictures whose digests follow from prompt and seed; ``scores`` has a constant contrast by default."""
    fields: dict[str, Any] = {
        "model": "demo",
        "pipeline": "Painter",
        "call": {"steps": 2},
        "batch_size": 1,
        "prompts": tuple(prompts),
        "seeds": tuple(seeds),
        "pixels": tuple(tuple(f"{ord(prompt[0]):032x}{seed:032x}" for seed in seeds) for prompt in prompts),
        "scores": scores or {"contrast": tuple(tuple(0.2 for _ in seeds) for _ in prompts)},
        "not_available": {"lpips": "the package lpips is not installed"},
        "key": "a" * 64,
        "outcome": "hit",
        "level": {"asked": "repeatable", "achieved": "repeatable"},
        "weights": {"unet": "b" * 64},
        "versions": {"torch": "2.13.0"},
        "machine": {"type": "cpu", "threads": 1},
        "notes": (),
        "created_at": "2026-01-31T12:00:00+00:00",
    }
    return SweepResult(**fields | changes)
