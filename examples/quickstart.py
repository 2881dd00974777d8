#!/usr/bin/env python3
"""Construct a pipeline with frozen graphs and draw one picture.

Run it twice: the first run freezes the graphs and prints ``miss``, the second loads them and prints ``hit`` and the
same digest. The model is the one that ships with pipevault, so nothing is downloaded.
"""

from __future__ import annotations

from diffusers import StableDiffusionPipeline

import pipevault
from pipevault.demo import MODEL_DIR


def main() -> None:
    pipe = pipevault.from_pretrained(StableDiffusionPipeline, MODEL_DIR, batch_size=1)
    output = pipe("a handwritten seven", num_inference_steps=12, guidance_scale=3.0, seed=7)
    pipevault.save(output, "seven.png")
    print("outcome:", pipevault.outcome(pipe).status)
    print("pixels:", pipevault.record_of(output).results["pixels"][0])


if __name__ == "__main__":
    main()
