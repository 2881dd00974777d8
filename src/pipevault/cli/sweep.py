"""``pipevault sweep``: how much the seed moves the quality of what a model draws."""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pipevault.cli import render
from pipevault.cli.options import dir_option, json_option, model_argument
from pipevault.cli.pipelines import DEMO_SHAPE
from pipevault.cli.progress import StepProgress
from pipevault.cli.request_options import opening_options, request_from
from pipevault.cli.seed_ranges import parse_seeds
from pipevault.errors import CannotSaveError, DifferentOutputError, MissingExtraError, SettingsError
from pipevault.opening import DEMO_MODEL, open_pipeline
from pipevault.reading import read_file
from pipevault.settings.user_folders import expand_user

if TYPE_CHECKING:
    from pipevault.evidence.sweep.drift import Drift
    from pipevault.evidence.sweep.result import SweepResult

_REPORT_PACKAGES = {"matplotlib": "matplotlib", "jinja2": "Jinja2", "skimage": "scikit-image"}


@click.command("sweep", short_help="Measure how much the seed moves the quality.")
@model_argument
@click.option("--prompts", "--prompt", "prompts", metavar="TEXT", multiple=True, help="One prompt; again for more.")
@click.option("--prompts-file", metavar="FILE", type=click.Path(path_type=Path), help="A prompt on each line, UTF-8.")
@click.option("--seeds", metavar="SEEDS", default="0..7", show_default=True, help="0..31, 0,5,9 or 0..3,10; up to 256.")
@click.option("--out", metavar="FOLDER", type=click.Path(path_type=Path), default=Path("sweep"), show_default=True)
@click.option("--baseline", metavar="FILE", type=click.Path(path_type=Path), help="The sweep.json of an earlier sweep.")
@click.option("--fail-on-drift", is_flag=True, help="Exit with 22 if a picture is not the baseline's.")
@click.option("--steps", metavar="NUMBER", type=click.IntRange(min=1), help="Denoising steps. Default: the model's.")
@click.option("--guidance-scale", metavar="NUMBER", type=float, help="Default: the model's.")
@click.option("--size", metavar="WxH", help="Pixels. Default: the model's own size.")
@click.option("--frames", metavar="NUMBER", type=click.IntRange(min=1), help="Frames of a video; the middle is scored.")
@click.option(
    "--batch-size", metavar="NUMBER", type=click.IntRange(min=1), help="Pictures in a call. Default: 1; demo 10."
)
@click.option("--clip-model", metavar="FOLDER", help="A CLIP model of this machine, for the CLIP score.")
@opening_options
@click.option("--mode", metavar="NAME", help="compile, require or off. Default: PIPEVAULT_MODE, config file, compile.")
@click.option("--level", metavar="NAME", help="Determinism. Default: PIPEVAULT_LEVEL, config file, repeatable.")
@dir_option
@json_option
def sweep(
    model: str,
    prompts: tuple[str, ...],
    prompts_file: Path | None,
    seeds: str,
    out: Path,
    baseline: Path | None,
    fail_on_drift: bool,
    steps: int | None,
    guidance_scale: float | None,
    size: str | None,
    frames: int | None,
    batch_size: int | None,
    clip_model: str | None,
    dtype: str | None,
    device: str | None,
    pipeline_class: str | None,
    mode: str | None,
    level: str | None,
    dir: Path | None,
    as_json: bool,
) -> None:
    """Draw every prompt with every seed, score the pictures, and tell prompt, seed and their interplay apart.

    MODEL is a folder, a repository id, or `demo` for the pipeline that ships, whose prompts are by default the ten
    digits. The picture of a prompt and a seed is that of pipe(prompt, seed=SEED). --out gets report.html, which needs
    no other file, contact-sheet.png, plots/*.svg and sweep.json, which a later sweep takes as --baseline. The level
    off gives no record and makes no promise for the pictures.

    \b
    Examples:
      pipevault sweep demo
      pipevault sweep ./my-model --prompts "a red fox" --prompts "a lighthouse at dusk" --seeds 0..31
      pipevault sweep ./my-model --prompts-file prompts.txt --seeds 0..3,10 --clip-model ./clip
      pipevault sweep demo --baseline sweep/sweep.json --fail-on-drift --out again --json
    """
    from pipevault import PipelineCache
    from pipevault.evidence.sweep.drift import check_baseline, drift
    from pipevault.evidence.sweep.result import read_sweep
    from pipevault.evidence.sweep.run import MAX_SEEDS, check_count, check_prompts, run_sweep, sweep_load_arguments

    columns = parse_seeds(seeds, most=MAX_SEEDS)
    request = request_from(
        model,
        prompts=_prompts(prompts, prompts_file),
        seed=0,
        steps=steps,
        guidance_scale=guidance_scale,
        size=size,
    )
    request, rows = replace(request, num_frames=frames), request.prompts
    if fail_on_drift and baseline is None:
        raise SettingsError("--fail-on-drift needs the earlier sweep: give --baseline.")
    label = model_label(model)
    earlier = None if baseline is None else read_sweep(baseline)
    if earlier is not None:
        check_baseline(earlier, label)
    check_count(len(rows), len(columns))
    _check_extra()
    _check_writable(out)
    clip = _clip(clip_model)
    batch = batch_size or (DEMO_SHAPE["batch_size"] if model == DEMO_MODEL else 1)
    with StepProgress() as progress:
        cache = PipelineCache(dir, mode=mode, level=level, progress=progress)
        pipe = open_pipeline(model, dtype=dtype, device=device, pipeline_class=pipeline_class)
        check_prompts(pipe, rows)
        pipe = cache.load(pipe, **sweep_load_arguments(pipe, rows, request, batch))
        done = run_sweep(pipe, rows, columns, request, model=label, batch_size=batch, clip=clip, progress=progress)
    moved = None if earlier is None else drift(done.result, earlier)
    files = _write(out, done, moved)
    if as_json:
        render.print_json(
            {
                "sweep": done.result.to_document(),
                "drift": None if moved is None else moved.to_json(),
                "files": {name: str(path) for name, path in files.items()},
            }
        )
    else:
        _show(done.result, moved, files["report"])
    if fail_on_drift and moved is not None and moved.drifted:
        raise DifferentOutputError(
            f"{len(moved.changed)} of {moved.compared} pictures are not those of {baseline}. See {files['report']}."
        )


def model_label(model: str) -> str:
    """How a sweep names its model: as it was typed, a folder by its last name, so that it can be moved."""
    folder = expand_user(model)
    return f"{folder.resolve().name}/" if model != DEMO_MODEL and folder.is_dir() else model


def _prompts(given: tuple[str, ...], file: Path | None) -> tuple[str, ...]:
    if given and file is not None:
        raise SettingsError("Give --prompts or --prompts-file, not both.")
    return given if file is None else _read_prompts(file)


def _read_prompts(file: Path) -> tuple[str, ...]:
    try:
        lines = read_file(file).decode("utf-8-sig").splitlines()
    except OSError as error:
        raise SettingsError(f"--prompts-file {file} cannot be read: {error.strerror or error}.") from error
    except UnicodeDecodeError as error:
        raise SettingsError(f"--prompts-file {file} is no UTF-8 text: {error}.") from error
    prompts = tuple(line.strip() for line in lines if line.strip())
    if not prompts:
        raise SettingsError(f"--prompts-file {file} has no prompt in it. Write one on each line.")
    return prompts


def _clip(model: str | None) -> Any:
    if model is None:
        return None
    from pipevault.evidence.sweep.model_scores import clip_scorer

    return clip_scorer(model)


def _check_extra() -> None:
    """Before minutes are spent on compiling."""
    if absent := [name for module, name in _REPORT_PACKAGES.items() if find_spec(module) is None]:
        raise MissingExtraError(
            f'A sweep\'s report needs {", ".join(absent)}, not installed here. Install the extra "report": pip install '
            '"pipevault[report]".',
            "report",
        )


def _check_writable(out: Path) -> None:
    try:
        (out / "plots").mkdir(parents=True, exist_ok=True)
        probe = out / ".sweep-probe"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise CannotSaveError(
            f"{out} cannot be written: {error.strerror or error}. Give another --out.", out
        ) from error


def _write(out: Path, done: Any, moved: Drift | None) -> dict[str, Path]:
    from pipevault.cli.sweep_report import SweepReport

    report = SweepReport(done, moved)
    files = {
        "sweep": (out / "sweep.json", f"{done.result.to_json()}\n".encode()),
        "contact_sheet": (out / "contact-sheet.png", report.contact_sheet_png()),
        **{f"plot {name}": (out / "plots" / f"{name}.svg", svg.encode()) for name, svg in report.plots.items()},
        "report": (out / "report.html", report.page().encode()),
    }
    for path, data in files.values():
        try:
            path.write_bytes(data)
        except OSError as error:
            raise CannotSaveError(f"{path} cannot be written: {error.strerror or error}.", path) from error
    return {name: path for name, (path, _) in files.items()}


def _show(result: SweepResult, moved: Drift | None, report: Path) -> None:
    from pipevault.cli.sweep_report import drift_lists, drift_summary, percent, score_title

    facts = [
        ("model", result.model),
        ("pictures", f"{len(result.prompts)} prompts by {len(result.seeds)} seeds"),
        ("outcome", result.outcome),
        ("key", result.key or "none"),
        ("level", result.level["achieved"]),
        ("outlier seeds", ", ".join(map(str, result.outlier_seeds())) or "none"),
        ("report", str(report)),
    ]
    effects, shares = result.seed_effects(), result.variance_shares()
    rows = []
    for name, table in result.scores.items():
        values = [value for row in table for value in row]
        share = shares[name]
        parts = ("constant", "", "") if share.constant else map(percent, (share.prompt, share.seed, share.remainder))
        flagged = ", ".join(str(result.seeds[column]) for column in effects[name].outliers)
        rows.append((score_title(name), *parts, f"{sum(values) / len(values):.4g}", flagged))
    rows += [(score_title(name), "", "", "", "", f"not available: {why}") for name, why in result.not_available.items()]
    columns = ("SCORE", "PROMPT", "SEED", "REMAINDER", "MEAN", "OUTLIER SEEDS")
    render.show(render.facts(facts), render.table(columns, rows, right=columns[1:5]))
    if moved is not None:
        render.say(f"\n{drift_summary(moved)}")
        shifts = [
            (
                score_title(name),
                f"{shift.mean:+.4g}",
                "" if shift.standard_error is None else f"{shift.standard_error:.4g}",
                f"{shift.p_value:.4g}",
            )
            for name, shift in moved.shifts.items()
        ]
        names = ("SCORE", "MEAN SHIFT", "STANDARD ERROR", "P")
        render.show(render.table(names, shifts, right=names[1:]))
        for title, entries in drift_lists(moved):
            render.say(f"{title}: {'; '.join(entries)}")
