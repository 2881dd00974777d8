"""``pipevault compare``: does a seed give the same picture in every process, and what moves it?"""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pipevault.cli import exits, options, render
from pipevault.cli.pipelines import request_from
from pipevault.cli.progress import StepProgress
from pipevault.errors import DifferentOutputError

if TYPE_CHECKING:
    from pipevault.evidence.compare.run import Comparison, FinishedRun
    from pipevault.evidence.metrics import Distance

DISTANCES = ("RUN", "WITH", "EQUAL", "PIXELS", "MAX", "MEAN", "PSNR", "SSIM", "LATENTS")
SECONDS = ("RUN", "READY s", "FIRST s", "WARM s")


@options.command("compare", short_help="Show whether a seed gives the same picture again, and what moves it.")
@options.model_argument
@options.request_options
@options.opening_options
@click.option(
    "--runs",
    metavar="NAMES",
    multiple=True,
    help="Of eager, torch.compile, frozen, threads, isa, batch; with commas or the option again. Default: all.",
)
@click.option("--without-torch-compile", is_flag=True, help="Leave out the runs that compile each time.")
@options.timeout_option
@click.option("--report", metavar="HTML", type=options.OutputFile(), help="Write a page with pictures and heat maps.")
@options.vault_options
def compare(model: str, runs: tuple[str, ...], report: Path | None, as_json: bool, **asked: Any) -> None:
    """Generate from one seed in fresh processes, twice each: eager, torch.compile, frozen; and measure how far the
    pictures are apart. Then eager with another thread count, instruction set and batch size.

    MODEL is a folder, a repository id, or `demo` for the pipeline that ships. What the vault lacks is frozen first.
    The exit code is 1 if frozen runs differ from each other. PIXELS is the share of
    them that differ, PSNR is in dB. READY is the time from the constructed pipeline to one that can be called, FIRST
    and WARM are the first and the second generation in the process.

    \b
    Examples:
      pipevault compare demo --report compare.html
      pipevault compare demo --without-torch-compile --json
      pipevault compare ./my-model --prompt "a lighthouse at dusk" --seed 7 --size 512x512 --runs eager,frozen
    """
    from pipevault.evidence.compare.report import comparison_page
    from pipevault.evidence.compare.run import GROUPS
    from pipevault.evidence.compare.run import compare as run_comparison
    from pipevault.evidence.files import write_data
    from pipevault.evidence.generation_job import GenerationJob
    from pipevault.report.page import render_page

    if report is not None:
        render_page("base.html.j2", {"title": ""})  # what the extra lacks is said before anything is generated
    opening, timeout_s = options.take(asked, *options.OPENING, "dir"), asked.pop("timeout_s")
    without = {"torch.compile"} if asked.pop("without_torch_compile") else set()
    groups = tuple(name for name in options.names_in(runs) or GROUPS if name not in without)
    request = request_from(model, **asked)
    with StepProgress() as progress:
        job = GenerationJob(model, request, **opening)
        comparison = run_comparison(job, groups=groups, timeout_s=timeout_s, progress=progress)
    if report is not None:
        command = _command(click.get_current_context(), seed=request.seed)
        write_data(report, comparison_page(comparison, command=command).encode())
    if as_json:
        word = exits.KINDS[DifferentOutputError][1] if comparison.broken_promises else None
        render.print_json({**comparison.to_json(), "code": word})
    else:
        _show(comparison, report)
    comparison.check()


def _show(comparison: Comparison, report: Path | None) -> None:
    verdict = {
        None: "not run",
        True: "equal in every process and generation",
        False: "; ".join(comparison.broken_promises),
    }[comparison.frozen_equal]
    facts = [("frozen", verdict), *((f"skipped {name}", reason) for name, reason in comparison.skipped)]
    if comparison.prewarm is not None:
        facts.append(("prewarm", f"{comparison.prewarm.outcome} in {comparison.prewarm.seconds['ready']:.1f} s"))
    if report is not None:
        facts.append(("report", str(report)))
    distances = [_distances(run, run.pixels_distance) for run in comparison.runs if run.pixels_distance is not None]
    render.show(
        render.table(DISTANCES, distances, right=DISTANCES[3:]),
        render.table(SECONDS, map(_seconds, comparison.runs), right=SECONDS[1:]),
        render.facts(facts),
    )


def _distances(run: FinishedRun, pixels: Distance) -> tuple[str, ...]:
    latents = run.latents_distance
    return (
        run.plan.name,
        run.plan.against or "",
        "yes" if run.equal else "no",
        f"{pixels.differing_share:.2%}",
        f"{pixels.max_abs:g}",
        f"{pixels.mean_abs:.2g}",
        f"{pixels.psnr_db:.1f}",
        "" if pixels.ssim is None else f"{pixels.ssim:.4f}",
        "" if latents is None else f"{latents.max_abs:.2g}",
    )


def _seconds(run: FinishedRun) -> tuple[str, ...]:
    name = f"{run.plan.name} ({run.note})" if run.note else run.plan.name
    return (name, *(f"{run.result.seconds[step]:.3f}" for step in ("ready", "first", "warm")))


def _command(context: click.Context, *, seed: int) -> str:
    """Return the command that makes this report again; the thread count can change bits."""
    words = ["pipevault", "compare"]
    values = {**context.params, "seed": seed}
    for parameter in context.command.params:
        value = values[parameter.name or ""]
        if isinstance(parameter, click.Argument):
            words.append(str(value))
        elif value is True:
            words.append(parameter.opts[0])
        elif value is not None and value is not False:
            for item in value if isinstance(value, tuple) else [value]:
                words += [parameter.opts[0], str(item)]
    threads = os.environ.get("OMP_NUM_THREADS")
    return (f"OMP_NUM_THREADS={shlex.quote(threads)} " if threads else "") + shlex.join(words)
