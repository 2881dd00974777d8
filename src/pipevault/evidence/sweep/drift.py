"""The differences of a sweep from an earlier one of the same model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from pipevault.errors import SettingsError
from pipevault.evidence.quality import SCORES
from pipevault.evidence.sweep.result import Shift, SweepResult, paired_shift


@dataclass(frozen=True)
class Drift:
    """A drift. ``changed`` are the (prompt, seed) whose pictures have another SHA-256, of ``compared`` in both sweeps.

    ``shifts`` are new minus old over the same pairs; scores that compare seeds have one only where the seeds are the
    same. ``context`` says what else was different about the sweeps.
    """

    compared: int
    changed: tuple[tuple[str, int], ...]
    shifts: Mapping[str, Shift]
    context: tuple[str, ...]

    @property
    def summary(self) -> str:
        if not self.changed:
            return f"All {self.compared} pictures that both sweeps have are the same, bit by bit."
        return f"{len(self.changed)} of the {self.compared} pictures that both sweeps have differ."

    def to_json(self) -> dict[str, Any]:
        changed = [{"prompt": prompt, "seed": seed} for prompt, seed in self.changed]
        return {**asdict(self), "changed": changed, "context": list(self.context)}


def check_baseline(baseline: SweepResult, model: str) -> None:
    if baseline.model != model:
        raise SettingsError(f"The baseline is a sweep of {baseline.model}, not of {model}: give one of this model.")


def drift(new: SweepResult, baseline: SweepResult) -> Drift:
    """Compare ``new`` with ``baseline``, over the prompts and seeds that both have. :class:`SettingsError`."""
    check_baseline(baseline, new.model)
    if baseline.pipeline != new.pipeline:
        raise SettingsError(
            f"The baseline was drawn by {baseline.pipeline} and this sweep by {new.pipeline}: give one of this class."
        )
    before, now = baseline.cells(baseline.pixels), new.cells(new.pixels)
    pairs = [pair for pair in before if pair in now]
    if not pairs:
        raise SettingsError(
            "The baseline has no picture in common with this sweep: its prompts begin with "
            f"{baseline.prompts[0]!r} and its seeds with {baseline.seeds[0]}."
        )
    shifts = {}
    for name, table in new.scores.items():
        if name in baseline.scores and (set(new.seeds) == set(baseline.seeds) or not SCORES[name].of_pairs):
            old, own = baseline.cells(baseline.scores[name]), new.cells(table)
            shifts[name] = paired_shift([old[pair] for pair in pairs], [own[pair] for pair in pairs])
    changed = tuple(pair for pair in pairs if before[pair] != now[pair])
    then, here = _facts(baseline), _facts(new)
    both = {name: (then.get(name, "none"), here.get(name, "none")) for name in {**then, **here}}
    context = (f"{name}: {_short(one)} then, {_short(two)} now" for name, (one, two) in both.items() if one != two)
    return Drift(len(pairs), changed, shifts, tuple(context))


def _facts(sweep: SweepResult) -> dict[str, str]:
    lists = {"prompts": sweep.prompts, "seeds": sorted(sweep.seeds), "scores": sweep.scores}
    facts: dict[str, Any] = {name: ", ".join(map(str, values)) for name, values in lists.items()}
    facts |= {"outlier seeds": ", ".join(map(str, sweep.outlier_seeds())) or "none", "batch size": sweep.batch_size}
    groups = {"call": sweep.call, "level": sweep.level, "weights": sweep.weights, "version": sweep.versions}
    for group, values in {**groups, "machine": sweep.machine}.items():
        facts |= {f"{group} {name}": value for name, value in sorted(values.items())}
    return {name: "none" if value is None else str(value) for name, value in {**facts, "key": sweep.key}.items()}


def _short(text: str) -> str:
    return text if len(text) <= 24 else f"{text[:12]}…"
