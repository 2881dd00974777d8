"""``pipevault sweep``: how much the seed moves the quality of what a model draws."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pipevault.cli import render
from pipevault.cli.options import OPENING, command, model_argument, opening_options, take, vault_options
from pipevault.cli.pipelines import DEMO_SHAPE, parse_seeds, request_from
from pipevault.cli.progress import StepProgress
from pipevault.compat.extras import import_extra
from pipevault.errors import CannotSaveError, DifferentOutputError, SettingsError
from pipevault.opening import DEMO_MODEL, open_pipeline
from pipevault.reading import read_file
from pipevault.settings.user_folders import expand_user

if TYPE_CHECKING:
    from pipevault.evidence.sweep.drift import Drift
    from pipevault.evidence.sweep.result import SweepResult
    from pipevault.evidence.sweep.run import Sweep

_REPORT_PACKAGES = {"matplotlib": "matplotlib", "jinja2": "Jinja2", "skimage": "scikit-image", "scipy": "SciPy"}


@command("sweep", short_help="Measure how much the seed moves the quality.")
@model_argument
@click.option("--prompts", "--prompt", "prompts", metavar="TEXT", multiple=True, help="One prompt; again for more.")
@click.option("--prompts-file", metavar="FILE", type=click.Path(path_type=Path), help="A prompt on each line, UTF-8.")
@click.option("--seeds", metavar="SEEDS", default="0..7", show_default=True, help="0..31, 0,5,9 or 0..3,10; up to 256.")
@click.option("--out", metavar="FOLDER", type=click.Path(path_type=Path), default=Path("sweep"), show_default=True)
@click.option("--baseline", metavar="FILE", type=click.Path(path_type=Path), help="The sweep.json of an earlier sweep.")
@click.option("--fail-on-drift", is_flag=True, help="Exit with 1 if a picture is not the baseline's.")
@click.option("--steps", metavar="NUMBER", type=click.IntRange(min=1), help="Denoising steps. Default: the model's.")
@click.option("--guidance-scale", metavar="NUMBER", type=float, help="Default: the model's.")
@click.option("--size", metavar="WxH", help="Pixels. Default: the model's own size.")
@click.option("--frames", metavar="NUMBER", type=click.IntRange(min=1), help="Frames of a video; the middle is scored.")
@click.option("--batch-size", metavar="NUMBER", type=click.IntRange(min=1), help="In a call. Default: 1; demo 10.")
@click.option("--clip-model", metavar="FOLDER", help="A CLIP model of this machine, for the CLIP score.")
@opening_options
@click.option("--mode", metavar="NAME", help="compile, require or off. Default: the setting, compile.")
@click.option("--level", metavar="NAME", help="Determinism. Default: the setting, repeatable.")
@vault_options
def sweep(model: str, out: Path, baseline: Path | None, fail_on_drift: bool, as_json: bool, **given: Any) -> None:
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
    from pipevault.evidence.quality import clip_scorer
    from pipevault.evidence.sweep.drift import check_baseline, drift
    from pipevault.evidence.sweep.result import read_sweep
    from pipevault.evidence.sweep.run import MAX_SEEDS, check_seeds, run_sweep, sweep_load_arguments

    seeds = parse_seeds(given["seeds"], most=MAX_SEEDS)
    prompts = _prompts(given["prompts"], given["prompts_file"])
    asked = take(given, "steps", "guidance_scale", "size")
    request = request_from(model, prompts=prompts, seed=0, num_frames=given["frames"], **asked)
    if fail_on_drift and baseline is None:
        raise SettingsError("--fail-on-drift needs the earlier sweep: give --baseline.")
    label, earlier = model_label(model), None if baseline is None else read_sweep(baseline)
    if earlier is not None:
        check_baseline(earlier, label)
    check_seeds(seeds, prompts=len(request.prompts))
    for module, package in _REPORT_PACKAGES.items():  # before minutes are spent on compiling
        import_extra(module, f"{package}, which a sweep needs,", "report")
    _write(out, {"a try": ("plots/.try", b"")})["a try"].unlink()
    clip = None if given["clip_model"] is None else clip_scorer(given["clip_model"])
    size = given["batch_size"] or (DEMO_SHAPE["batch_size"] if model == DEMO_MODEL else 1)
    with StepProgress() as progress:
        cache = PipelineCache(**take(given, "dir", "mode", "level"), progress=progress)
        pipe = open_pipeline(model, **take(given, *OPENING))
        pipe = cache.load(pipe, **sweep_load_arguments(pipe, request.prompts, request, size))
        options: dict[str, Any] = {"model": label, "batch_size": size, "clip": clip, "progress": progress}
        done = run_sweep(pipe, request.prompts, seeds, request, **options)
    moved = None if earlier is None else drift(done.result, earlier)
    files = _write(out, _report_files(done, moved))
    if as_json:
        render.print_json({"sweep": done.result.to_document(), "drift": moved and moved.to_json(), "files": files})
    else:
        _show(done.result, moved, files["report"])
    if fail_on_drift and moved is not None and moved.changed:
        raise DifferentOutputError(
            f"{len(moved.changed)} of {moved.compared} pictures are not those of {baseline}. See {files['report']}."
        )


def model_label(model: str) -> str:
    """Return how a sweep names its model: as it was typed, a folder by its last name, so that it can be moved."""
    folder = expand_user(model)
    return f"{folder.resolve().name}/" if model != DEMO_MODEL and folder.is_dir() else model


def _prompts(given: tuple[str, ...], file: Path | None) -> tuple[str, ...]:
    if file is None:
        return given
    if given:
        raise SettingsError("Give --prompts or --prompts-file, not both.")
    try:
        lines = read_file(file).decode("utf-8-sig").splitlines()
    except FileNotFoundError as error:
        raise SettingsError(f"--prompts-file {file} does not exist. Give a file with a prompt on each line.") from error
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"--prompts-file {file} cannot be read as UTF-8 text: {error}.") from error
    prompts = tuple(line.strip() for line in lines if line.strip())
    if not prompts:
        raise SettingsError(f"--prompts-file {file} has no prompt in it. Write one on each line.")
    return prompts


def _write(out: Path, files: Mapping[str, tuple[str, bytes]]) -> dict[str, Path]:
    from pipevault.evidence.files import write_data

    try:
        (out / "plots").mkdir(parents=True, exist_ok=True)
        return {name: write_data(out / path, data) for name, (path, data) in files.items()}
    except OSError as error:
        raise CannotSaveError(f"{out} cannot be written: {error}. Give another --out.", out) from error


def _show(result: SweepResult, moved: Drift | None, report: Path) -> None:
    from pipevault.evidence.quality import SCORES

    prompts, seeds = render.count_text(len(result.prompts), "prompt"), render.count_text(len(result.seeds), "seed")
    facts = {
        "model": result.model,
        "pictures": f"{prompts} by {seeds}",
        "outcome": result.outcome,
        "key": result.key or "none",
        "level": result.level["achieved"],
        "outlier seeds": ", ".join(map(str, result.outlier_seeds())) or "none",
        "report": str(report),
    }
    rows, effects = [], result.seed_effects()
    for name, one in result.variance_shares().items():
        shares = tuple(map(_percent, vars(one).values())) if any(vars(one).values()) else ("constant", "", "")
        mean = sum(map(sum, result.scores[name])) / len(result.prompts) / len(result.seeds)
        flagged = ", ".join(str(result.seeds[column]) for column in effects[name].outliers)
        rows.append((SCORES[name].title, *shares, f"{mean:.4g}", flagged))
    rows += [(SCORES[name].title, *[""] * 4, f"not available: {why}") for name, why in result.not_available.items()]
    columns = ("SCORE", "PROMPT", "SEED", "REMAINDER", "MEAN", "OUTLIER SEEDS")
    render.show(render.facts(facts.items()), render.table(columns, rows, right=columns[1:5]))
    if moved is not None:
        render.say(f"\n{moved.summary}")
        values = {SCORES[name].title: (one.mean, one.standard_error, one.p_value) for name, one in moved.shifts.items()}
        shifts = [(title, *("" if n is None else f"{n:.4g}" for n in numbers)) for title, numbers in values.items()]
        named = ("SCORE", "MEAN SHIFT", "STANDARD ERROR", "P")
        render.show(render.table(named, shifts, right=named[1:]))
        for entry in moved.context:
            render.say(entry)


def _report_files(sweep: Sweep, drift: Drift | None) -> Mapping[str, tuple[str, bytes]]:
    """Return the files of a sweep by what they are: their paths in a folder and their contents."""
    import numpy as np

    from pipevault.evidence.quality import SCORES
    from pipevault.report.contact_sheet import contact_sheet
    from pipevault.report.page import png_bytes, render_page
    from pipevault.report.plots import prompt_labels, share_bars, strip_plot

    result, shares, effects = sweep.result, sweep.result.variance_shares(), sweep.result.seed_effects()
    outliers = result.outlier_seeds()
    sheet = contact_sheet(sweep.thumbnails, result.prompts, result.seeds, outliers=outliers)
    plots = {"shares": share_bars({SCORES[name].title: asdict(one) for name, one in shares.items()})}
    for name, table in result.scores.items():
        flagged = [result.seeds[column] for column in effects[name].outliers]
        labels = {"title": SCORES[name].title, "unit": SCORES[name].unit}
        plots[name] = strip_plot(table, result.prompts, result.seeds, **labels, outliers=flagged)
    content = {
        "title": f"Seed sweep of {result.model}",
        "result": result,
        "tables": {name: np.asarray(table) for name, table in result.scores.items()},
        "SCORES": SCORES,
        "shares": shares,
        "effects": effects,
        "outliers": outliers,
        "drift": drift,
        "labels": prompt_labels(result.prompts),
        "thumbnails": sweep.thumbnails,
        "sheet": sheet,
        "plots": plots,
        "percent": _percent,
    }
    return {
        "sweep": ("sweep.json", f"{result.to_json()}\n".encode()),
        "contact_sheet": ("contact-sheet.png", png_bytes(sheet)),
        **{f"plot {name}": (f"plots/{name}.svg", svg.encode()) for name, svg in plots.items()},
        "report": ("report.html", render_page("sweep.html.j2", content).encode()),
    }


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
