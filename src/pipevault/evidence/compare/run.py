"""Runs of one seed, each in a fresh process: eager, torch.compile and frozen, to see whether it gives the same again.

The runs are :data:`RUNS`; each is compared with an earlier one. After the repetitions come the causes of drift on a CPU
machine: another thread count, another instruction set, another batch size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeAlias

import numpy as np

from pipevault.cache.outcome import Clock, Progress
from pipevault.determinism.seeds import effective_seed
from pipevault.errors import NotComparableError, SettingsError
from pipevault.evidence.compare.result import Comparison, FinishedRun, PlannedRun
from pipevault.evidence.files import Array
from pipevault.evidence.generation_job import (
    GenerationJob,
    GenerationResult,
    generate_in_fresh_process,
    other_threads,
    smaller_kernels,
)
from pipevault.evidence.metrics import Distance, distance
from pipevault.files.scratch import scratch_folder
from pipevault.fingerprint.machine import machine_record

FIRST = "eager"
RUNS = (
    PlannedRun(FIRST, "eager", "eager"),
    PlannedRun("eager again", "eager", "eager", against=FIRST),
    PlannedRun("torch.compile", "torch.compile", "torch.compile", against=FIRST),
    PlannedRun("torch.compile again", "torch.compile", "torch.compile", against="torch.compile"),
    PlannedRun("frozen", "frozen", "frozen", against=FIRST),
    PlannedRun("frozen again", "frozen", "frozen", against="frozen"),
    PlannedRun("eager, other thread count", "threads", "eager", against=FIRST, change="threads"),
    PlannedRun("eager, other instruction set", "isa", "eager", against=FIRST, change="isa"),
    PlannedRun("eager, other batch size", "batch", "eager", against=FIRST, change="batch"),
)
"""In the order in which they run. The first one is always run, because the others are compared with it."""

GROUPS = tuple(dict.fromkeys(run.group for run in RUNS))
PREWARM = "prewarm"
ACTION = "running in a fresh process"
Run: TypeAlias = Callable[..., GenerationResult]
"""The type of :func:`generate_in_fresh_process`, which tests replace."""


def compare(
    job: GenerationJob,
    *,
    groups: Sequence[str] = GROUPS,
    timeout_s: float | None = None,
    progress: Progress | None = None,
    run: Run = generate_in_fresh_process,
) -> Comparison:
    """Make those of :data:`RUNS` whose group is in ``groups``, one after the other, ``timeout_s`` for each process.

    ``job`` says what is opened, drawn and loaded; each run brings its own method. Raises what a run raises
    (:func:`generate_in_fresh_process`), :class:`MissingExtraError` without scikit-image, :class:`SettingsError` for an
    unknown group. Unequal frozen runs are for :meth:`Comparison.check`.
    """
    if unknown := [group for group in groups if group not in GROUPS]:
        raise SettingsError(f"Unknown runs {unknown[0]!r}. Runs: {', '.join(GROUPS)}.")
    distance(np.zeros((3, 3), np.uint8), np.zeros((3, 3), np.uint8))  # what it lacks it must say before the first run
    request = replace(job.request.with_defaults_of(job.model), seed=effective_seed(job.request.seed))
    job = replace(job, request=request, method="frozen")
    clock = Clock(progress)
    done: dict[str, FinishedRun] = {}
    skipped: list[tuple[str, str]] = []
    prewarm: GenerationResult | None = None
    with scratch_folder("compare") as scratch:
        for plan in RUNS:
            if plan.group not in groups and plan.name != FIRST:
                continue
            if plan.method == "frozen" and prewarm is None:
                with clock.step(ACTION, PREWARM):
                    freezing = replace(job, mode="compile", generations=0)
                    prewarm = run(freezing, Path(scratch, PREWARM), label=PREWARM, timeout_s=timeout_s)
            made: GenerationJob | FinishedRun | str = _changed(plan, replace(job, method=plan.method), done.get(FIRST))
            if isinstance(made, GenerationJob):
                with clock.step(ACTION, plan.name):
                    result = run(made, Path(scratch, f"run-{len(done)}"), label=plan.name, timeout_s=timeout_s)
                made = _finished(plan, result, done)
            if isinstance(made, FinishedRun):
                done[plan.name] = made
            else:
                skipped.append((plan.name, made))
    return Comparison(job.model, job.request, tuple(done.values()), tuple(skipped), prewarm, machine_record())


def _changed(plan: PlannedRun, job: GenerationJob, first: FinishedRun | None) -> GenerationJob | str:
    """Return the job of a run, or why it is left out."""
    if not plan.change or first is None:
        return job
    base = first.result
    if plan.change == "batch":
        if not (prompts := job.request.prompts):
            return "the pipeline takes no prompt"
        # The first prompt alone; where it is alone already, twice.
        other = prompts[:1] if len(prompts) > 1 else prompts * 2
        return replace(job, request=replace(job.request, prompts=other))
    if base.device != "cpu":
        return f"the parts run on {base.device}, whose bits do not depend on it"
    if plan.change == "threads":
        return replace(job, environment=other_threads(base.threads))
    if kernels := smaller_kernels(base.capability):
        return replace(job, environment=kernels)
    return f"torch has no kernels for less than {base.capability} here"


def _finished(plan: PlannedRun, result: GenerationResult, done: Mapping[str, FinishedRun]) -> FinishedRun | str:
    """Return the run with its distances, or why it says nothing."""
    latents = None if result.latents is None else np.load(result.latents)
    finished = FinishedRun(plan, result, tuple(map(np.load, result.pictures)), latents)
    if plan.against is None:
        return finished
    other = done[plan.against]
    note = _note(plan.change, result, other.result) if plan.change else ""
    if note is None:
        return f"the change had no effect: {result.threads} threads and {result.capability} kernels in both runs"
    is_batch = plan.change == "batch"
    count = min(len(finished.pictures), len(other.pictures)) if is_batch else None
    latents_distance = None
    if latents is not None and other.latents is not None:
        common = min(len(latents), len(other.latents)) if is_batch else None
        if latents[:common].shape == other.latents[:common].shape:
            latents_distance = distance(latents[:common], other.latents[:common])
    return replace(
        finished,
        note=note,
        equal=result.pixels[:count] == other.result.pixels[:count],
        pixels_distance=_distance(finished.pictures[:count], other.pictures[:count], plan.name, other.plan.name),
        latents_distance=latents_distance,
        same_noise=None if is_batch else result.noise == other.result.noise,
    )


def _note(change: str, result: GenerationResult, base: GenerationResult) -> str | None:
    """Return what a change changed, in words; ``None`` if nothing."""
    if change == "threads":
        words = (f"{result.threads} thread{'s' if result.threads > 1 else ''}", str(base.threads))
    elif change == "isa":
        words = (f"{result.capability} kernels", base.capability)
    else:
        words = (f"batch of {len(result.pixels)}", str(len(base.pixels)))
    return None if words[1] in words[0].split() else f"{words[0]}, not {words[1]}"


def _distance(pictures: Sequence[Array], others: Sequence[Array], name: str, other: str) -> Distance:
    if not pictures or len(pictures) != len(others):
        raise NotComparableError(f"{name} gave {len(pictures)} pictures and {other} {len(others)}: nothing to compare.")
    if len({picture.shape for picture in (*pictures, *others)}) > 1:
        raise NotComparableError(f"The pictures of {name} and {other} have several sizes. Give a size.")
    return distance(np.stack(pictures), np.stack(others))
