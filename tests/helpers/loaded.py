"""Pipelines that are loaded without a compiler: their calls run eagerly, in everything else as others do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import pipevault
from helpers.pipelines import PlainPipeline


class Paused(PlainPipeline):
    """Calls ``pause`` at each step, as a step callback does."""

    def __call__(  # type: ignore[override]
        self,
        prompt: str | list[str] = "",
        num_inference_steps: int = 3,
        generator: Any = None,
        pause: Callable[[], None] | None = None,
    ) -> torch.Tensor:
        count = len(prompt) if isinstance(prompt, list) else 1
        if isinstance(generator, list):
            latents = torch.cat([torch.randn(1, 8, 8, generator=one) for one in generator])
        else:
            latents = torch.randn(count, 8, 8, generator=generator)
        with torch.no_grad():
            for step in range(num_inference_steps):
                if pause is not None:
                    pause()
                latents = self.transformer(latents, torch.tensor(float(step)))
        return latents


def load(pipe: Any, folder: Path, **settings: Any) -> Any:
    cache = pipevault.PipelineCache(folder / "vault", on_unfrozen="eager", **settings)
    return cache.load(pipe)
