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

import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NoReturn

from pipevault.determinism.quality import SCORES
from pipevault.determinism.seeds import MAX_SEED
from pipevault.determinism.variance import SeedEffects, VarianceShares, seed_effects, variance_shares
from pipevault.digest import canonical_json
from pipevault.errors import SettingsError
from pipevault.reading import read_file

SWEEP_MARK = "pipevault_sweep"
"""The field that makes a JSON document a sweep; its value is the version."""
SWEEP_VERSION = 1

_SHA256 = re.compile(r"[0-9a-f]{64}")


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
    batch_size: int
    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    pixels: tuple[tuple[str, ...], ...]
    scores: Mapping[str, tuple[tuple[float, ...], ...]]
    not_available: Mapping[str, str]
    key: str | None
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
        try:
            document = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise SettingsError(f"{source} is no sweep: it is not JSON ({error}). Give a sweep.json.") from error
        if not isinstance(document, dict) or SWEEP_MARK not in document:
            raise SettingsError(f"{source} is no sweep: it has no field {SWEEP_MARK!r}. Give a sweep.json.")
        _check_version(document[SWEEP_MARK], source)
        known = {item.name for item in fields(cls)}
        content = {name: value for name, value in document.items() if name not in (SWEEP_MARK, "found")}
        for name in sorted(known ^ set(content)):
            _fail(source, name, "is missing" if name in known else "is none that a sweep has")
        _check_fields(content, source)
        return cls(
            **content
            | {
                "prompts": tuple(content["prompts"]),
                "seeds": tuple(content["seeds"]),
                "pixels": tuple(map(tuple, content["pixels"])),
                "scores": {
                    name: tuple(tuple(map(float, row)) for row in table) for name, table in content["scores"].items()
                },
                "notes": tuple(content["notes"]),
            }
        )


def read_sweep(path: Path) -> SweepResult:
    """The sweep in a file; :class:`SettingsError` if it cannot be read or is none."""
    try:
        text = read_file(path, limit_bytes=1 << 30)
    except OSError as error:
        raise SettingsError(f"The sweep {path} cannot be read: {error.strerror or error}.") from error
    return SweepResult.from_json(text, source=str(path))


def _check_version(version: Any, source: str) -> None:
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        _fail(source, SWEEP_MARK, f"is {version!r}, which is no version")
    if version > SWEEP_VERSION:
        raise SettingsError(
            f"{source} is a sweep of version {version}; this pipevault knows up to {SWEEP_VERSION}. Upgrade pipevault, "
            "or sweep again with this one."
        )


def _check_fields(content: Mapping[str, Any], source: str) -> None:
    for name in ("model", "pipeline", "outcome", "created_at"):
        if not isinstance(content[name], str):
            _fail(source, name, "is no text")
    for name in ("call", "scores", "not_available", "level", "weights", "versions", "machine"):
        if not isinstance(content[name], dict):
            _fail(source, name, "is no object")
    for name in ("not_available", "level", "weights"):
        if not all(isinstance(value, str) for value in content[name].values()):
            _fail(source, name, "holds what is no text")
    if content["key"] is not None and not _is_sha256(content["key"]):
        _fail(source, "key", "is no SHA-256")
    if not _is_count(content["batch_size"]) or content["batch_size"] < 1:
        _fail(source, "batch_size", "is no whole number above 0")
    prompts, seeds = content["prompts"], content["seeds"]
    if not _is_list_of(prompts, lambda prompt: isinstance(prompt, str)) or not prompts:
        _fail(source, "prompts", "is no list of texts")
    if not _is_list_of(seeds, lambda seed: _is_count(seed) and 0 <= seed <= MAX_SEED) or not seeds:
        _fail(source, "seeds", "is no list of seeds")
    for name, values in (("prompts", prompts), ("seeds", seeds)):
        if len(set(values)) != len(values):
            _fail(source, name, "names one twice")
    if not _is_list_of(content["notes"], lambda note: isinstance(note, str)):
        _fail(source, "notes", "is no list of texts")
    shape = (len(prompts), len(seeds))
    _check_table(content["pixels"], shape, _is_sha256, source, "pixels")
    for name, table in content["scores"].items():
        if name not in SCORES:
            _fail(source, f"scores.{name}", "is no score that this pipevault knows")
        _check_table(table, shape, _is_finite, source, f"scores.{name}")


def _check_table(table: Any, shape: tuple[int, int], accepts: Any, source: str, name: str) -> None:
    rows, columns = shape
    well_formed = _is_list_of(table, lambda row: _is_list_of(row, accepts) and len(row) == columns)
    if not well_formed or len(table) != rows:
        _fail(source, name, f"is no table of {rows} prompts by {columns} seeds")


def _is_list_of(value: Any, accepts: Any) -> bool:
    return isinstance(value, list) and all(map(accepts, value))


def _is_sha256(value: Any) -> bool:
    return isinstance(value, str) and _SHA256.fullmatch(value) is not None


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _fail(source: str, name: str, complaint: str) -> NoReturn:
    raise SettingsError(
        f"{source} cannot be used: its field {name!r} {complaint}. Give a sweep.json as it was written."
    )
