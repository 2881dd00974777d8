"""``pipevault compare``: does a seed give the same picture in every process, and what moves it?"""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from pipevault.cli import render
from pipevault.cli.options import dir_option, json_option, model_argument
from pipevault.cli.progress import StepProgress
from pipevault.cli.request_options import opening_options, request_from, request_options, seed_option
from pipevault.errors import SettingsError

if TYPE_CHECKING:
    from pipevault.evidence.compare.result import Comparison, FinishedRun

COLUMNS = (
    *("RUN", "COMPARED WITH", "EQUAL", "PIXELS DIFFERENT", "MAX", "MEAN", "PSNR dB", "SSIM", "LATENTS MAX"),
    *("READY s", "FIRST s", "WARM s"),
)


@click.command("compare", short_help="Show whether a seed gives the same picture again, and what moves it.")
@model_argument
@request_options
@seed_option
@opening_options
@click.option(
    "--runs",
    metavar="NAMES",
    multiple=True,
    help="Of eager, torch.compile, frozen, threads, isa, batch; with commas or the option again. Default: all.",
)
@click.option("--without-torch-compile", is_flag=True, help="Leave out the runs that take minutes.")
@click.option("--timeout", "timeout_s", metavar="SECONDS", type=click.FloatRange(min=1), help="For each process.")
@click.option(
    "--report", metavar="HTML", type=click.Path(path_type=Path), help="Write a page with pictures and heat maps."
)
@dir_option
@json_option
def compare(
    model: str,
    prompts: tuple[str, ...],
    steps: int | None,
    guidance_scale: float | None,
    size: str | None,
    seed: int,
    dtype: str | None,
    device: str | None,
    pipeline_class: str | None,
    runs: tuple[str, ...],
    without_torch_compile: bool,
    timeout_s: float | None,
    report: Path | None,
    dir: Path | None,
    as_json: bool,
) -> None:
    """Generate from one seed in fresh processes, twice each: eager, torch.compile, frozen; and measure how far the
    pictures are apart. Then eager with another thread count, instruction set and batch size.

    MODEL is a folder, a repository id, or `demo` for the pipeline that ships. What the vault lacks is frozen first.
    The exit code is 22 if frozen runs differ from each other. READY is the time from the constructed pipeline to
    one that can be called, FIRST and WARM are the first and the second generation in the process.

    \b
    Examples:
      pipevault compare demo --report compare.html
      pipevault compare demo --without-torch-compile --json
      pipevault compare ./my-model --prompt "a lighthouse at dusk" --seed 7 --size 512x512 --runs eager,frozen
    """
    from pipevault.evidence.compare.run import compare as run_comparison
    from pipevault.evidence.generation_job import GenerationJob

    if report is not None:
        _check_report(report)
    request = request_from(model, prompts=prompts, seed=seed, steps=steps, guidance_scale=guidance_scale, size=size)
    groups = _groups(runs, without_torch_compile)
    with StepProgress() as progress:
        job = GenerationJob(model, request, dtype=dtype, device=device, pipeline_class=pipeline_class, dir=dir)
        comparison = run_comparison(job, groups=groups, timeout_s=timeout_s, progress=progress)
    if report is not None:
        _write_report(comparison, report, _command(click.get_current_context(), seed=request.seed))
    if as_json:
        render.print_json(comparison.to_json())
    else:
        _show(comparison, report)
    comparison.check()


def _groups(runs: Sequence[str], without_torch_compile: bool) -> tuple[str, ...]:
    from pipevault.evidence.compare.run import GROUPS

    names = tuple(name.strip() for value in runs for name in value.split(",")) or GROUPS
    return tuple(name for name in names if not (without_torch_compile and name == "torch.compile"))


def _show(comparison: Comparison, report: Path | None) -> None:
    rows = render.table(COLUMNS, map(_row, comparison.runs), right=COLUMNS[3:])
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
    render.show(rows, render.facts(facts))


def _row(run: FinishedRun) -> tuple[str, ...]:
    name = f"{run.plan.name} ({run.note})" if run.note else run.plan.name
    seconds = tuple(f"{run.result.seconds[step]:.3f}" for step in ("ready", "first", "warm"))
    pixels, latents = run.pixels_distance, run.latents_distance
    if pixels is None:
        return (name, *[""] * 8, *seconds)
    return (
        name,
        run.plan.against or "",
        "yes" if run.equal else "no",
        f"{pixels.differing_share:.2%}",
        f"{pixels.max_abs:g}",
        f"{pixels.mean_abs:.3g}",
        f"{pixels.psnr_db:.1f}",
        "" if pixels.ssim is None else f"{pixels.ssim:.5f}",
        "" if latents is None else f"{latents.max_abs:.2g}",
        *seconds,
    )


def _check_report(path: Path) -> None:
    """Before minutes are spent on generating."""
    from pipevault.report.page import render_page

    if path.is_dir() or not path.absolute().parent.is_dir():
        raise SettingsError(f"The report cannot be written to {path}: give a file in a folder that exists as --report.")
    render_page("base.html.j2", {"title": ""})


def _write_report(comparison: Comparison, path: Path, command: str) -> None:
    from pipevault.evidence.compare.report import comparison_page
    from pipevault.evidence.files import write_data

    try:
        write_data(path, comparison_page(comparison, command=command).encode())
    except OSError as error:
        raise SettingsError(f"The report cannot be written to {path}: {error}. Give another --report.") from error


def _command(context: click.Context, *, seed: int) -> str:
    """What makes this report again: the options that were given, the seed that was used, and the thread count, if one
    was set, because it can change bits.
    """
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
