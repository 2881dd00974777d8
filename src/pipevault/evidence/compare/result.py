"""The result of a comparison: its runs, and how far each is from the one that it is compared with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from pipevault.errors import DifferentOutputError
from pipevault.evidence.files import Array
from pipevault.evidence.generation_job import GenerationResult
from pipevault.evidence.metrics import Distance
from pipevault.evidence.request import Request


@dataclass(frozen=True)
class PlannedRun:
    """A run to make. ``against`` names the run that it is compared with; ``group`` is what ``--runs`` selects by.

    ``change`` is what differs from the first eager run: ``threads``, ``isa``, ``batch`` or nothing.
    """

    name: str
    group: str
    method: str
    against: str | None = None
    change: str = ""


@dataclass(frozen=True)
class FinishedRun:
    """A run that was made. ``note`` says what was changed: ``2 threads, not 1``. ``latents`` are the last ones, in
    float32, samples first.

    ``equal``, ``pixels_distance``, ``latents_distance`` and ``same_noise`` are to the run ``plan.against``; ``None``
    where there is none, where the pipeline shows no latents, and for the noise where the batch has another size.
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
    """The runs of a comparison. ``prewarm`` made sure that the vault held the entry; ``skipped`` has the name and the
    reason of each run that was left out.
    """

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
