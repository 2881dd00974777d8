#!/usr/bin/env python3
"""Freeze a pipeline for one or more sizes without an application.

Run: ``python scripts/prewarm.py MODEL --size 512x512 --size 768x512 --dtype bfloat16``.
"""

from __future__ import annotations

from pathlib import Path

import click

from pipevault import PipelineCache, outcome
from pipevault.cli import render
from pipevault.cli.app import ReportingCommand
from pipevault.cli.options import call_options, dir_option, json_option, model_argument
from pipevault.cli.pipelines import open_pipeline, shapes_of
from pipevault.cli.progress import StepProgress
from pipevault.manager.outcome import Outcome


@click.command(cls=ReportingCommand, context_settings={"help_option_names": ["-h", "--help"]})
@model_argument
@click.option(
    "--size", "sizes", metavar="WxH", multiple=True, help="Pixels, any number of times. Default: the model's."
)
@call_options
@click.option("--pipeline-class", metavar="NAME", help="A class of diffusers in place of the model's.")
@dir_option
@json_option
def prewarm(
    model: str,
    sizes: tuple[str, ...],
    dtype: str | None,
    device: str | None,
    batch_size: int | None,
    frames: int | None,
    guidance: bool | None,
    pipeline_class: str | None,
    dir: Path | None,
    as_json: bool,
) -> None:
    """Freeze MODEL for each size; what is frozen already is loaded and left as it is.

    MODEL is a folder, a repository id, or `demo` for the pipeline that ships.

    \b
    Examples:
      scripts/prewarm.py demo
      scripts/prewarm.py ./my-model --size 512x512 --size 768x512 --dtype bfloat16
      scripts/prewarm.py ./my-model --size 1024x1024 --batch-size 4 --no-guidance --json

    Exit codes are those of `pipevault`; 1 also if an entry could not be stored.
    """
    shapes = shapes_of(model, sizes, batch_size=batch_size, num_frames=frames, guidance=guidance)
    pipe = open_pipeline(model, dtype=dtype, device=device, pipeline_class=pipeline_class)
    with StepProgress() as progress:
        pipe = PipelineCache(dir, mode="compile", progress=progress).load(pipe, shapes=shapes)
    report = outcome(pipe)
    if as_json:
        render.print_json(report.to_json())
    else:
        rows = [row(entry) for entry in report.entries or (report,)]
        render.console().print(render.table(("KEY", "OUTCOME", "FROZEN", "STORED", "SECONDS", "REASON"), rows))
    if not report.stored:
        click.get_current_context().exit(1)


def row(entry: Outcome) -> tuple[str, ...]:
    frozen = [name for name, part in entry.parts.items() if part.status == "frozen"]
    return (
        "none" if entry.key is None else entry.key.short,
        entry.status,
        ", ".join(frozen) or "none",
        "yes" if entry.stored else "no",
        f"{sum(entry.seconds.values()):.1f}",
        entry.reason,
    )


if __name__ == "__main__":
    prewarm()
