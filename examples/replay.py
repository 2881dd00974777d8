#!/usr/bin/env python3
"""Save pictures with their records, draw one of them again from its file, and learn why other weights cannot.

The record inside the PNG names the model, the seed, the call, the machine and the versions. ``pipevault replay
seven.png`` does the same from a shell.
"""

from __future__ import annotations

import torch
from diffusers import StableDiffusionPipeline

import pipevault
from pipevault.demo import MODEL_DIR


def main() -> None:
    pipe = pipevault.from_pretrained(StableDiffusionPipeline, MODEL_DIR, batch_size=1)
    for digit in ("two", "seven"):
        output = pipe(f"a handwritten {digit}", num_inference_steps=12, guidance_scale=3.0, seed=7)
        pipevault.save(output, f"{digit}.png")

    record = pipevault.read_record("seven.png")
    print("seed:", record.seeds["root"], "outcome:", record.outcome)
    print("drawn again, equal:", pipevault.replay("seven.png", pipe).equal)

    with torch.no_grad():
        pipe.unet.conv_out.bias.add_(0.01)
    try:
        pipevault.replay("seven.png", pipe)
    except pipevault.errors.ChangedWeightsError as error:
        print("with other weights:", error)


if __name__ == "__main__":
    main()
