"""``pipevault bench``: how soon a pipeline is ready, and how fast it runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pipevault.cli import options, render
from pipevault.cli.exits import Exit
from pipevault.cli.pipelines import request_from
from pipevault.cli.progress import StepProgress

if TYPE_CHECKING:
    from pipevault.evidence.bench import Bench

COLUMNS = ("WAY", "MISS s", "READY s", "FIRST s", "WARM s", "READY+FIRST s", "WARM/EAGER", "PEAK")


@options.command("bench", short_help="Measure how soon a model is ready and how fast it runs.")
@options.model_argument
@options.request_options
@options.opening_options
@click.option("--ways", metavar="NAMES", multiple=True, help="With commas or the option again. Default: all.")
@click.option("--runs", metavar="NUMBER", type=click.IntRange(min=1), default=3, help="Fresh processes. Default: 3.")
@click.option("--calls", metavar="NUMBER", type=click.IntRange(min=2), default=2, help="In each process. Default: 2.")
@options.jobs_option
@options.timeout_option
@click.option("--plot", metavar="SVG", type=options.OutputFile(), help="Write bars. Needs the extra `report`.")
@options.json_option
def bench(model: str, ways: tuple[str, ...], plot: Path | None, as_json: bool, **asked: Any) -> None:
    """Run MODEL in fresh processes: eager, torch.compile whole and by blocks; frozen whole, by blocks and as a range.

    MODEL is a folder, a repository id, or `demo` for the pipeline that ships. MISS is the time from the constructed
    pipeline to the end of its first call with nothing on disk; the other columns are medians of later processes.
    FIRST and WARM are the first and the second call in a process. Nothing of it touches your vault.

    \b
    Examples:
      pipevault bench demo
      pipevault bench demo --ways eager,whole,blocks --runs 5 --json
      pipevault bench ./my-model --prompt "a lighthouse" --steps 10 --size 512x512 --plot bench.svg
    """
    from pipevault.evidence.bench import ALL_WAYS
    from pipevault.evidence.bench import bench as run_bench
    from pipevault.evidence.files import write_data
    from pipevault.evidence.generation_job import GenerationJob

    opening, how = options.take(asked, *options.OPENING, "jobs"), options.take(asked, "runs", "timeout_s")
    calls = asked.pop("calls")
    job = GenerationJob(model, request_from(model, **asked), **opening, generations=calls)
    with StepProgress() as progress:
        result = run_bench(job, ways=options.names_in(ways) or ALL_WAYS, progress=progress, **how)
    if plot is not None:
        from pipevault.report.plots import time_bars

        bars = time_bars({one.name: (one.miss_s, one.hit_s) for one in result.measured})
        write_data(plot, bars.encode())
    if as_json:
        render.print_json({**result.to_json(), "code": "skipped" if result.skipped else None})
    else:
        render.show(render.table(COLUMNS, rows(result), right=COLUMNS[1:]), render.facts(notes(result)))
    click.get_current_context().exit(Exit.NOT_NOW if result.skipped else Exit.DONE)


def rows(result: Bench) -> Sequence[tuple[str, ...]]:
    eager = next((one.seconds["warm"] for one in result.measured if one.name == "eager"), None)
    return [
        (
            one.name,
            f"{one.miss_s:.1f}",
            f"{one.seconds['ready']:.2f}",
            f"{one.seconds['first']:.2f}",
            f"{one.seconds['warm']:.2f}",
            f"{one.hit_s:.2f}",
            "" if eager is None else f"{one.seconds['warm'] / eager:.2f}",
            render.size_text(one.peak_bytes),
        )
        for one in result.measured
    ]


def notes(result: Bench) -> Sequence[tuple[str, str]]:
    """Return what the table does not show: what is not frozen in a way, and which way failed."""
    eager = [(f"{one.name}, left eager", one.left_eager) for one in result.measured if one.left_eager]
    return [*eager, *((f"skipped {name}", reason) for name, reason in result.skipped)]
