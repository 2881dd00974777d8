"""The document of a sweep, which a later sweep can be compared with, and what its scores say of the seed.

Canonical JSON, one line; rows are prompts, columns are seeds::

    {"pipevault_sweep": 1, "created_at": "2026-01-31T12:00:00+00:00",
     "model": "demo", "pipeline": "StableDiffusionPipeline", "call": {"steps": 12, ...}, "batch_size": 10,
     "prompts": ["a handwritten zero", ...], "seeds": [0, 1, ...],
     "pixels": [["<sha256>", ...], ...], "scores": {"contrast": [[0.21, ...], ...], ...},
     "not_available": {"lpips": "the package lpips is not installed"},
     "key": "<sha256>", "outcome": "hit", "level": {"asked": "repeatable", "achieved": "repeatable"},
     "weights": {"unet": "<sha256>"}, "versions": {...}, "machine": {...}, "notes": [],
     "found": {"variance_shares": {...}, "outlier_seeds": {...}}}

``found`` follows from ``scores`` and is for people and other programs: reading computes it again. The statistics are
SciPy's (extra ``report``), of a table with a row for each prompt and a column for each seed, all values finite.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np

from pipevault.compat.extras import import_extra
from pipevault.determinism.seeds import MAX_SEED
from pipevault.digest import canonical_json
from pipevault.errors import SettingsError
from pipevault.evidence.quality import SCORES
from pipevault.files.documents import Format, Sha256
from pipevault.reading import read_file

SWEEP_VERSION = 1
OUTLIER_Z, MIN_SEEDS_FOR_OUTLIERS = 3.5, 6
"""Iglewicz and Hoaglin, How to Detect and Handle Outliers, ASQC 1993; https://www.itl.nist.gov/div898/handbook/eda/section3/eda35h.htm"""
_RESAMPLING = {"permutation_type": "samples", "n_resamples": 9999, "batch": 256}
_RESAMPLING_SEED = 20260131


@dataclass(frozen=True)
class VarianceShares:
    """Shares of the total sum of squares, 0 to 1, that sum to 1; all 0 for a score that is the same everywhere.
    ``remainder`` is the interaction of prompt and seed, since a picture has no noise.
    """

    prompt: float
    seed: float
    remainder: float


def variance_shares(table: Sequence[Sequence[float]]) -> VarianceShares:
    """Divide the total sum of squares of P prompts and S seeds two ways, without replication::

        S sum_p (prompt mean - mean)^2  +  P sum_s (seed mean - mean)^2  +  remainder

    Montgomery, Design and Analysis of Experiments, ch. 4 (randomized block design); the shares are eta squared.
    """
    values = np.asarray(table, dtype=np.float64)
    values = values - values[0, 0]  # a constant table is exactly 0 from here on
    if not values.any():
        return VarianceShares(0.0, 0.0, 0.0)
    values = values / np.abs(values).max()
    values = values - values.mean()
    by_prompt, by_seed = values.mean(axis=1, keepdims=True), values.mean(axis=0, keepdims=True)
    parts = (by_prompt, by_seed, values - by_prompt - by_seed)
    squares = [float(np.square(np.broadcast_to(part, values.shape)).sum()) for part in parts]
    return VarianceShares(*(square / sum(squares) for square in squares))


@dataclass(frozen=True)
class SeedEffects:
    """The effects of the seeds on a score: each seed's mean over the prompts less their median, in the score's unit.
    ``z`` are modified z-scores, 0 for fewer than 6 seeds; ``outliers`` are columns.
    """

    effects: tuple[float, ...]
    z: tuple[float, ...]
    outliers: tuple[int, ...]


def seed_effects(table: Sequence[Sequence[float]], *, resolution: float = 0.0) -> SeedEffects:
    """Find the seeds that stand out in a score, averaged over the prompts.

    Modified z = (effect - median) / normalised MAD, an outlier beyond 3.5. Where the MAD is 0, more than half of the
    seeds are equal; then 1.2533 times the mean absolute deviation takes its place, as in SPSS. A seed whose effect is
    within ``resolution`` is never flagged. Of sweeps with normally distributed scores 14 % flag some seed at 8 seeds
    and 9 % at 32 (simulated), so a flag asks for a look at the pictures and proves nothing.
    """
    means = np.asarray(table, dtype=np.float64).mean(axis=0)
    effects = means - np.median(means)
    spread = float(_stats().median_abs_deviation(effects, scale="normal"))
    if spread == 0:
        spread = float(np.abs(effects).mean()) * math.sqrt(math.pi / 2)
    z = effects / (spread if spread and len(effects) >= MIN_SEEDS_FOR_OUTLIERS else math.inf)
    outliers = np.flatnonzero((np.abs(z) > OUTLIER_Z) & (np.abs(effects) >= resolution))
    return SeedEffects(tuple(effects.tolist()), tuple(z.tolist()), tuple(outliers.tolist()))


@dataclass(frozen=True)
class Shift:
    """The shift of a score over ``pairs`` of the same (prompt, seed), new minus old, in the score's unit.
    ``standard_error`` is ``None`` for a single pair.
    """

    mean: float
    standard_error: float | None
    p_value: float
    pairs: int


def paired_shift(old: Sequence[float], new: Sequence[float]) -> Shift:
    """Test the paired differences by flipping their signs, two-sided (``scipy.stats.permutation_test``).

    p is exact up to 13 pairs that moved, else from 9999 patterns drawn with a fixed seed; pairs are independent.
    """
    differences = np.asarray(new, dtype=np.float64) - np.asarray(old, dtype=np.float64)
    moved, p_value = differences[differences != 0], 1.0  # a flipped 0 is the same 0
    if len(moved) > 1:
        rng = np.random.default_rng(_RESAMPLING_SEED)
        p_value = float(_stats().permutation_test((moved,), np.mean, **_RESAMPLING, rng=rng).pvalue)
    error = float(_stats().sem(differences)) if len(differences) > 1 else None
    return Shift(float(differences.mean()), error, p_value, len(differences))


def _stats() -> Any:
    return import_extra("scipy.stats", "SciPy", "report")


class SweepResult(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The result of a sweep. ``pixels`` (SHA-256) and each of ``scores`` have a row for each prompt, a column for each
    seed. ``prompts`` is ``("",)`` for a pipeline that takes none.
    """

    pipevault_sweep: int = SWEEP_VERSION
    model: str
    pipeline: str
    call: Mapping[str, Any]
    batch_size: Annotated[int, msgspec.Meta(ge=1)]
    prompts: Annotated[tuple[str, ...], msgspec.Meta(min_length=1)]
    seeds: Annotated[tuple[Annotated[int, msgspec.Meta(ge=0)], ...], msgspec.Meta(min_length=1)]
    pixels: tuple[tuple[Sha256, ...], ...]
    scores: Mapping[str, tuple[tuple[float, ...], ...]]
    not_available: Mapping[str, str]
    key: Sha256 | None
    outcome: str
    level: Mapping[str, str]
    weights: Mapping[str, str]
    versions: Mapping[str, str | None]
    machine: Mapping[str, Any]
    notes: tuple[str, ...]
    created_at: str
    found: Mapping[str, Any] = {}

    def variance_shares(self) -> dict[str, VarianceShares]:
        return {name: variance_shares(table) for name, table in self.scores.items()}

    def seed_effects(self) -> dict[str, SeedEffects]:
        return {name: seed_effects(table, resolution=SCORES[name].resolution) for name, table in self.scores.items()}

    def outlier_seeds(self) -> dict[int, list[str]]:
        """Return the seeds that stand out, each with the names of the scores in which it does."""
        effects = self.seed_effects().items()
        found = [(seed, [name for name, one in effects if at in one.outliers]) for at, seed in enumerate(self.seeds)]
        return {seed: names for seed, names in found if names}

    def cells(self, table: Sequence[Sequence[Any]]) -> dict[tuple[str, int], Any]:
        values = (value for row in table for value in row)
        return dict(zip(itertools.product(self.prompts, self.seeds), values, strict=True))

    def to_document(self) -> dict[str, Any]:
        found = {
            "variance_shares": {name: asdict(shares) for name, shares in self.variance_shares().items()},
            "outlier_seeds": {str(seed): names for seed, names in self.outlier_seeds().items()},
        }
        return {**msgspec.structs.asdict(self), "found": found}

    def to_json(self) -> str:
        return canonical_json(self.to_document()).decode("utf-8")

    @classmethod
    def from_json(cls, text: str | bytes, *, source: str = "the sweep") -> SweepResult:
        """Read what :meth:`to_json` wrote. :class:`SettingsError` names ``source`` and the field that is wrong."""
        sweep = msgspec.structs.replace(_FORMAT.parse(text, source), found={})
        for name, values in (("prompts", sweep.prompts), ("seeds", sweep.seeds)):
            if len(set(values)) != len(values):
                raise _FORMAT.bad(source, name, "it names one twice")
        if max(sweep.seeds) > MAX_SEED:
            raise _FORMAT.bad(source, "seeds", f"expected numbers up to {MAX_SEED}")
        if unknown := next((name for name in sweep.scores if name not in SCORES), None):
            raise _FORMAT.bad(source, f"scores.{unknown}", "unknown")
        rows, columns = len(sweep.prompts), len(sweep.seeds)
        tables = {"pixels": sweep.pixels, **{f"scores.{name}": table for name, table in sweep.scores.items()}}
        for name, table in tables.items():
            if len(table) != rows or any(len(row) != columns for row in table):
                raise _FORMAT.bad(source, name, f"expected a table of {rows} prompts by {columns} seeds")
        return sweep


def read_sweep(path: Path) -> SweepResult:
    try:
        return SweepResult.from_json(read_file(path, limit_bytes=1 << 30), source=str(path))
    except OSError as error:
        raise SettingsError(f"The sweep {path} cannot be read: {error.strerror or error}.") from error


_FORMAT = Format(
    SweepResult,
    "pipevault_sweep",
    SWEEP_VERSION,
    damaged=lambda problem: SettingsError(f"The sweep {problem} Give a sweep.json as it was written."),
    newer=lambda problem: SettingsError(f"The sweep {problem} Upgrade pipevault, or sweep again with this one."),
    canonical=False,
)
