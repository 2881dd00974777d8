"""Drawing every prompt with every seed, and scoring the pictures.

The picture of (prompt, seed) is that of ``pipe(prompt, seed=seed)``: its generator is ``generators(seed, 1)`` in
whatever batch it is drawn. A batch size is a graph of its own, though, so that below level ``invariant`` the last
bits may differ between batch sizes: compare sweeps of one batch size. All calls have the same size: the last batch is
filled up with its last picture, which is drawn and dropped.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from PIL import Image

from pipevault.cache.keys import execution_device
from pipevault.cache.loaded import outcome
from pipevault.cache.outcome import Progress, Step
from pipevault.calls.call import parameters
from pipevault.calls.describe import describe, pixels_sha256
from pipevault.calls.outputs import samples
from pipevault.calls.sample_roles import REPEATS
from pipevault.determinism.seeds import check_seed
from pipevault.determinism.streams import generators
from pipevault.errors import BadCallError, BadSeedError, SettingsError
from pipevault.evidence.request import Request, load_arguments
from pipevault.evidence.sweep.model_scores import TextScorer
from pipevault.evidence.sweep.result import SweepResult
from pipevault.evidence.sweep.scoring import Cell, Scoring, as_table
from pipevault.fingerprint.machine import machine_factors
from pipevault.fingerprint.toolchain import package_version
from pipevault.graphs import parts as graph_parts
from pipevault.runtime.records import record_of
from pipevault.runtime.run_record import versions

MAX_SEEDS = 256
"""Pairs of seeds grow with the square: 256 seeds are 32640 comparisons for each prompt."""
MAX_PICTURES = 10_000
_SCORING_PACKAGES = ("pillow", "scikit-image", "lpips")


@dataclass(frozen=True)
class Sweep:
    """``thumbnails`` are the pictures, rows of prompts and columns of seeds, at most 256 pixels on a side."""

    result: SweepResult
    thumbnails: tuple[tuple[Image.Image, ...], ...]


def run_sweep(
    pipe: Any,
    prompts: Sequence[str],
    seeds: Sequence[int],
    request: Request | None = None,
    *,
    model: str,
    batch_size: int = 1,
    clip: TextScorer | None = None,
    progress: Progress | None = None,
) -> Sweep:
    """Draw and score each prompt with each seed with a pipeline that :class:`~pipevault.PipelineCache` loaded.

    ``request`` gives the other arguments of the call; its prompts and seed are not used. ``model`` is the name that
    the result bears; ``demo`` has the digit classifier's score, and ``clip`` (from
    :func:`~pipevault.evidence.sweep.model_scores.clip_scorer`) adds the CLIP score. No prompts: a pipeline that takes
    none. Of a video the middle frame is scored. Raises :class:`BadSeedError` for a seed that is none or given twice,
    :class:`SettingsError` for prompts, too many pictures or an output without pictures, :class:`BadCallError`, and
    what the pipeline raises.
    """
    request = request or Request()
    rows, columns = check_prompts(pipe, prompts), check_seeds(seeds)
    check_count(len(rows), len(columns))
    _check_call(batch_size, request)
    report = progress or (lambda step: None)
    scoring = Scoring(model, rows, clip)
    digests: dict[Cell, str] = {}
    facts: dict[str, Any] = {}
    notes: dict[str, None] = {}
    started_s = time.perf_counter()
    for cells, output in _draw(pipe, rows, columns, request, batch_size, report):
        drawn = _pictures(output, batch_size)[: len(cells)]
        facts = facts or _facts(pipe, output)
        notes |= dict.fromkeys(_notes(output))
        digests.update((cell, _frames_sha256(frames)) for cell, frames in zip(cells, drawn, strict=True))
        scoring.add(cells, [frames[len(frames) // 2] for frames in drawn])
    report(Step("", "draw", time.perf_counter() - started_s))
    scoring_s = time.perf_counter()
    report(Step("", "comparing the seeds' pictures"))
    scores, not_available = scoring.tables(len(columns))
    report(Step("", "comparing the seeds' pictures", time.perf_counter() - scoring_s))
    call = describe(request.to_json())
    result = SweepResult(
        model=model,
        pipeline=type(pipe).__name__,
        call={name: value for name, value in call.items() if name not in ("prompts", "seed")},
        batch_size=batch_size,
        prompts=rows,
        seeds=columns,
        pixels=as_table(digests, len(rows), len(columns)),
        scores=scores,
        not_available=not_available,
        notes=tuple(notes),
        **facts,
    )
    return Sweep(result, as_table(scoring.thumbnails, len(rows), len(columns)))


def sweep_load_arguments(pipe: Any, prompts: Sequence[str], request: Request, batch_size: int) -> dict[str, Any]:
    """Keyword arguments of :meth:`~pipevault.PipelineCache.load` that freeze the one call that a sweep makes."""
    filled = tuple(prompts[:1]) * batch_size
    return load_arguments(_call_arguments(pipe, filled, request, batch_size), pipeline=type(pipe))


def check_prompts(pipe: Any, prompts: Sequence[str]) -> tuple[str, ...]:
    """The rows of a sweep: the prompts, or ``("",)`` for a pipeline that takes none. :class:`SettingsError`."""
    rows = tuple(prompts)
    takes_prompts = "prompt" in parameters(pipe)
    if rows and not takes_prompts:
        raise SettingsError(f"{type(pipe).__name__} takes no prompts: sweep its seeds without --prompts.")
    if not rows and takes_prompts:
        raise SettingsError(f"{type(pipe).__name__} needs prompts: give --prompts or --prompts-file.")
    for index, prompt in enumerate(rows):
        if not isinstance(prompt, str) or not prompt.strip():
            raise SettingsError(f"Prompt {index + 1} is {prompt!r}, which is no text to draw.")
        if prompt in rows[:index]:
            raise SettingsError(f"The prompt {prompt!r} is given twice. Give each once.")
    return rows or ("",)


def check_seeds(seeds: Sequence[int]) -> tuple[int, ...]:
    """:class:`BadSeedError` for a seed that is none or given twice, :class:`SettingsError` for none or too many."""
    columns = tuple(check_seed(seed) for seed in seeds)
    if not columns:
        raise SettingsError("A sweep needs a seed or more, such as 0..31.")
    if len(columns) > MAX_SEEDS:
        raise SettingsError(f"A sweep takes up to {MAX_SEEDS} seeds, not {len(columns)}.")
    for index, seed in enumerate(columns):
        if seed in columns[:index]:
            raise BadSeedError(f"The seed {seed} is given twice. Give each once.", seed)
    return columns


def check_count(prompts: int, seeds: int) -> None:
    """:class:`SettingsError` for more than :data:`MAX_PICTURES`."""
    if prompts * seeds > MAX_PICTURES:
        raise SettingsError(
            f"{prompts} prompts by {seeds} seeds are {prompts * seeds} pictures; a sweep draws up to {MAX_PICTURES}. "
            "Give fewer prompts or seeds."
        )


def _check_call(batch_size: int, request: Request) -> None:
    if not isinstance(batch_size, int) or isinstance(batch_size, bool) or batch_size < 1:
        raise SettingsError(f"The batch size is a whole number above 0, not {batch_size!r}.")
    for name in REPEATS:
        if request.arguments.get(name) not in (None, 1):
            raise BadCallError(f"A sweep draws one picture for each prompt and seed: leave out {name}.")


def _draw(
    pipe: Any, rows: Sequence[str], columns: Sequence[int], request: Request, batch_size: int, report: Progress
) -> Iterator[tuple[list[Cell], Any]]:
    """The cells of each batch, seed by seed, and what the pipeline returned for them."""
    cells = [(row, column) for column in range(len(columns)) for row in range(len(rows))]
    for start in range(0, len(cells), batch_size):
        batch = cells[start : start + batch_size]
        report(Step("", "draw", None, f"{start + len(batch)} of {len(cells)}"))
        filled = [*batch, *[batch[-1]] * (batch_size - len(batch))]
        prompts = tuple(rows[row] for row, _ in filled if rows[row])
        drawn = [generators(columns[column], 1)[0] for _, column in filled]
        arguments = _call_arguments(pipe, prompts, request, batch_size)
        yield batch, pipe(**arguments, generator=drawn if batch_size > 1 else drawn[0])


def _call_arguments(pipe: Any, prompts: tuple[str, ...], request: Request, batch_size: int) -> dict[str, Any]:
    """Of one call but for its generators; a pipeline that takes no prompt is told the batch size."""
    arguments = replace(request, prompts=prompts).call_arguments(pipe)
    if prompts or batch_size == 1:
        return arguments
    if "batch_size" not in parameters(pipe):
        raise BadCallError(f"{type(pipe).__name__} takes neither prompts nor batch_size: give batch size 1.")
    return {**arguments, "batch_size": batch_size}


def _pictures(output: Any, count: int) -> list[tuple[Image.Image, ...]]:
    """The frames of each sample of a call; one for an image."""
    pictures = [one for one in samples(output) if one.is_image]
    if not pictures:
        raise SettingsError(
            f"This {type(output).__name__} holds no PIL images to score: sweep a pipeline that returns pictures "
            "(output_type='pil')."
        )
    frames: dict[int, list[Image.Image]] = {}
    for one in pictures:
        if one.place.field == pictures[0].place.field:
            frames.setdefault(one.position.number, []).append(one.leaf)
    if len(frames) != count:
        raise BadCallError(f"The pipeline returned {len(frames)} pictures for a batch of {count}.")
    return [tuple(own) for own in frames.values()]


def _facts(pipe: Any, output: Any) -> dict[str, Any]:
    """What decides the bits: from the run record, or, of a pipeline that runs eagerly (mode off), as it is now."""
    loaded = outcome(pipe)
    scoring = {name: package_version(name) for name in _SCORING_PACKAGES}
    facts = {"key": loaded.key.hex if loaded.key else None, "outcome": loaded.status}
    try:
        record = record_of(output)
    except SettingsError:
        return facts | {
            "level": {"asked": "off", "achieved": "off"},
            "weights": {},
            "versions": versions() | scoring,
            "machine": machine_factors(execution_device(pipe, graph_parts.find_parts(pipe))),
        }
    return facts | {
        "level": {"asked": record.level["asked"], "achieved": record.level["achieved"]},
        "weights": dict(record.weights),
        "versions": {**record.versions, **scoring},
        "machine": dict(record.machine),
    }


def _notes(output: Any) -> list[str]:
    try:
        return list(record_of(output).level["notes"])
    except SettingsError:
        return []


def _frames_sha256(frames: Sequence[Image.Image]) -> str:
    """That of the picture's bytes; of a video's frames one after the other."""
    if len(frames) == 1:
        return pixels_sha256(frames[0])
    hasher = hashlib.sha256()
    for frame in frames:
        hasher.update(frame.tobytes())
    return hasher.hexdigest()
