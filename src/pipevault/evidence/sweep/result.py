"""What a sweep found, as a document that a later sweep can be compared with.

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

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated, Any, TypeAlias, get_type_hints

import msgspec

from pipevault.determinism.seeds import MAX_SEED
from pipevault.digest import canonical_json
from pipevault.errors import SettingsError
from pipevault.evidence.sweep.quality import SCORES
from pipevault.evidence.sweep.variance import SeedEffects, VarianceShares, seed_effects, variance_shares
from pipevault.files.documents import Format, Problem, Sha256
from pipevault.reading import read_file

SWEEP_MARK = "pipevault_sweep"
"""The field that makes a JSON document a sweep; its value is the version."""
SWEEP_VERSION = 1

_Seed: TypeAlias = Annotated[int, msgspec.Meta(ge=0)]


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


@dataclass(frozen=True, kw_only=True)
class SweepResult:
    """``pixels`` and each table of ``scores`` have a row for each prompt and a column for each seed.

    ``pixels`` are SHA-256 of each picture's bytes. ``not_available`` says of each score that is not in ``scores`` why.
    ``prompts`` is ``("",)`` for a pipeline that takes none. All mappings are plain JSON.
    """

    model: str
    pipeline: str
    call: Mapping[str, Any]
    batch_size: Annotated[int, msgspec.Meta(ge=1)]
    prompts: Annotated[tuple[str, ...], msgspec.Meta(min_length=1)]
    seeds: Annotated[tuple[_Seed, ...], msgspec.Meta(min_length=1)]
    pixels: tuple[tuple[Sha256, ...], ...]
    scores: Mapping[str, tuple[tuple[float, ...], ...]]
    not_available: Mapping[str, str]
    key: Sha256 | None
    outcome: str
    level: Mapping[str, str]
    weights: Mapping[str, str]
    versions: Mapping[str, str | None]
    machine: Mapping[str, Any]
    notes: tuple[str, ...] = ()
    created_at: str = field(default_factory=_now)

    def variance_shares(self) -> dict[str, VarianceShares]:
        return {name: variance_shares(table) for name, table in self.scores.items()}

    def seed_effects(self) -> dict[str, SeedEffects]:
        return {name: seed_effects(table, resolution=SCORES[name].resolution) for name, table in self.scores.items()}

    def outlier_seeds(self) -> dict[int, tuple[str, ...]]:
        """The seeds that stand out, each with the names of the scores in which it does."""
        found: dict[int, list[str]] = {}
        for name, effects in self.seed_effects().items():
            for column in effects.outliers:
                found.setdefault(self.seeds[column], []).append(name)
        return {seed: tuple(found[seed]) for seed in self.seeds if seed in found}

    def to_document(self) -> dict[str, Any]:
        found = {
            "variance_shares": {name: asdict(shares) for name, shares in self.variance_shares().items()},
            "outlier_seeds": {str(seed): list(names) for seed, names in self.outlier_seeds().items()},
        }
        return {SWEEP_MARK: SWEEP_VERSION, **{item.name: getattr(self, item.name) for item in fields(self)}} | {
            "found": found
        }

    def to_json(self) -> str:
        return canonical_json(self.to_document()).decode("utf-8")

    @classmethod
    def from_json(cls, text: str | bytes, *, source: str = "the sweep") -> SweepResult:
        """Inverse of :meth:`to_json`. :class:`SettingsError` names ``source`` and the field that cannot be used."""
        document = _FORMAT.parse(text, source)
        sweep = cls(**{item.name: getattr(document, item.name) for item in fields(cls)})
        _check_tables(sweep, source)
        return sweep


def read_sweep(path: Path) -> SweepResult:
    """The sweep in a file; :class:`SettingsError` if it cannot be read or is none."""
    try:
        text = read_file(path, limit_bytes=1 << 30)
    except OSError as error:
        raise SettingsError(f"The sweep {path} cannot be read: {error.strerror or error}.") from error
    return SweepResult.from_json(text, source=str(path))


def _unusable(problem: Problem) -> SettingsError:
    return SettingsError(f"The sweep {problem} Give a sweep.json as it was written.")


def _newer(problem: Problem) -> SettingsError:
    return SettingsError(f"The sweep {problem} Upgrade pipevault, or sweep again with this one.")


_Document = msgspec.defstruct(
    "_Document",
    [(SWEEP_MARK, int), ("found", dict[str, Any], {}), *get_type_hints(SweepResult, include_extras=True).items()],
    kw_only=True,
    forbid_unknown_fields=True,
)
_FORMAT = Format(_Document, SWEEP_MARK, SWEEP_VERSION, damaged=_unusable, newer=_newer, canonical=False)


def _check_tables(sweep: SweepResult, source: str) -> None:
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
