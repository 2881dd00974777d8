#!/usr/bin/env python3
"""Freeze ahead of time, then serve from a vault that must hold everything.

Workers in mode ``require`` never compile: what the vault lacks is an error that says what to run. In a shell the first
half is ``pipevault prewarm demo --size 32x32 --batch-size 1``, the second ``PIPEVAULT_MODE=require python worker.py``.
"""

from __future__ import annotations

from typing import Any

from diffusers import StableDiffusionPipeline

import pipevault
from pipevault.demo import MODEL_DIR

SHAPE: dict[str, Any] = {"height": 32, "width": 32, "batch_size": 1}


def main() -> None:
    pipe = StableDiffusionPipeline.from_pretrained(MODEL_DIR)
    cache = pipevault.PipelineCache()
    print("before:", cache.explain(pipe, **SHAPE).status)
    cache.load(pipe, **SHAPE)
    print("after:", cache.explain(pipe, **SHAPE).status)

    worker = StableDiffusionPipeline.from_pretrained(MODEL_DIR)
    strict = pipevault.PipelineCache(mode="require")
    strict.load(worker, **SHAPE)
    worker("a handwritten one", num_inference_steps=4, seed=1)
    print("worker:", pipevault.outcome(worker).status)
    try:
        strict.load(worker, height=32, width=32, batch_size=3)
    except pipevault.errors.MissError as error:
        print("refused:", error)


if __name__ == "__main__":
    main()
