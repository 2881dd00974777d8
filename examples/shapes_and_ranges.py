#!/usr/bin/env python3
"""Freeze graphs for one size, for another one, and for a whole range of sizes.

A call runs the graph for its very size if there is one, else the graph of the tightest range that holds its size.
"""

from __future__ import annotations

from diffusers import StableDiffusionPipeline

import pipevault
from pipevault.demo import MODEL_DIR

PARTS = ["unet"]  # the other parts stay eager, so that the example is quick


def main() -> None:
    pipe = StableDiffusionPipeline.from_pretrained(MODEL_DIR)
    cache = pipevault.PipelineCache(on_unfrozen="error")  # a call without a graph is an error, not a compilation
    cache.load(pipe, shapes=[{"height": 32, "width": 32}, {"height": 32, "width": 48}], parts=PARTS)
    show(pipe, 32, 32)
    show(pipe, 32, 48)
    show(pipe, 48, 48)  # refused

    cache.load(pipe, height=(32, 64), width=(32, 64), parts=PARTS)  # one more graph serves every size between
    show(pipe, 48, 48)
    show(pipe, 64, 40)


def show(pipe: StableDiffusionPipeline, height: int, width: int) -> None:
    """Draw one picture of that size and print which graphs there are."""
    try:
        pipe("a handwritten two", height=height, width=width, num_inference_steps=4, seed=2)
    except pipevault.errors.UnfrozenCallError as error:
        print(f"{height}x{width}: refused, {type(error).__name__}")
    else:
        print(f"{height}x{width}: drawn, graphs of the UNet: {pipevault.outcome(pipe).parts['unet'].graphs}")


if __name__ == "__main__":
    main()
