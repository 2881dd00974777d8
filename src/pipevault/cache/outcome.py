"""The outcome of a load, for people and for programs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any, TypeAlias

from pipevault.digest import Digest
from pipevault.key import Difference, Key


@dataclass(frozen=True)
class Step:
    """One step of a load. ``seconds`` is ``None`` when the step begins and its duration when it ends; ``failed`` tells
    that it ended with an error.

    ``action`` is ``capture``, ``compile``, ``check``, ``publish``, ``load`` or ``wait``; ``part`` is empty for steps
    of the whole pipeline. ``position`` is that of a graph among those that are frozen, such as ``2 of 5``.
    """

    part: str
    action: str
    seconds: float | None = None
    detail: str = ""
    position: str = ""
    failed: bool = False


Progress: TypeAlias = Callable[[Step], None]


@dataclass(frozen=True)
class PartOutcome:
    """The outcome of a part. ``status`` is ``frozen``, ``eager`` (a call of it is; ``reason``) or ``not called``.

    ``regions`` names the blocks of a part that are frozen in its place, such as ``19 FluxTransformerBlock``.
    """

    status: str
    reason: str = ""
    graphs: int = 0
    regions: str = ""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Outcome:
    """The outcome of loading a pipeline.

    ``status`` is ``hit``, ``miss`` (compiled; ``reason`` says why nothing was found), ``partial`` (some called part
    runs eagerly) or ``off``. ``stored`` tells whether the vault holds the entry. ``seconds`` maps each step to its
    duration. With several shapes, ``entries`` has an outcome for each and the other fields sum them up.

    ``tier`` is the folder where a hit was found, also if it was copied to a nearer one and loaded from there; empty for
    a miss, and for several shapes from different tiers. ``problems`` are sentences about what went wrong and did not
    stop the load: a tier that is broken or slow, a damaged file, a copy that failed.
    """

    status: str
    key: Digest | None = None
    reason: str = ""
    parts: Mapping[str, PartOutcome] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)
    stored: bool = False
    manifest: Digest | None = None
    entries: tuple[Outcome, ...] = ()
    tier: str = ""
    problems: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return {
            **vars(self),
            "key": self.key.hex if self.key else None,
            "parts": {name: part.to_json() for name, part in self.parts.items()},
            "seconds": dict(self.seconds),
            "manifest": self.manifest.hex if self.manifest else None,
            "entries": [entry.to_json() for entry in self.entries],
            "problems": list(self.problems),
        }


@dataclass(frozen=True)
class Explanation:
    """The outcome that a load would have.

    ``status`` is ``hit`` or ``miss``; on a miss, ``nearest`` is the nearest entry and ``differences`` what differs.
    On a hit, ``parts`` are those of the entry and ``tier`` is the folder that has it. ``problems``: see
    :class:`Outcome`. ``with_graphs`` names the parts that have graphs though no plan tells whether they suffice.
    """

    key: Key
    status: str
    reason: str
    nearest: Digest | None = None
    differences: tuple[Difference, ...] = ()
    parts: Mapping[str, PartOutcome] = field(default_factory=dict)
    tier: str = ""
    problems: tuple[str, ...] = ()
    with_graphs: tuple[str, ...] = ()


def combine(entries: tuple[Outcome, ...]) -> Outcome:
    """Return one outcome for several shapes: the worst status, each part's worst status, and seconds added up."""
    if len(entries) == 1:
        return entries[0]
    order = ("hit", "miss", "partial")
    status = max((entry.status for entry in entries), key=order.index)
    parts: dict[str, PartOutcome] = {}
    seconds: dict[str, float] = {}
    for entry in entries:
        for name, part in entry.parts.items():
            known = parts.get(name)
            eager = next((p for p in (known, part) if p and p.status == "eager"), None)
            if eager is not None:
                parts[name] = replace(part, status="eager", reason=eager.reason, graphs=0)
            else:
                parts[name] = replace(part, reason="", graphs=part.graphs + (known.graphs if known else 0))
        for step, duration_s in entry.seconds.items():
            seconds[step] = seconds.get(step, 0.0) + duration_s
    reasons = dict.fromkeys(entry.reason for entry in entries if entry.reason)
    return Outcome(
        status=status,
        key=entries[0].key,
        reason="; ".join(reasons),
        parts=parts,
        seconds=seconds,
        stored=all(entry.stored for entry in entries),
        manifest=entries[0].manifest,
        entries=entries,
        tier=entries[0].tier if len({entry.tier for entry in entries}) == 1 else "",
        problems=tuple(dict.fromkeys(problem for entry in entries for problem in entry.problems)),
    )


class Clock:
    """A clock that measures the steps of a load and reports them as they begin and end."""

    def __init__(self, progress: Progress | None) -> None:
        self._progress = progress
        self.seconds: dict[str, float] = {}

    def report(self, step: Step) -> None:
        if self._progress:
            self._progress(step)

    def add(self, name: str, seconds: float) -> None:
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds

    @contextmanager
    def timed(self, action: str) -> Iterator[None]:
        """Measure what is too short to be reported."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.add(action, time.perf_counter() - start)

    @contextmanager
    def step(self, action: str, part: str = "", detail: str = "") -> Iterator[None]:
        self.report(Step(part, action, None, detail))
        start, failed = time.perf_counter(), True
        try:
            yield
            failed = False
        finally:
            duration_s = time.perf_counter() - start
            self.add(f"{action} {part}".rstrip(), duration_s)
            self.report(Step(part, action, duration_s, detail, failed=failed))
