"""The document of a sweep, which a later sweep can be compared with.

Canonical JSON, one line; rows are prompts, columns are seeds::

    {"pipevault_sweep": 1, "created_at": "2026-01-31T12:00:00+00:00",
     "model": "demo", "pipeline": "StableDiffusionPipeline", "call": {"steps": 12, ...}, "batch_size": 10,
     "prompts": ["a handwritten zero", ...], "seeds": [0, 1, ...],
     "pixels": [["<sha256>", ...], ...], "scores": {"contrast": [[0.21, ...], ...], ...},
     "not_available": {"lpips": "the package lpips is not installed"},
     "key": "<sha256>", "outcome": "hit", "level": {"asked": "repeatable", "achieved": "repeatable"},
     "weights": {"unet": "<sha256>"}, "versions": {...}, "machine": {...}, "notes": [],
     "found": {"variance_shares": {...}, "outlier_seeds": {...}}}

``found`` follows from ``scores`` and is for people and other programs: reading computes it again.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import msgspec

from pipevault.determinism.seeds import MAX_SEED
from pipevault.digest import canonical_json
from pipevault.errors import SettingsError
from pipevault.evidence.quality import SCORES
from pipevault.evidence.sweep.variance import SeedEffects, VarianceShares, seed_effects, variance_shares
from pipevault.files.documents import Format, Problem, Sha256
from pipevault.reading import read_file

SWEEP_VERSION = 1


class SweepResult(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The result of a sweep. ``pixels`` and each of ``scores`` have a row for each prompt, a column for each seed.

    ``pixels`` are SHA-256 of each picture's bytes. ``not_available`` says of each score that is not in ``scores`` why.
    ``prompts`` is ``("",)`` for a pipeline that takes none. All mappings are plain JSON.
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
        """Return the shares of each score's variance."""
        return {name: variance_shares(table) for name, table in self.scores.items()}

    def seed_effects(self) -> dict[str, SeedEffects]:
        """Return the effects of the seeds on each score."""
        return {name: seed_effects(table, resolution=SCORES[name].resolution) for name, table in self.scores.items()}

    def outlier_seeds(self) -> dict[int, list[str]]:
        """Return the seeds that stand out, each with the names of the scores in which it does."""
        effects = self.seed_effects().items()
        found = [(seed, [name for name, one in effects if at in one.outliers]) for at, seed in enumerate(self.seeds)]
        return {seed: names for seed, names in found if names}

    def cells(self, table: Sequence[Sequence[Any]]) -> dict[tuple[str, int], Any]:
        """Return the values of a table by (prompt, seed)."""
        values = (value for row in table for value in row)
        return dict(zip(itertools.product(self.prompts, self.seeds), values, strict=True))

    def to_document(self) -> dict[str, Any]:
        """Return plain JSON."""
        found = {
            "variance_shares": {name: asdict(shares) for name, shares in self.variance_shares().items()},
            "outlier_seeds": {str(seed): names for seed, names in self.outlier_seeds().items()},
        }
        return {**msgspec.structs.asdict(self), "found": found}

    def to_json(self) -> str:
        """Return the document as canonical JSON."""
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
    """Read the sweep in a file. :class:`SettingsError` if it cannot be read, or holds something else."""
    try:
        return SweepResult.from_json(read_file(path, limit_bytes=1 << 30), source=str(path))
    except OSError as error:
        raise SettingsError(f"The sweep {path} cannot be read: {error.strerror or error}.") from error


def _unusable(problem: Problem) -> SettingsError:
    return SettingsError(f"The sweep {problem} Give a sweep.json as it was written.")


def _newer(problem: Problem) -> SettingsError:
    return SettingsError(f"The sweep {problem} Upgrade pipevault, or sweep again with this one.")


_FORMAT = Format(SweepResult, "pipevault_sweep", SWEEP_VERSION, damaged=_unusable, newer=_newer, canonical=False)
