"""Runs of one seed, each in a fresh process: eager, torch.compile and frozen, to see whether it gives the same again.

The runs are :data:`RUNS`; each is compared with an earlier one. After the repetitions come the causes of drift on a CPU
machine: another thread count, another instruction set, another batch size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from pipevault.cache.outcome import Clock, Progress
from pipevault.determinism.seeds import effective_seed
from pipevault.errors import DifferentOutputError, NotComparableError, SettingsError
from pipevault.evidence.files import Array
from pipevault.evidence.generation_job import (
    GenerationJob,
    GenerationResult,
    generate_in_fresh_process,
    other_threads,
    smaller_kernels,
)
from pipevault.evidence.metrics import Distance, distance
from pipevault.evidence.request import Request
from pipevault.files.scratch import scratch_folder
from pipevault.fingerprint.machine import machine_record


@dataclass(frozen=True)
class PlannedRun:
    """A run to make and to compare with ``against``. ``change`` is ``threads``, ``isa``, ``batch`` or nothing."""

    name: str
    group: str
    method: str
    against: str | None = None
    change: str = ""


@dataclass(frozen=True)
class FinishedRun:
    """A run that was made. ``note`` says what was changed: ``2 threads, not 1``. ``latents`` are the last ones, in
    float32, samples first. What follows is to the run ``plan.against``; ``None`` where it cannot be compared.
    """

    plan: PlannedRun
    result: GenerationResult
    pictures: tuple[Array, ...]
    latents: Array | None
    note: str = ""
    equal: bool | None = None
    pixels_distance: Distance | None = None
    latents_distance: Distance | None = None
    same_noise: bool | None = None

    def to_json(self) -> dict[str, Any]:
        result = asdict(self.result)
        for files in ("pictures", "latents"):
            del result[files]
        return {
            "run": self.plan.name,
            "method": self.plan.method,
            "against": self.plan.against,
            "note": self.note,
            "equal": self.equal,
            "same_noise": self.same_noise,
            "pixels_distance": None if self.pixels_distance is None else self.pixels_distance.to_json(),
            "latents_distance": None if self.latents_distance is None else self.latents_distance.to_json(),
            **result,
        }


@dataclass(frozen=True)
class Comparison:
    """The runs of a comparison; ``skipped`` has the name and the reason of each that was left out."""

    model: str
    request: Request
    runs: tuple[FinishedRun, ...]
    skipped: tuple[tuple[str, str], ...]
    prewarm: GenerationResult | None
    machine: Mapping[str, Any]

    def run(self, name: str) -> FinishedRun:
        return next(run for run in self.runs if run.plan.name == name)

    @property
    def broken_promises(self) -> tuple[str, ...]:
        """The differences of frozen generations, in words; empty if all have the same pixels and latents."""
        frozen = [run for run in self.runs if run.plan.method == "frozen"]
        broken = []
        for run in frozen:
            if run.result.pixels != frozen[0].result.pixels:
                broken.append(f"{run.plan.name} differs from {frozen[0].plan.name}")
            elif run is not frozen[0] and run.latents_distance is not None and not run.latents_distance.equal:
                broken.append(f"the latents of {run.plan.name} differ from those of {frozen[0].plan.name}")
            if run.result.warm_pixels and run.result.warm_pixels != run.result.pixels:
                broken.append(f"the second generation of {run.plan.name} differs from its first")
        return tuple(broken)

    @property
    def frozen_equal(self) -> bool | None:
        """True if no promise is broken, ``None`` if nothing frozen was run."""
        return not self.broken_promises if any(run.plan.method == "frozen" for run in self.runs) else None

    def check(self) -> None:
        """Raise :class:`DifferentOutputError` unless all frozen generations have the same pixels and latents."""
        if self.broken_promises:
            raise DifferentOutputError(
                f"Frozen graphs gave different pictures for seed {self.request.seed}: "
                f"{'; '.join(self.broken_promises)}. Load at level strict, or report it with the output of --json."
            )

    def to_json(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "request": self.request.to_json(),
            "runs": [run.to_json() for run in self.runs],
            "skipped": [{"run": name, "reason": reason} for name, reason in self.skipped],
            "prewarm": None if self.prewarm is None else asdict(self.prewarm),
            "frozen_equal": self.frozen_equal,
            "broken_promises": list(self.broken_promises),
            "machine": dict(self.machine),
        }


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

    Unequal frozen runs are for :meth:`Comparison.check`.
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
            try:
                own = _changed(plan, replace(job, method=plan.method), done.get(FIRST))
                with clock.step(ACTION, plan.name):
                    result = run(own, Path(scratch, f"run-{len(done)}"), label=plan.name, timeout_s=timeout_s)
                done[plan.name] = _finished(plan, result, done)
            except _LeftOutError as reason:
                skipped.append((plan.name, str(reason)))
    return Comparison(job.model, job.request, tuple(done.values()), tuple(skipped), prewarm, machine_record())


class _LeftOutError(Exception):
    """Says why a run is left out."""


def _changed(plan: PlannedRun, job: GenerationJob, first: FinishedRun | None) -> GenerationJob:
    if not plan.change or first is None:
        return job
    base = first.result
    if plan.change == "batch":
        if not (prompts := job.request.prompts):
            raise _LeftOutError("the pipeline takes no prompt")
        # The first prompt alone; where it is alone already, twice.
        other = prompts[:1] if len(prompts) > 1 else prompts * 2
        return replace(job, request=replace(job.request, prompts=other))
    if base.device != "cpu":
        raise _LeftOutError(f"the parts run on {base.device}, whose bits do not depend on it")
    if plan.change == "threads":
        return replace(job, environment=other_threads(base.threads))
    if kernels := smaller_kernels(base.capability):
        return replace(job, environment=kernels)
    raise _LeftOutError(f"torch has no kernels for less than {base.capability} here")


def _finished(plan: PlannedRun, result: GenerationResult, done: Mapping[str, FinishedRun]) -> FinishedRun:
    latents = None if result.latents is None else np.load(result.latents)
    finished = FinishedRun(plan, result, tuple(map(np.load, result.pictures)), latents)
    if plan.against is None:
        return finished
    other = done[plan.against]
    note = _note(plan.change, result, other.result) if plan.change else ""
    if note is None:
        same = f"{result.threads} threads and {result.capability} kernels"
        raise _LeftOutError(f"the change had no effect: {same} in both runs")
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
