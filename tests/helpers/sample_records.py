"""Records and pictures that the tests of records, files and metrics share."""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image

from pipevault.calls.describe import pixels_sha256
from pipevault.runtime.record import RunRecord

SEEDS = [1234567, 7654321, 2**63 - 1]
SHA256 = "0123456789abcdef" * 4


def picture(seed: int = 0, *, mode: str = "RGB", size: tuple[int, int] = (32, 32)) -> Image.Image:
    """Noise, which no lossy format keeps."""
    bands = len(Image.new(mode, (1, 1)).getbands())
    shape = (size[1], size[0], bands) if bands > 1 else (size[1], size[0])
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8), mode=None)


def fields(**changes: Any) -> dict[str, Any]:
    """Arguments of :class:`RunRecord` for a batch of three, with ``changes`` to the top level."""
    return {
        "created_at": "2026-01-31T12:00:00+00:00",
        "pipeline": {
            "class": "StableDiffusionPipeline",
            "model": "org/digits",
            "revision": None,
            "scheduler": "DDIMScheduler",
        },
        "call": {
            "prompt": ["a seven", "an eight", "a nine"],
            "negative_prompt": "blurry, dark",
            "num_inference_steps": 12,
            "guidance_scale": 3.0,
            "image": {"kind": "image", "sha256": SHA256, "size": [32, 32], "mode": "RGB"},
        },
        "seeds": {"root": 7, "samples": list(SEEDS), "source": "argument", "streams": {}},
        "level": {"asked": "repeatable+audit", "achieved": "repeatable", "flags": {"threads": 2}, "notes": ["a note"]},
        "key": SHA256,
        "manifest": SHA256[::-1],
        "outcome": "hit",
        "graphs": {"unet": {SHA256: SHA256}},
        "weights": {"unet": SHA256},
        "versions": {"pipevault": "0.1.0", "torch": "2.13.0", "onediff": None},
        "machine": {"cpu": {"isa": "avx2"}},
        "results": {
            "noise": SHA256,
            "latents": SHA256,
            "pixels": [pixels_sha256(picture(index)) for index in range(3)],
            "values": None,
            "undigested": {},
            "steps": [{"step": 0, "part": "unet", "sha256": SHA256}],
        },
        "seconds": {"waiting": 0.0, "drawing": 1.5},
        **changes,
    }


def sample_record(**changes: Any) -> RunRecord:
    return RunRecord(**fields(**changes))


def with_call(**arguments: Any) -> RunRecord:
    return sample_record(call={**fields()["call"], **arguments})


FRAMES = [picture(index) for index in range(4)]
