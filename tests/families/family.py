"""What a family of pipelines is, and what the builders of all families share."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import nn

M = TypeVar("M", bound=nn.Module)

PROMPT = "a cat"
OTHER_PROMPT = "red sun"
LONGER_PROMPT = "a small grey cat"


@dataclass(frozen=True)
class Family:
    """A tiny pipeline of one kind, how it is called, and what may be varied in a call."""

    name: str
    make: Callable[[], Any]
    call: Mapping[str, Any]
    denoiser: str
    variations: Mapping[str, Mapping[str, Any]]
    scheduler: Callable[[Any], Any] | None = None
    dtype: str = "float32"


def seeded(build: Callable[..., Any]) -> Callable[..., Any]:
    """Make ``build`` give the same weights each time."""

    @functools.wraps(build)
    def wrapper(*arguments: Any, **keywords: Any) -> Any:
        torch.manual_seed(0)
        return build(*arguments, **keywords)

    return wrapper


@torch.no_grad()
def fill(module: M, *, gain: float = 1.0) -> M:
    """Give every parameter random values that keep the scale of what flows through, and set ``eval()``.

    Layers that start at zero would hide whatever a tiny network computes before them: none stays at zero.
    """
    tables = {id(part.weight) for part in module.modules() if isinstance(part, nn.Embedding)}
    for name, parameter in module.named_parameters():
        noise = torch.randn(parameter.shape)
        last = name.rsplit(".", 1)[-1]
        if parameter.ndim == 0:
            continue
        if last in ("gamma", "scale") or (last == "weight" and parameter.ndim == 1):
            parameter.copy_(1 + 0.1 * noise)
        elif id(parameter) in tables:
            parameter.copy_(0.5 * noise)
        elif last in ("bias", "beta"):
            parameter.copy_(0.1 * noise)
        elif parameter.ndim == 1:
            parameter.copy_(0.5 * noise)
        else:
            parameter.copy_(gain * noise / (parameter.numel() / parameter.shape[0]) ** 0.5)
    return module.eval()


def keep_going(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
    """Change nothing at the end of a step."""
    return {}


def vary(
    *,
    guidance: Mapping[str, Any] | None = None,
    no_guidance: Mapping[str, Any] | None = None,
    negative: Mapping[str, Any] | None = None,
    batch: Mapping[str, Any] | None = None,
    several: str | None = "num_images_per_prompt",
    size: Mapping[str, Any] | None = None,
    steps: int = 4,
    without: tuple[str, ...] = (),
) -> dict[str, Mapping[str, Any]]:
    """Return the usual variations of a call with a text prompt."""
    found: dict[str, Mapping[str, Any] | None] = {
        "steps": {"num_inference_steps": steps},
        "guidance": guidance,
        "no_guidance": no_guidance,
        "longer_prompt": {"prompt": LONGER_PROMPT},
        "negative_prompt": negative,
        "batch_2": batch or {"prompt": [PROMPT, OTHER_PROMPT]},
        "two_images": {several: 2} if several else None,
        "callback": {"callback_on_step_end": keep_going},
        "latents_out": {"output_type": "latent"},
        "size": size,
    }
    return {name: changes for name, changes in found.items() if changes is not None and name not in without}


# Guidance by a second pass without the prompt, as most pipelines name it.
CFG: dict[str, Any] = {
    "guidance": {"guidance_scale": 2.5},
    "no_guidance": {"guidance_scale": 1.0},
    "negative": {"negative_prompt": "a dog"},
}
