"""Pyramid-Flow (github.com/jy0205/Pyramid-Flow), of both generations: ``pyramid_flux`` and ``pyramid_mmdit``.

``PyramidDiTForVideoGeneration`` holds ``dit``, ``vae`` and ``text_encoder``. The text encoder takes texts and a device,
so its inner models are the parts. ``__call__`` is a step of its training, and draws nothing that anybody keeps.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from PIL import Image

from pipevault.errors import BadCallError, SettingsError

CLASS = "PyramidDiTForVideoGeneration"
METHODS = ("generate", "generate_i2v")

FRAMES_PER_LATENT = 8
"""Frames that the VAE makes of each latent after the first, which is one frame: ``temp=16`` are 121 frames."""

DEFAULT_TEMP = 3
"""The shortest video that runs everything: the first latent, one that follows it, and a second chunk of the VAE."""

_NEEDED = {"vae": "load_vae", "text_encoder": "load_text_encoder"}


def part_names(model: Any) -> tuple[str, ...]:
    """Return the parts of ``model``. :class:`SettingsError` for one that was built without something it needs."""
    for name, option in _NEEDED.items():
        if getattr(model, name, None) is None:
            raise SettingsError(
                f"This {CLASS} has no {name}, without which it cannot generate. Construct it with {option}=True, from "
                "a checkpoint that has one."
            )
    encoders = [f"text_encoder.{name}" for name, _ in model.text_encoder.named_children()]
    return ("dit", *encoders, "vae.encoder", "vae.decoder")


def warm_up(model: Any, shape: Mapping[str, Any]) -> Callable[[], Any]:
    """Return a function that generates with one step for each stage: from a text and, for a video, from an image."""
    given = {name: value for name, value in shape.items() if name not in ("num_frames", "batch_size", "guidance")}
    size = _default_size(model)
    height, width = given.setdefault("height", size[0]), given.setdefault("width", size[1])
    temp = given.setdefault("temp", _latents(shape.get("num_frames")))
    count = shape.get("batch_size", 1)
    steps = [1] * len(model.stages)
    arguments: dict[str, Any] = {
        "prompt": ["a"] * count,
        "negative_prompt": ["a"] * count,
        "num_inference_steps": steps,
        "video_num_inference_steps": steps,
    }
    if shape.get("guidance") is False:
        arguments |= {"guidance_scale": 0.0, "video_guidance_scale": 0.0}
    arguments |= given

    accepted = inspect.signature(type(model).generate_i2v).parameters
    from_image = {name: value for name, value in arguments.items() if name in accepted}
    from_image |= {"input_image": _ramp(height, width), "temp": temp - 1}

    def run() -> Any:
        made = type(model).generate(model, **arguments)
        if temp == 1 or count > 1:  # one frame needs no image, and an image is for one prompt
            return made
        return made, type(model).generate_i2v(model, **from_image)

    return run


def _ramp(height: int, width: int) -> Image.Image:
    ramp = np.add.outer(np.arange(height), np.arange(width)) % 256
    return Image.fromarray(np.stack([ramp] * 3, axis=-1).astype(np.uint8))


def _latents(num_frames: int | None) -> int:
    if num_frames is None:
        return DEFAULT_TEMP
    if (num_frames - 1) % FRAMES_PER_LATENT:
        lower = num_frames - (num_frames - 1) % FRAMES_PER_LATENT
        raise BadCallError(
            f"num_frames={num_frames} does not suit {CLASS}, which draws one frame and then {FRAMES_PER_LATENT} for "
            f"each latent. Use {lower} or {lower + FRAMES_PER_LATENT}."
        )
    return (num_frames - 1) // FRAMES_PER_LATENT + 1


def _default_size(model: Any) -> tuple[int, int]:
    """Height and width for which the checkpoint was trained, which only the name of its folder tells."""
    folder = str(getattr(getattr(model.dit, "config", None), "_name_or_path", ""))
    return (768, 1280) if "768p" in folder else (384, 640)
