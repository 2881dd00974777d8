#!/usr/bin/env python3
"""Draw digits with the shipped demo pipeline in plain diffusers and count how many are recognised.

Run from a checkout: ``PYTHONPATH=src python scripts/evaluate_demo_model.py``.
"""

# diffusers shows untyped placeholders to type checkers.
# mypy: disable-error-code="no-any-return, no-untyped-call, operator"

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

from pipevault.demo import DEFAULT_GUIDANCE_SCALE, DEFAULT_STEPS, DIGIT_WORDS, MODEL_DIR, prompt
from pipevault.demo.classifier import recognise

TIMED_IMAGES = 5


@dataclass(frozen=True)
class Evaluation:
    """Outcome of one run; shares lie between 0 and 1, and index ``recognised_share_per_digit`` by digit."""

    images: int
    steps: int
    guidance_scale: float
    threads: int
    recognised_share: float
    recognised_share_per_digit: list[float]
    mean_confidence: float
    median_single_image_s: float


def load_pipeline(folder: Path) -> StableDiffusionPipeline:
    pipeline = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(
    pipeline: StableDiffusionPipeline, text: str, seeds: Sequence[int], steps: int, guidance_scale: float
) -> list[Image.Image]:
    """Draw one image per seed; an image does not depend on which others are in the batch."""
    images: list[Image.Image] = pipeline(
        [text] * len(seeds),
        num_inference_steps=steps,
        guidance_scale=guidance_scale,
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
    ).images
    return images


def median_single_image_s(pipeline: StableDiffusionPipeline, steps: int, guidance_scale: float) -> float:
    durations_s = []
    for seed in range(TIMED_IMAGES):
        started_s = time.perf_counter()
        draw(pipeline, prompt(seed), [seed], steps, guidance_scale)
        durations_s.append(time.perf_counter() - started_s)
    return statistics.median(durations_s)


def contact_sheet(rows: Sequence[Sequence[Image.Image]], scale: int = 2) -> Image.Image:
    width_px, height_px = (side * scale for side in rows[0][0].size)
    sheet = Image.new("RGB", (width_px * len(rows[0]), height_px * len(rows)), "white")
    for row, images in enumerate(rows):
        for column, image in enumerate(images):
            enlarged = image.resize((width_px, height_px), Image.Resampling.BICUBIC)
            sheet.paste(enlarged, (column * width_px, row * height_px))
    return sheet


def evaluate(
    pipeline: StableDiffusionPipeline, images_per_digit: int, steps: int, guidance_scale: float
) -> tuple[Evaluation, list[list[Image.Image]]]:
    rows: list[list[Image.Image]] = []
    shares: list[float] = []
    confidences: list[float] = []
    for digit in range(len(DIGIT_WORDS)):
        seeds = [1000 * digit + index for index in range(images_per_digit)]
        rows.append(draw(pipeline, prompt(digit), seeds, steps, guidance_scale))
        recognised, digit_confidences = recognise(rows[-1])
        shares.append(recognised.count(digit) / images_per_digit)
        confidences += digit_confidences
    evaluation = Evaluation(
        images=images_per_digit * len(rows),
        steps=steps,
        guidance_scale=guidance_scale,
        threads=torch.get_num_threads(),
        recognised_share=round(statistics.fmean(shares), 4),
        recognised_share_per_digit=[round(share, 4) for share in shares],
        mean_confidence=round(statistics.fmean(confidences), 4),
        median_single_image_s=round(median_single_image_s(pipeline, steps, guidance_scale), 3),
    )
    return evaluation, rows


def report(evaluation: Evaluation) -> str:
    lines = [
        f"{digit}  {share:6.1%}  {prompt(digit)}" for digit, share in enumerate(evaluation.recognised_share_per_digit)
    ]
    lines.append(
        f"recognised {evaluation.recognised_share:.1%} of {evaluation.images} images"
        f" ({evaluation.steps} steps, guidance {evaluation.guidance_scale:g},"
        f" mean confidence {evaluation.mean_confidence:.3f})"
    )
    lines.append(
        f"one image takes {evaluation.median_single_image_s:.3f} s"
        f" (median of {TIMED_IMAGES}, {evaluation.threads} CPU thread(s))"
    )
    return "\n".join(lines)


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=MODEL_DIR, help="pipeline folder")
    parser.add_argument("--images-per-digit", type=int, default=20)
    parser.add_argument("--steps", type=int, default=DEFAULT_STEPS, help="denoising steps")
    parser.add_argument("--guidance-scale", type=float, default=DEFAULT_GUIDANCE_SCALE)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--contact-sheet", type=Path, metavar="PNG", help="save all images as one picture")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse_arguments(arguments)
    torch.set_num_threads(options.threads)
    pipeline = load_pipeline(options.model)
    evaluation, rows = evaluate(pipeline, options.images_per_digit, options.steps, options.guidance_scale)
    if options.contact_sheet is not None:
        contact_sheet(rows).save(options.contact_sheet)
    print(json.dumps(asdict(evaluation), indent=2) if options.json else report(evaluation))
    return 0


if __name__ == "__main__":
    sys.exit(main())
