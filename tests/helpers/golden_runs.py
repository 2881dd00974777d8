"""Runs as goldens keep them, made without a pipeline: a record, pictures, latents."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pipevault.calls.describe import digest_array
from pipevault.calls.outputs import digests
from pipevault.evidence.golden.drawn import Drawn, machine_type
from pipevault.evidence.golden.files import Golden, Tolerance, case_folder
from pipevault.runtime.record import RunRecord

KEY, OTHER_KEY, MANIFEST, WEIGHTS = "a" * 64, "b" * 64, "c" * 64, "d" * 64
MACHINE: dict[str, Any] = {
    "type": "cpu",
    "capability": "AVX512",
    "features": ["avx2", "avx512_f"],
    "threads": 1,
    "onednn": "3.12.0",
}


def picture(seed: int = 0, *, size: tuple[int, int] = (16, 12)) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 250, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def brighter(image: Image.Image, by: int, *, pixels: int = 1) -> Image.Image:
    """With the first ``pixels`` of its first row brighter by so many steps."""
    array = np.asarray(image).copy()
    array[0, :pixels] += np.uint8(by)
    return Image.fromarray(array)


def a_record(pictures: list[Image.Image], **changes: Any) -> RunRecord:
    fields: dict[str, Any] = {
        "pipeline": {"class": "Painter", "model": None, "revision": None, "scheduler": None},
        "call": {"prompt": ["a cat"] * len(pictures), "num_inference_steps": 2},
        "seeds": {"root": 7, "samples": list(range(len(pictures))), "source": "argument", "streams": {}},
        "level": {"asked": "repeatable", "achieved": "repeatable", "flags": {}, "notes": []},
        "results": {"noise": KEY, "latents": KEY, **digests(pictures)},
        "outcome": "hit",
        "key": KEY,
        "manifest": MANIFEST,
        "weights": {"unet": WEIGHTS, "vae.decoder": WEIGHTS},
        "versions": {"torch": "2.13.0"},
        "machine": MACHINE,
        **changes,
    }
    return RunRecord(**fields)


def a_run(*pictures: Image.Image, latents: float = 0.0, factors: dict[str, Any] | None = None, **changes: Any) -> Drawn:
    """By default one picture; ``latents`` is added to all of them."""
    drawn = list(pictures or [picture()])
    array = np.linspace(-1, 1, 64, dtype=np.float32).reshape(1, 4, 4, 4) + np.float32(latents)
    results = {"noise": KEY, "latents": digest_array(array), **digests(drawn)}
    return Drawn(a_record(drawn, **{"results": results, **changes}), tuple(drawn), (array,), factors)


def a_golden(
    root: Path, drawn: Drawn | None = None, *, case: str = "seven", tolerance: Tolerance | None = None
) -> Golden:
    """Not written yet."""
    drawn = drawn or a_run()
    return Golden(case_folder(root, machine_type(drawn.record.machine), case), case, drawn, None, tolerance)
