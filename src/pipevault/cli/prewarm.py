"""``pipevault prewarm``: freeze a model for one or more sizes without an application."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from pipevault.cli import render
from pipevault.cli.options import call_options, dir_option, json_option, model_argument
from pipevault.cli.pipelines import shapes_of
from pipevault.cli.progress import StepProgress
from pipevault.errors import PipevaultError
from pipevault.opening import open_pipeline

if TYPE_CHECKING:
    from pipevault.cache.outcome import Outcome
    from pipevault.cache.pipeline_cache import PipelineCache

OWN_SIZE = "default size"


@dataclass(frozen=True)
class SizeResult:
    """What became of one size; exactly one of ``outcome`` and ``error`` is given."""

    size: str
    outcome: Outcome | None = None
    error: Exception | None = None

    @property
    def exit_code(self) -> int:
        from pipevault.cli.app import exit_code

        if self.outcome is not None:
            return 0 if self.outcome.stored else 1
        return exit_code(self.error) if isinstance(self.error, PipevaultError) else 1


@click.command("prewarm", short_help="Freeze a model without an application.")
@model_argument
@click.option(
    "--size",
    "sizes",
    metavar="WxH",
    multiple=True,
    help="Pixels, or a range of them (512x512..1024x768), any number of times. Default: the model's.",
)
@call_options
@click.option("--pipeline-class", metavar="NAME", help="A class of diffusers in place of the model's.")
@click.option("--profile", metavar="NAME", help="fast, balanced or max. Default: PIPEVAULT_COMPILE_PROFILE, balanced.")
@click.option(
    "--jobs", metavar="NUMBER", type=click.IntRange(min=0), help="Graphs to compile at a time. Default: cores."
)
@click.option("--dry-run", is_flag=True, help="Say what would be frozen, without running the model.")
@dir_option
@json_option
def prewarm(
    model: str,
    sizes: tuple[str, ...],
    dtype: str | None,
    device: str | None,
    batch_size: int | tuple[int, int] | None,
    frames: int | tuple[int, int] | None,
    guidance: bool | None,
    weights: str | None,
    level: str | None,
    regions: str | None,
    parts: tuple[str, ...] | Literal["auto"] | None,
    pipeline_class: str | None,
    profile: str | None,
    jobs: int | None,
    dry_run: bool,
    dir: Path | None,
    as_json: bool,
) -> None:
    """Freeze MODEL for each size; what is frozen already is loaded and left as it is.

    MODEL is a folder, a repository id, or `demo` for the pipeline that ships. A size that fails does not stop the
    others; the exit code is that of the first error, or 1 if an entry could not be stored. With --dry-run nothing is
    frozen: the exit code is 0 if all of it is in the vault, else 1.

    \b
    Examples:
      pipevault prewarm demo
      pipevault prewarm ./my-model --size 512x512 --size 768x512 --dtype bfloat16 --dry-run
      pipevault prewarm ./my-model --size 512x512..1024x1024 --batch-size 1..4
      pipevault prewarm ./my-model --size 1024x1024 --batch-size 4 --no-guidance --parts unet,vae.decoder
    """
    from pipevault import PipelineCache, outcome

    shapes = shapes_of(model, sizes, batch_size=batch_size, num_frames=frames, guidance=guidance)
    with StepProgress() as progress:
        cache = PipelineCache(
            dir,
            mode="compile",
            weights=weights,
            level=level,
            regions=regions,
            jobs=jobs,
            compile_profile=profile,
            progress=progress,
        )
        pipe = open_pipeline(model, dtype=dtype, device=device, pipeline_class=pipeline_class)
        if dry_run:
            click.get_current_context().exit(_dry_run(cache, pipe, shapes, sizes, parts, as_json))
        results = freeze_sizes(
            lambda shape: outcome(cache.load(pipe, shapes=[shape], parts=parts)), shapes, sizes, progress
        )
    if as_json:
        render.print_json({"vault": str(cache.settings.dir), "sizes": [_document(result) for result in results]})
    else:
        columns = ("SIZE", "KEY", "OUTCOME", "FROZEN", "STORED", "SECONDS", "REASON")
        render.show(render.table(columns, map(_row, results), right=("SECONDS",)))
    click.get_current_context().exit(next((result.exit_code for result in results if result.exit_code), 0))


def _dry_run(
    cache: PipelineCache,
    pipe: Any,
    shapes: Sequence[dict[str, Any]],
    sizes: Sequence[str],
    parts: tuple[str, ...] | Literal["auto"] | None,
    as_json: bool,
) -> int:
    """Show what is in the vault for each size and what would be frozen; 0 if nothing would."""
    rows, documents = [], []
    for number, shape in enumerate(shapes):
        size = sizes[number].strip() if sizes else OWN_SIZE
        explanation = cache.explain(pipe, parts=parts, **shape)
        key = explanation.key.digest
        documents.append({"size": size, "key": key.hex, "status": explanation.status, "reason": explanation.reason})
        action = "nothing to do" if explanation.status == "hit" else "would be frozen"
        rows.append((size, key.short, explanation.status, action, explanation.reason))
    if as_json:
        render.print_json({"vault": str(cache.settings.dir), "dry_run": True, "sizes": documents})
    else:
        render.show(render.table(("SIZE", "KEY", "STATUS", "ACTION", "REASON"), rows))
    return int(any(document["status"] != "hit" for document in documents))


def freeze_sizes(
    freeze: Callable[[dict[str, Any]], Outcome],
    shapes: Sequence[dict[str, Any]],
    sizes: Sequence[str],
    progress: StepProgress,
) -> list[SizeResult]:
    """One result for each shape, in order; errors are in the results."""
    results = []
    for number, shape in enumerate(shapes):
        size = sizes[number].strip() if sizes else OWN_SIZE
        progress.subject = f"{size} ({number + 1} of {len(shapes)})" if len(shapes) > 1 else size
        try:
            results.append(SizeResult(size, outcome=freeze(shape)))
        except PipevaultError as error:
            results.append(SizeResult(size, error=error))
        except Exception as error:  # such as torch's own when memory runs out at one size: the others may still fit
            traceback.print_exception(error)
            results.append(SizeResult(size, error=error))
    return results


def _document(result: SizeResult) -> dict[str, Any]:
    if result.outcome is None:
        return {
            "size": result.size,
            "status": "failed",
            "error": type(result.error).__name__,
            "reason": _reason(result),
        }
    return {"size": result.size, **result.outcome.to_json()}


def _row(result: SizeResult) -> tuple[str, ...]:
    report = result.outcome
    if report is None:
        return (result.size, "", "failed", "", "no", "", _reason(result))
    frozen = [name for name, part in report.parts.items() if part.status == "frozen"]
    return (
        result.size,
        "none" if report.key is None else report.key.short,
        report.status,
        ", ".join(frozen) or "none",
        "yes" if report.stored else "no",
        f"{sum(report.seconds.values()):.1f}",
        report.reason,
    )


def _reason(result: SizeResult) -> str:
    text = " ".join(str(result.error).split())
    return text if isinstance(result.error, PipevaultError) else f"{type(result.error).__name__}: {text}"
