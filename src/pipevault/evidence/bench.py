"""Measurements of a pipeline, how soon it is ready and how fast it runs: eager, torch.compile, and pipevault.

Each measurement is a fresh process. Ways that keep something on disk are run twice: ``miss`` has nothing yet.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from pipevault.cache.outcome import Clock, Progress
from pipevault.errors import BadCallError, PipevaultError, SettingsError
from pipevault.evidence.compare.run import Run
from pipevault.evidence.generation_job import (
    COMPILED,
    COMPILED_BY_BLOCKS,
    COMPILING,
    GenerationJob,
    GenerationResult,
    compile_caches,
    generate_in_fresh_process,
    own_user_cache,
)
from pipevault.evidence.request import Request
from pipevault.files.scratch import scratch_folder
from pipevault.fingerprint.machine import machine_record
from pipevault.fingerprint.toolchain import toolchain_factors
from pipevault.graphs.inductor import GRAPH_FORMAT

SECONDS = ("import", "open", "ready", "first", "warm")


MEGA_CACHE = "torch.compile Mega-cache"
WAYS: Mapping[str, Mapping[str, Any]] = {
    "eager": {"method": "eager"},
    "torch.compile": {"method": COMPILED},
    MEGA_CACHE: {"method": COMPILED},
    "torch.compile by blocks": {"method": COMPILED_BY_BLOCKS},
    "whole": {"method": "frozen", "regions": "off"},
    "blocks": {"method": "frozen", "regions": "blocks"},
    "range": {"method": "frozen", "regions": "off", "load": {"dynamic": True}},
    "whole fast": {"method": "frozen", "regions": "off", "compile_profile": "fast"},
    "whole max": {"method": "frozen", "regions": "off", "compile_profile": "max"},
}
"""By name, the fields of a job. All but eager keep something on disk."""
ALL_WAYS = tuple(WAYS)


@dataclass(frozen=True)
class Measured:
    """The measurements of one way.

    ``miss`` is the run that had nothing on disk; ``seconds`` are medians over the runs after it, by :data:`SECONDS`.
    ``start`` are the seconds of each step of a load that is a hit, ``calls_s`` those of each call of a process,
    ``steps_s`` when the denoising steps of its first call ended. ``left_eager`` says which parts were not frozen, and
    why: the figures are then not those of a frozen pipeline.
    """

    name: str
    miss: Mapping[str, float]
    seconds: Mapping[str, float]
    peak_bytes: int
    runs: int
    start: Mapping[str, float] = field(default_factory=dict)
    calls_s: tuple[float, ...] = ()
    steps_s: tuple[float, ...] = ()
    left_eager: str = ""

    @property
    def miss_s(self) -> float:
        """Seconds from the constructed pipeline to the end of its first call, with nothing on disk."""
        return self.miss["ready"] + self.miss["first"]

    @property
    def hit_s(self) -> float:
        """Seconds from the constructed pipeline to the end of its first call, in a later process."""
        return self.seconds["ready"] + self.seconds["first"]

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "miss_s": self.miss_s, "hit_s": self.hit_s}


@dataclass(frozen=True)
class Bench:
    """The measurements of one model. ``skipped`` are the ways that failed, with the reason."""

    model: str
    request: Request
    measured: tuple[Measured, ...]
    skipped: tuple[tuple[str, str], ...]
    machine: Mapping[str, Any]
    versions: Mapping[str, Any]

    def to_json(self) -> dict[str, Any]:
        measured = [one.to_json() for one in self.measured]
        return {**asdict(self), "request": self.request.to_json(), "measured": measured}


def bench(
    job: GenerationJob,
    *,
    ways: Sequence[str] = ALL_WAYS,
    runs: int = 3,
    timeout_s: float | None = None,
    progress: Progress | None = None,
    generate: Run = generate_in_fresh_process,
) -> Bench:
    """Run ``job`` in each of ``ways``, ``runs`` times after the first where it keeps something.

    Raises :class:`SettingsError`, and a :class:`BadCallError` of the first way: the others would make the same call.
    """
    if unknown := [name for name in ways if name not in WAYS]:
        raise SettingsError(f"Unknown way {unknown[0]!r}. Ways: {', '.join(WAYS)}.")
    if runs < 1:
        raise SettingsError(f"runs must be 1 or more, not {runs}.")
    if job.generations < 2:
        raise SettingsError(f"calls must be 2 or more, not {job.generations}: the first one is not like the others.")
    clock = Clock(progress)
    measured, skipped = [], []
    for name in ways:
        try:
            measured.append(_measure(name, job, runs, timeout_s, clock, generate))
        except PipevaultError as error:  # what one way cannot do, the others may
            if not measured and isinstance(error, (SettingsError, BadCallError)):
                raise
            skipped.append((name, str(error)))
    versions = toolchain_factors(graph_format=GRAPH_FORMAT)
    return Bench(job.model, job.request, tuple(measured), tuple(skipped), machine_record(), versions)


def _measure(way: str, job: GenerationJob, runs: int, timeout_s: float | None, clock: Clock, generate: Run) -> Measured:
    with scratch_folder("bench") as scratch:
        own = replace(job, **WAYS[way], dir=scratch / "vault", mode="compile")
        if way == MEGA_CACHE:
            own = replace(own, artifacts=scratch / "artifacts")
        elif own.method in COMPILING:
            own = replace(own, environment=compile_caches(scratch / "cache"))
        elif own.method != "eager":
            own = replace(own, environment=own_user_cache(scratch / "cache"))
        keeps = own.method != "eager"

        def run(number: int) -> GenerationResult:
            label = f"{way}, {'nothing on disk' if number == 0 and keeps else f'run {number + 1}'}"
            with clock.step("running in a fresh process", label):
                return generate(own, scratch / f"run-{number}", label=label, timeout_s=timeout_s)

        first = run(0)
        later = [run(number) for number in range(1, runs + keeps)] or [first]
        return Measured(
            way,
            first.seconds,
            {name: statistics.median(one.seconds[name] for one in later) for name in SECONDS},
            max(one.peak_bytes for one in later),
            len(later),
            {
                name: statistics.median(one.load_seconds.get(name, 0.0) for one in later)
                for name in later[0].load_seconds
            },
            tuple(map(statistics.median, zip(*(one.calls_s for one in later), strict=True))),
            tuple(map(statistics.median, zip(*(one.steps_s for one in later), strict=True))),
            later[-1].left_eager,
        )
