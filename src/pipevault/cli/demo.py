"""``pipevault demo``: freeze or load the pipeline that ships, and draw ten handwritten digits with it."""

from __future__ import annotations

import io
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pipevault.cli import render
from pipevault.cli.options import OutputFile, command, dir_option, json_option, mode_option
from pipevault.cli.pipelines import DEMO_SHAPE
from pipevault.cli.progress import StepProgress
from pipevault.demo import DEFAULT_GUIDANCE_SCALE, DEFAULT_STEPS, DIGIT_WORDS, prompt
from pipevault.digest import digest_chunks
from pipevault.opening import DEMO_MODEL, open_pipeline

if TYPE_CHECKING:
    from PIL.Image import Image

LAST_SEED = 2**63 - len(DIGIT_WORDS)
"""The digit is added to the seed, and the sum must fit in 63 bits."""

_COLUMNS = 5
_ENLARGEMENT = 5
_LABEL_HEIGHT_PX = 24
_MARGIN_PX = 8


@command("demo", short_help="Draw ten digits with the pipeline that ships.")
@dir_option
@click.option(
    "--out", metavar="PNG", type=OutputFile(), default="demo.png", show_default=True, help="Where the picture goes."
)
@click.option(
    "--seed",
    metavar="NUMBER",
    type=click.IntRange(0, LAST_SEED),
    default=0,
    show_default=True,
    help="Digit n is drawn with seed + n.",
)
@mode_option("compile", "require", "off")
@json_option
def demo(dir: Path | None, out: Path, seed: int, mode: str | None, as_json: bool) -> None:
    """Draw ten handwritten digits with the pipeline that ships: the first run freezes it, later ones load it.

    ready_s is the time from the constructed pipeline to the frozen one; pixels_sha256 is the SHA-256 of the
    ten pictures' RGB bytes, zero to nine.

    \b
    Examples:
      pipevault demo
      pipevault demo --seed 7 --out sevens.png
      pipevault demo --mode require --json
    """
    from pipevault import PipelineCache, outcome
    from pipevault.cache.outcome import Clock

    with StepProgress() as progress:
        cache = PipelineCache(dir, mode=mode, progress=progress)
        pipe = open_pipeline(DEMO_MODEL)
        started_s = time.perf_counter()
        pipe = cache.load(pipe, **DEMO_SHAPE)
        ready_s = time.perf_counter() - started_s
        with Clock(progress).step("draw"):
            pictures = draw(pipe, seed=seed)
    save_grid(pictures, out)
    report = outcome(pipe)
    answer = {
        "outcome": report.status,
        "key": report.key,
        "ready_s": round(ready_s, 4),
        "pixels_sha256": pixels_sha256(pictures),
        "picture": out,
    }
    if as_json:
        render.print_json({**answer, "parts": report.parts})
        return
    reason = f" ({report.reason})" if report.reason else ""
    shown = {**answer, "outcome": f"{report.status}{reason}", "key": report.key or "none", "ready_s": f"{ready_s:.4f}"}
    rows = [(name, part.status, str(part.graphs), part.reason) for name, part in report.parts.items()]
    render.show(
        render.facts((name, str(value)) for name, value in shown.items()),
        render.table(("PART", "STATE", "GRAPHS", "REASON"), rows, right=("GRAPHS",)),
    )


def draw(pipe: Any, *, seed: int) -> list[Image]:
    """Draw each digit, zero to nine, in one call; digit ``n`` has a CPU generator of its own."""
    import torch

    digits = range(len(DIGIT_WORDS))
    pictures: list[Image] = pipe(
        [prompt(digit) for digit in digits],
        num_inference_steps=DEFAULT_STEPS,
        guidance_scale=DEFAULT_GUIDANCE_SCALE,
        generator=[torch.Generator("cpu").manual_seed(seed + digit) for digit in digits],
    ).images
    return pictures


def pixels_sha256(pictures: Sequence[Image]) -> str:
    """Return the SHA-256 of the pictures' RGB bytes, row by row, one picture after the other."""
    return digest_chunks(picture.convert("RGB").tobytes() for picture in pictures).hex


def save_grid(pictures: Sequence[Image], path: Path) -> None:
    """Write the pictures enlarged, five to a row, each over its word; :class:`CannotSaveError` if that fails."""
    from PIL import Image, ImageDraw, ImageFont

    from pipevault.evidence.files import write_data

    width_px, height_px = (side * _ENLARGEMENT for side in pictures[0].size)
    cell_width_px, cell_height_px = width_px + _MARGIN_PX, height_px + _LABEL_HEIGHT_PX + _MARGIN_PX
    rows = -(-len(pictures) // _COLUMNS)
    grid = Image.new("RGB", (_COLUMNS * cell_width_px + _MARGIN_PX, rows * cell_height_px + _MARGIN_PX), "white")
    pen, font = ImageDraw.Draw(grid), ImageFont.load_default(16)
    for index, picture in enumerate(pictures):
        left_px = _MARGIN_PX + index % _COLUMNS * cell_width_px
        top_px = _MARGIN_PX + index // _COLUMNS * cell_height_px
        enlarged = picture.convert("RGB").resize((width_px, height_px), Image.Resampling.NEAREST)
        grid.paste(enlarged, (left_px, top_px))
        middle_px = (left_px + width_px // 2, top_px + height_px + _LABEL_HEIGHT_PX // 2)
        pen.text(middle_px, DIGIT_WORDS[index], fill="black", font=font, anchor="mm")
    buffer = io.BytesIO()
    grid.save(buffer, format="PNG")
    write_data(path, buffer.getvalue())
