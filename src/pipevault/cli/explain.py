"""``pipevault explain``: what a load of a pipeline would do, and why."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click

from pipevault.cli import render
from pipevault.cli.options import call_options, dir_option, json_option, model_argument
from pipevault.cli.pipelines import open_pipeline, shapes_of


@click.command("explain", short_help="Say what a load would do, and why.")
@model_argument
@click.option("--size", metavar="WxH", help="Pixels. Default: the pipeline's own size.")
@call_options
@dir_option
@json_option
def explain(
    model: str,
    size: str | None,
    dtype: str | None,
    device: str | None,
    batch_size: int | None,
    frames: int | None,
    guidance: bool | None,
    dir: Path | None,
    as_json: bool,
) -> None:
    """Say what a load of MODEL would do and, on a miss, which factors differ from the nearest entry.

    MODEL is a folder, a repository id, or `demo` for the pipeline that ships.

    \b
    Examples:
      pipevault explain demo
      pipevault explain ./my-model --size 768x512 --dtype bfloat16
      pipevault explain demo --json
    """
    from pipevault import PipelineCache

    sizes = [] if size is None else [size]
    [shape] = shapes_of(model, sizes, batch_size=batch_size, num_frames=frames, guidance=guidance)
    pipe = open_pipeline(model, dtype=dtype, device=device)
    cache = PipelineCache(dir)
    explanation = cache.explain(pipe, **shape)
    if as_json:
        render.print_json(
            {
                "status": explanation.status,
                "reason": explanation.reason,
                "key": explanation.key.digest.hex,
                "vault": str(cache.vault.root),
                "nearest": None if explanation.nearest is None else explanation.nearest.hex,
                "differences": [asdict(difference) for difference in explanation.differences],
            }
        )
        return
    nearest = [] if explanation.nearest is None else [("nearest entry", explanation.nearest.short)]
    console = render.console()
    console.print(
        render.facts(
            [
                ("status", explanation.status),
                ("reason", explanation.reason),
                ("key", explanation.key.digest.hex),
                ("vault", str(cache.vault.root)),
                *nearest,
            ]
        )
    )
    if explanation.differences:
        console.print()
        rows = [
            (difference.factor, render.value_text(difference.ours), render.value_text(difference.theirs))
            for difference in explanation.differences
        ]
        console.print(render.table(("FACTOR", "HERE", "IN THE VAULT"), rows))
