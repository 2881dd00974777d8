"""``pipevault golden``: record what a model draws, and hold it to that from then on."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pipevault.cli import exits, render
from pipevault.cli.options import Group, mode_option, path_option, take, together, vault_options
from pipevault.cli.progress import StepProgress
from pipevault.errors import PipevaultError

if TYPE_CHECKING:
    from pipevault.evidence.golden.check import Passed
    from pipevault.evidence.golden.files import Golden
    from pipevault.evidence.metrics import Distance

_suite_options = together(
    click.argument("suite", metavar="SUITE", type=click.Path(path_type=Path)),
    click.option("--case", "names", metavar="NAME", multiple=True, help="Only this case; any number of times."),
)
_run_options = together(mode_option("compile", "require"), vault_options)


@click.group("golden", cls=Group, short_help="Record what a model draws, and check it against that.")
def golden() -> None:
    """Fixed-seed regression tests: record what the cases of a suite draw, and check it byte for byte from then on.

    A suite is a TOML file with a model and its cases; the goldens stand next to it in `<suite>.goldens`, a folder for
    each machine type (processor and threads, or GPU), and belong into version control.

    \b
    Examples:
      pipevault golden record digits.toml
      pipevault golden check digits.toml
    """


@golden.command("record", short_help="Record the goldens of a suite.")
@_suite_options
@click.option("--overwrite", is_flag=True, help="Replace what was recorded already.")
@click.option(
    "--measure-tolerance",
    is_flag=True,
    help="Also measure in fresh processes how far outputs move without frozen graphs, with other threads and kernels.",
)
@_run_options
def record(suite: Path, measure_tolerance: bool, as_json: bool, **asked: Any) -> None:
    """Draw the cases of SUITE with frozen graphs and keep the pictures, latents and run records as goldens.

    With --measure-tolerance a golden also says how far other machines may be from it (`check --other-machine`): twice
    the largest distance that was measured here between the frozen graphs and eager code, with this number of threads
    and another, and with the kernels of a smaller instruction set.

    \b
    Examples:
      pipevault golden record digits.toml
      pipevault golden record digits.toml --case seven --overwrite
      pipevault golden record digits.toml --measure-tolerance
    """
    from pipevault.evidence.golden.run import SuiteRunner, record_suite
    from pipevault.evidence.golden.suite_file import read_suite

    with StepProgress() as progress:
        runner = SuiteRunner(read_suite(suite), **take(asked, "dir", "mode"), progress=progress)
        recorded = list(record_suite(runner, measure=measure_tolerance, **asked))
    if as_json:
        render.print_json({"suite": suite, "goldens": [_golden_document(one) for one in recorded]})
        return
    columns = ("CASE", "MACHINE TYPE", "KEY", "SAMPLES", "TOLERANCE", "GOLDEN")
    render.show(render.table(columns, map(_golden_row, recorded), right=("SAMPLES",)))


@golden.command("check", short_help="Check a model against the goldens of a suite.")
@_suite_options
@path_option(
    "--out",
    metavar="FOLDER",
    help="Where the pictures of failed checks go. Default: `<suite>.failures` next to the suite.",
)
@click.option(
    "--other-machine",
    is_flag=True,
    help="With no golden of this machine type, compare with another's within its tolerance.",
)
@click.option(
    "--other-key", is_flag=True, help="With a golden of another key (other versions), compare within its tolerance."
)
@_run_options
def check(suite: Path, as_json: bool, **asked: Any) -> None:
    """Draw the cases of SUITE again and compare: for the same key every byte of every pixel must be equal.

    Of a case that differs, expected.png, actual.png and difference.png are left in a folder. A case that fails does
    not stop the others; the exit code is that of the first failure.

    \b
    Examples:
      pipevault golden check digits.toml
      pipevault golden check digits.toml --case seven --out /tmp/failures
      pipevault golden check digits.toml --other-machine --json
    """
    from pipevault.evidence.golden.run import SuiteRunner, check_suite
    from pipevault.evidence.golden.suite_file import read_suite

    with StepProgress() as progress:
        runner = SuiteRunner(read_suite(suite), **take(asked, "dir", "mode"), progress=progress)
        checked = list(check_suite(runner, **asked))
    errors = [result for _, result in checked if isinstance(result, PipevaultError)]
    code, word = exits.first_of(map(exits.kind_of, errors))
    if as_json:
        cases = [{"case": case, **_checked_document(result)} for case, result in checked]
        render.print_json({"suite": suite, "code": word, "cases": cases})
    else:
        columns = ("CASE", "RESULT", "PIXELS", "LATENTS", "NOTES")
        render.show(render.table(columns, [(case, *_checked_cells(result)) for case, result in checked]))
    for error in errors:
        exits.report(error)
    click.get_current_context().exit(code)


def _golden_document(golden: Golden) -> dict[str, Any]:
    return {
        "case": golden.case,
        "machine_type": golden.machine_type,
        "golden": golden.path,
        "key": golden.record.key,
        "results": golden.record.results,
        "tolerance": golden.tolerance.to_json() if golden.tolerance else None,
    }


def _golden_row(golden: Golden) -> tuple[str, ...]:
    limits = golden.tolerance.limits.to_json() if golden.tolerance else {}
    return (
        golden.case,
        golden.machine_type,
        (golden.record.key or "none")[:12],
        str(len(golden.drawn.samples)),
        ", ".join(f"{name} {value:.3g}" for name, value in limits.items()) or "none",
        str(golden.path),
    )


def _checked_document(result: Passed | PipevaultError) -> dict[str, Any]:
    if isinstance(result, PipevaultError):
        return {"result": "failed", **exits.error_document(result)}
    return {
        "result": result.status,
        "golden": result.golden,
        "differences": result.differences,
        "pixels": result.pixels.to_json() if result.pixels else None,
        "latents": result.latents.to_json() if result.latents else None,
    }


def _checked_cells(result: Passed | PipevaultError) -> tuple[str, ...]:
    if isinstance(result, PipevaultError):
        return ("failed", "", "", exits.kind_of(result)[1])
    distances = (_distance_text(result.pixels), _distance_text(result.latents))
    return (result.status, *distances, "; ".join(result.differences))


def _distance_text(distance: Distance | None) -> str:
    return "" if distance is None else f"max {distance.max_abs:.3g}, mean {distance.mean_abs:.3g}"
