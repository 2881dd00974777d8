"""The run of a sweep: every prompt is drawn with every seed, and the pictures are scored.

The picture of (prompt, seed) is that of ``pipe(prompt, seed=seed)``: its generator is ``generators(seed, 1)`` in
whatever batch it is drawn. A batch size is a graph of its own, though, so that below level ``invariant`` the last
bits may differ between batch sizes: compare sweeps of one batch size. All calls have the same size: the last batch is
filled up with its last picture, which is drawn and dropped.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from typing import Any

import numpy as np
from PIL import Image

from pipevault.cache.keys import execution_device
from pipevault.cache.loaded import outcome
from pipevault.cache.outcome import Clock, Progress, Step
from pipevault.calls.call import parameters
from pipevault.calls.describe import describe, pixels_sha256
from pipevault.calls.outputs import of_first_field, samples
from pipevault.calls.sample_roles import REPEATS
from pipevault.determinism.seeds import check_seed
from pipevault.determinism.streams import generators
from pipevault.errors import BadCallError, BadSeedError, SettingsError
from pipevault.evidence.quality import Scoring, TextScorer, as_table
from pipevault.evidence.request import Request, load_arguments
from pipevault.evidence.sweep.result import SweepResult
from pipevault.fingerprint.machine import machine_factors
from pipevault.fingerprint.toolchain import package_version
from pipevault.graphs import parts as graph_parts
from pipevault.pipeline import Pipeline
from pipevault.runtime.record import RunRecord
from pipevault.runtime.records import record_of
from pipevault.runtime.run_record import versions

MAX_SEEDS, MAX_PICTURES = 256, 10_000
"""Pairs of seeds grow with the square: 256 seeds are 32640 comparisons for each prompt."""
_SCORING_PACKAGES = ("pillow", "scikit-image", "scipy", "lpips")


@dataclass(frozen=True)
class Sweep:
    """A sweep. ``thumbnails`` are the pictures, rows of prompts and columns of seeds, up to 256 pixels on a side."""

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

    ``model`` is the name that the result bears; ``demo`` has the digit classifier's score, ``clip`` adds the CLIP
    score. Of a video the middle frame is scored. :class:`SettingsError`, :class:`BadCallError`, :class:`BadSeedError`.
    """
    request, rows = request or Request(), check_prompts(pipe, prompts)
    columns = check_seeds(seeds, prompts=len(rows))
    if repeats := [name for name in REPEATS if request.arguments.get(name) not in (None, 1)]:
        raise BadCallError(f"A sweep draws one picture for each prompt and seed: leave out {repeats[0]}.")
    clock, scoring = Clock(progress), Scoring(model, rows, len(columns), clip)
    pixels = np.empty((len(rows), len(columns)), object)
    cells = [(row, column) for column in range(len(columns)) for row in range(len(rows))]
    facts, notes = dict[str, Any](), dict[str, None]()
    with clock.step("draw"):
        for start in range(0, len(cells), batch_size):
            batch = cells[start : start + batch_size]
            clock.report(Step("", "draw", None, f"{start + len(batch)} of {len(cells)}"))
            filled = [*batch, *[batch[-1]] * (batch_size - len(batch))]
            arguments = _call_arguments(pipe, [rows[row] for row, _ in filled if rows[row]], request, batch_size)
            drawn = [generators(columns[column], 1)[0] for _, column in filled]
            output = pipe(**arguments, generator=drawn if batch_size > 1 else drawn[0])
            record, videos = _record(output), _pictures(output, batch_size)[: len(batch)]
            facts = facts or _facts(pipe, record)
            notes |= dict.fromkeys(record.level["notes"] if record else ())
            for cell, frames in zip(batch, videos, strict=True):
                several = hashlib.sha256(b"".join(frame.tobytes() for frame in frames)).hexdigest()
                pixels[cell] = several if len(frames) > 1 else pixels_sha256(frames[0])
            scoring.add(batch, [frames[len(frames) // 2] for frames in videos])
    with clock.step("comparing the seeds' pictures"):
        scores, not_available = scoring.tables()
    result = SweepResult(
        model=model,
        pipeline=type(pipe).__name__,
        call={name: value for name, value in describe(request.to_json()).items() if name not in ("prompts", "seed")},
        batch_size=batch_size,
        prompts=rows,
        seeds=columns,
        pixels=as_table(pixels),
        scores=scores,
        not_available=not_available,
        notes=tuple(notes),
        created_at=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        **facts,
    )
    return Sweep(result, as_table(scoring.thumbnails))


def sweep_load_arguments(pipe: Pipeline, prompts: Sequence[str], request: Request, batch_size: int) -> dict[str, Any]:
    """Return keyword arguments of :meth:`~pipevault.PipelineCache.load` that freeze the one call that a sweep makes."""
    check_prompts(pipe, prompts)
    arguments = _call_arguments(pipe, tuple(prompts[:1]) * batch_size, request, batch_size)
    return load_arguments(arguments, pipeline=type(pipe))


def check_prompts(pipe: Pipeline, prompts: Sequence[str]) -> tuple[str, ...]:
    """Return the rows of a sweep: the prompts, or ``("",)`` for a pipeline that takes none. :class:`SettingsError`."""
    takes_prompts = "prompt" in parameters(pipe)
    if takes_prompts != bool(prompts):
        verb = "needs prompts: give" if takes_prompts else "takes no prompts: leave out"
        raise SettingsError(f"{type(pipe).__name__} {verb} --prompts or --prompts-file.")
    for index, prompt in enumerate(prompts):
        if not prompt.strip():
            raise SettingsError(f"Prompt {index + 1} is {prompt!r}. Give a text to draw.")
    if twice := [prompt for prompt in prompts if prompts.count(prompt) > 1]:
        raise SettingsError(f"The prompt {twice[0]!r} is given twice. Give each once.")
    return tuple(prompts) or ("",)


def check_seeds(seeds: Sequence[int], *, prompts: int) -> tuple[int, ...]:
    """Return the columns of a sweep. :class:`BadSeedError`, :class:`SettingsError` for too many pictures."""
    columns = tuple(map(check_seed, seeds))
    if twice := [seed for seed in columns if columns.count(seed) > 1]:
        raise BadSeedError(f"The seed {twice[0]} is given twice. Give each once.", twice[0])
    if (count := prompts * len(columns)) > MAX_PICTURES:
        raise SettingsError(f"{count} pictures are too many for a sweep, which draws up to {MAX_PICTURES}.")
    return columns


def _call_arguments(pipe: Pipeline, prompts: Sequence[str], request: Request, batch_size: int) -> dict[str, Any]:
    """Return the arguments of a call but its generators; a pipeline without prompts gets the batch size."""
    arguments = replace(request, prompts=tuple(prompts)).call_arguments(pipe)
    if prompts or batch_size == 1:
        return arguments
    if "batch_size" not in parameters(pipe):
        raise BadCallError(f"{type(pipe).__name__} takes neither prompts nor batch_size: give batch size 1.")
    return {**arguments, "batch_size": batch_size}


def _pictures(output: Any, count: int) -> list[list[Image.Image]]:
    """Return the frames of each sample of a call; one for an image."""
    frames: dict[int, list[Image.Image]] = {}
    for one in of_first_field([one for one in samples(output) if one.is_image]):
        frames.setdefault(one.position.number, []).append(one.leaf)
    if not frames:
        raise SettingsError(f"This {type(output).__name__} holds no PIL images to score. Draw with output_type='pil'.")
    if len(frames) != count:
        raise BadCallError(f"The pipeline returned {len(frames)} pictures for a batch of {count}.")
    return list(frames.values())


def _record(output: Any) -> RunRecord | None:
    try:
        return record_of(output)
    except SettingsError:  # a pipeline that runs eagerly (mode off)
        return None


def _facts(pipe: Pipeline, record: RunRecord | None) -> dict[str, Any]:
    """Return what decides the bits: from the run record, or, where there is none, as it is now."""
    loaded, level = outcome(pipe), record.level if record else {"asked": "off", "achieved": "off"}
    machine = record.machine if record else machine_factors(execution_device(pipe, graph_parts.find_parts(pipe)))
    scoring = {name: package_version(name) for name in _SCORING_PACKAGES}
    return {
        "key": loaded.key.hex if loaded.key else None,
        "outcome": loaded.status,
        "level": {name: level[name] for name in ("asked", "achieved")},
        "weights": dict(record.weights if record else {}),
        "versions": {**(record.versions if record else versions()), **scoring},
        "machine": dict(machine),
    }
