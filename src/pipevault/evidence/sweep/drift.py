"""How a sweep differs from an earlier one of the same model: pictures, scores, outlier seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipevault.errors import SettingsError
from pipevault.evidence.sweep.quality import SCORES
from pipevault.evidence.sweep.result import SweepResult
from pipevault.evidence.sweep.variance import Shift, paired_shift


@dataclass(frozen=True)
class Drift:
    """``changed`` are the (prompt, seed) whose pictures have another SHA-256, of ``compared`` that both sweeps have.

    ``shifts`` are new minus old over the same pairs; scores that compare seeds have one only where the seeds are the
    same. ``context`` says what was different about the sweeps themselves.
    ``missing`` has what only one side has: ``prompts here``, ``seeds in the baseline``, ``scores here``, …
    """

    compared: int
    changed: tuple[tuple[str, int], ...]
    shifts: Mapping[str, Shift]
    new_outliers: tuple[int, ...]
    gone_outliers: tuple[int, ...]
    context: tuple[str, ...]
    missing: Mapping[str, tuple[str, ...]]

    @property
    def drifted(self) -> bool:
        """Whether a picture changed; scores cannot move without that, unless their own code did."""
        return bool(self.changed)

    def to_json(self) -> dict[str, Any]:
        return {
            "compared": self.compared,
            "changed": [{"prompt": prompt, "seed": seed} for prompt, seed in self.changed],
            "shifts": {name: shift.to_json() for name, shift in self.shifts.items()},
            "new_outliers": list(self.new_outliers),
            "gone_outliers": list(self.gone_outliers),
            "context": list(self.context),
            "missing": {name: list(values) for name, values in self.missing.items()},
        }


def check_baseline(baseline: SweepResult, model: str) -> None:
    """:class:`SettingsError` for a sweep of another model."""
    if baseline.model != model:
        raise SettingsError(f"The baseline is a sweep of {baseline.model}, not of {model}: give one of this model.")


def drift(new: SweepResult, baseline: SweepResult) -> Drift:
    """``new`` against ``baseline``, over the prompts and seeds that both have.

    :class:`SettingsError` for another model or pipeline class, and if no picture is in both.
    """
    check_baseline(baseline, new.model)
    if baseline.pipeline != new.pipeline:
        raise SettingsError(
            f"The baseline was drawn by {baseline.pipeline} and this sweep by {new.pipeline}: give one of this class."
        )
    pairs = [
        (prompt, seed, (new.prompts.index(prompt), new.seeds.index(seed)), (row, column))
        for row, prompt in enumerate(baseline.prompts)
        if prompt in new.prompts
        for column, seed in enumerate(baseline.seeds)
        if seed in new.seeds
    ]
    if not pairs:
        raise SettingsError(
            "The baseline has no picture in common with this sweep: its prompts begin with "
            f"{baseline.prompts[0]!r} and its seeds with {baseline.seeds[0]}."
        )
    same_seeds = set(new.seeds) == set(baseline.seeds)
    shared = [name for name in new.scores if name in baseline.scores and (same_seeds or not SCORES[name].of_pairs)]
    seeds = set(new.seeds) & set(baseline.seeds)
    before, now = (set(sweep.outlier_seeds()) & seeds for sweep in (baseline, new))
    return Drift(
        compared=len(pairs),
        changed=tuple(
            (prompt, seed)
            for prompt, seed, here, there in pairs
            if _at(new.pixels, here) != _at(baseline.pixels, there)
        ),
        shifts={
            name: paired_shift(
                [_at(baseline.scores[name], there) for *_, there in pairs],
                [_at(new.scores[name], here) for *_, here, _ in pairs],
            )
            for name in shared
        },
        new_outliers=tuple(seed for seed in new.seeds if seed in now - before),
        gone_outliers=tuple(seed for seed in baseline.seeds if seed in before - now),
        context=tuple(_context(new, baseline)),
        missing=_missing(new, baseline),
    )


def _at(table: Sequence[Sequence[Any]], cell: tuple[int, int]) -> Any:
    return table[cell[0]][cell[1]]


def _context(new: SweepResult, baseline: SweepResult) -> list[str]:
    told = []
    if new.batch_size != baseline.batch_size:
        told.append(f"batch size: {baseline.batch_size} then, {new.batch_size} now")
    for what, then, now in (
        ("call", baseline.call, new.call),
        ("level", baseline.level, new.level),
        ("weights", baseline.weights, new.weights),
        ("version", baseline.versions, new.versions),
        ("machine", baseline.machine, new.machine),
    ):
        for name in sorted({*then, *now}):
            if then.get(name) != now.get(name):
                told.append(f"{what} {name}: {_short(then.get(name))} then, {_short(now.get(name))} now")
    if new.key != baseline.key:
        told.append(f"key: {_short(baseline.key)} then, {_short(new.key)} now")
    return told


def _short(value: Any) -> str:
    text = "none" if value is None else str(value)
    return text if len(text) <= 24 else f"{text[:12]}…"


def _missing(new: SweepResult, baseline: SweepResult) -> dict[str, tuple[str, ...]]:
    found = {}
    for what, here, there in (
        ("prompts", new.prompts, baseline.prompts),
        ("seeds", new.seeds, baseline.seeds),
        ("scores", tuple(new.scores), tuple(baseline.scores)),
    ):
        found[f"{what} here"] = tuple(str(one) for one in there if one not in here)
        found[f"{what} in the baseline"] = tuple(str(one) for one in here if one not in there)
    return {name: values for name, values in found.items() if values}
