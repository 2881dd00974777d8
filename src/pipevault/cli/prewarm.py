"""``pipevault prewarm``: freeze a model for one or more calls without an application."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import click

from pipevault.cache.outcome import Explanation, Outcome
from pipevault.cli import exits, interrupts, options, render
from pipevault.cli.exits import Exit
from pipevault.cli.pipelines import shape_of
from pipevault.cli.progress import StepProgress
from pipevault.errors import MissError, SettingsError
from pipevault.opening import open_pipeline


@dataclass(frozen=True)
class Call:
    """A call to freeze, and what was ``found`` of it: what a load would do, what one did, or why it failed."""

    size: str
    batch_size: str
    dtype: str | None
    shape: dict[str, Any]
    found: Explanation | Outcome | Exception | None = None
    took_s: float = 0.0

    @property
    def label(self) -> str:
        batch = f"batch {self.batch_size}" if self.batch_size else ""
        return ", ".join(word for word in (self.size, batch, self.dtype) if word)

    @property
    def is_hit(self) -> bool:
        return isinstance(self.found, Explanation) and self.found.status == "hit"

    @property
    def failure(self) -> exits.Failure:
        if isinstance(self.found, Exception):
            return exits.kind_of(self.found)
        if isinstance(self.found, Outcome):
            return (Exit.DONE, None) if self.found.stored else (Exit.NOT_NOW, "not-stored")
        return (Exit.DONE, None) if self.is_hit else exits.KINDS[MissError]


@options.command("prewarm", short_help="Freeze a model without an application.")
@options.model_argument
@options.call_options(several=True)
@options.class_option
@click.option("--profile", "compile_profile", metavar="NAME", help="fast, balanced or max. Default: balanced.")
@options.jobs_option
@click.option(
    "--without-weights",
    is_flag=True,
    help="Fetch and read no weights: make them up of the configuration. Graphs do not depend on their values.",
)
@options.dry_run_option
@options.vault_options
def prewarm(
    model: str,
    parts: options.Parts,
    without_weights: bool,
    dry_run: bool,
    dir: Path | None,
    as_json: bool,
    **asked: Any,
) -> None:
    """Freeze MODEL for each size with each batch size and dtype; what is frozen already is loaded and left as it is.

    MODEL is a folder, a repository id, or `demo` for the pipeline that ships. All calls are looked up first: --dry-run
    shows this plan and ends with exit code 1 if something is not in the vault. A call that fails does not stop the
    others; the exit code is that of the first failure.

    \b
    Examples:
      pipevault prewarm demo
      pipevault prewarm ./my-model --size 512x512 --size 768x512 --dtype float16 --dtype bfloat16 --dry-run
      pipevault prewarm ./my-model --size 512x512..1024x1024 --batch-size 1..4
      pipevault prewarm ./my-model --size 1024x1024 --batch-size 1 --batch-size 4 --parts unet,vae.decoder
      pipevault prewarm owner/model --size 512x512 --without-weights
    """
    from pipevault import PipelineCache, outcome

    calls = _asked_calls(model, **options.take(asked, "sizes", "batch_sizes", "dtypes", "num_frames", "guidance"))
    opening = options.take(asked, "device", "pipeline_class") | ({"with_weights": False} if without_weights else {})
    kept: dict[str | None, Any] = {}

    def opened(dtype: str | None) -> Any:
        if dtype not in kept:
            kept.clear()  # one model is in memory at a time
            kept[dtype] = open_pipeline(model, dtype=dtype, **opening)
        return kept[dtype]

    with StepProgress() as progress:
        cache = PipelineCache(dir, mode="compile", progress=progress, **asked)
        if without_weights and cache.settings.weights == "baked":
            raise SettingsError("Weights that are made up cannot be baked into graphs. Leave out --without-weights.")

        def look_up(call: Call) -> Explanation:
            return cache.explain(opened(call.dtype), parts=parts, **call.shape)

        def freeze(call: Call) -> Outcome:
            return outcome(cache.load(opened(call.dtype), shapes=[call.shape], parts=parts))

        calls = [_attempt(look_up, call) for call in calls]
        if not dry_run:
            there = sum(call.is_hit for call in calls)
            failed = sum(isinstance(call.found, Exception) for call in calls)
            new = len(calls) - there - failed
            render.note(f"{len(calls)} planned: {there} in the vault, {failed} failed, {new} to freeze.")
            for number, call in enumerate(calls):
                progress.subject = f"{call.label} ({number + 1} of {len(calls)})" if len(calls) > 1 else call.label
                if not isinstance(call.found, Exception):
                    calls[number] = _attempt(freeze, call)
    code, word = exits.first_of(call.failure for call in calls)
    if as_json:
        documents = [_document(call) for call in calls]
        render.print_json({"vault": cache.settings.dir, "dry_run": dry_run, "code": word, "calls": documents})
    elif dry_run:
        render.show(render.table(("CALL", "KEY", "STATUS", "ACTION", "REASON"), map(_planned_row, calls)))
    else:
        columns = ("CALL", "KEY", "OUTCOME", "FROZEN", "STORED", "SECONDS", "REASON")
        render.show(render.table(columns, map(_row, calls), right=("SECONDS",)))
    click.get_current_context().exit(code)


def _asked_calls(
    model: str,
    *,
    sizes: Sequence[str],
    batch_sizes: Sequence[int | tuple[int, int]],
    dtypes: Sequence[str],
    **call: Any,
) -> list[Call]:
    calls = []
    for dtype, size, batch in product(dtypes or (None,), sizes or (None,), batch_sizes or (None,)):
        shape = shape_of(model, size or None, batch_size=batch, **call)
        text = "..".join(map(str, batch)) if isinstance(batch, tuple) else str(batch or "")
        calls.append(Call((size or "default size").strip(), text, dtype, shape))
    return calls


def _attempt(act: Callable[[Call], Explanation | Outcome], call: Call) -> Call:
    started_s = time.monotonic()
    try:
        return replace(call, found=act(call), took_s=time.monotonic() - started_s)
    except Exception as error:  # such as torch's own when memory runs out for one call: the others may still fit
        if interrupts.has_struck():
            raise
        exits.show_traceback(error)
        return replace(call, found=error)


def _document(call: Call) -> dict[str, Any]:
    asked = {"size": call.size, "batch_size": call.batch_size or None, "dtype": call.dtype}
    if isinstance(call.found, Exception):
        return {**asked, "status": "failed", **exits.error_document(call.found)}
    if isinstance(call.found, Outcome):
        return {**asked, "code": call.failure[1], **call.found.to_json()}
    assert isinstance(call.found, Explanation)
    explained = {"status": call.found.status, "key": call.found.key.digest, "reason": call.found.reason}
    return {**asked, "code": call.failure[1], **explained}


def _planned_row(call: Call) -> tuple[str, ...]:
    if isinstance(call.found, Exception):
        return (call.label, "", "failed", "", exits.text_of(call.found))
    assert isinstance(call.found, Explanation)
    action = "nothing to do" if call.is_hit else "would be frozen"
    return (call.label, call.found.key.digest.short, call.found.status, action, call.found.reason)


def _row(call: Call) -> tuple[str, ...]:
    report = call.found
    if isinstance(report, Exception):
        return (call.label, "", "failed", "", "no", "", exits.text_of(report))
    assert isinstance(report, Outcome)
    frozen = [name for name, part in report.parts.items() if part.status == "frozen"]
    key = "none" if report.key is None else report.key.short
    stored, took = "yes" if report.stored else "no", f"{call.took_s:.1f}"
    return (call.label, key, report.status, ", ".join(frozen) or "none", stored, took, report.reason)
