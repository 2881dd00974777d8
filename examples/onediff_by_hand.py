#!/usr/bin/env python3
"""Compile, save and load by hand with OneDiff's own functions; no vault is involved.

``import pipevault`` is enough for OneDiff to find the backend ``inductor``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onediffx
from diffusers import StableDiffusionPipeline

import pipevault
from pipevault.demo import MODEL_DIR

FOLDER = Path("cached_pipe")
OPTIONS = {"on_unfrozen": "compile"}


def main() -> None:
    pipe = onediffx.compile_pipe(open_demo(), backend="inductor", options=OPTIONS)
    first = draw(pipe)  # freezes its calls
    onediffx.save_pipe(pipe, dir=str(FOLDER))
    print("saved:", ", ".join(sorted(path.name for path in FOLDER.iterdir())))

    again = onediffx.compile_pipe(open_demo(), backend="inductor", options=OPTIONS)
    onediffx.load_pipe(again, dir=str(FOLDER))
    print("equal bits:", draw(again) == first, "with pipevault", pipevault.__version__)


def open_demo() -> StableDiffusionPipeline:
    return StableDiffusionPipeline.from_pretrained(MODEL_DIR)


def draw(pipe: Any) -> bytes:
    """Return the bytes of one picture."""
    generator = pipevault.generators(3, 1)
    return bytes(pipe("a handwritten three", num_inference_steps=4, generator=generator).images[0].tobytes())


if __name__ == "__main__":
    main()
