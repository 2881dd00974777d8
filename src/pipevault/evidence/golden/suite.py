"""A suite of goldens: a model, and the fixed-seed generations to hold it to."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeAlias

import msgspec

from pipevault.errors import SettingsError
from pipevault.evidence.request import Request

Distance: TypeAlias = Annotated[float, msgspec.Meta(ge=0, le=sys.float_info.max)]


class Limits(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The largest distances that pass, in the units of the output: 0 to 255 for uint8 pixels.

    ``None``: not limited here.
    """

    pixels_max_abs: Distance | None = None
    pixels_mean_abs: Distance | None = None
    latents_max_abs: Distance | None = None
    latents_mean_abs: Distance | None = None

    def over(self, base: Limits) -> Limits:
        """Return these limits, and those of ``base`` where there is none here."""
        return Limits(**{**base.to_json(), **self.to_json()})

    def to_json(self) -> dict[str, float]:
        """Return the limits that are given."""
        return {name: value for name, value in msgspec.structs.asdict(self).items() if value is not None}

    @classmethod
    def from_json(cls, table: Any) -> Limits:
        """Read limits from plain JSON. ``ValueError`` says which field is wrong, and how."""
        return msgspec.convert(table, cls)


@dataclass(frozen=True)
class Case:
    """One generation of a suite. ``name`` is safe as the name of a folder."""

    name: str
    request: Request
    limits: Limits


@dataclass(frozen=True)
class Suite:
    """A suite as it was read. ``level`` is ``None`` where it follows the settings."""

    path: Path
    model: str
    cases: tuple[Case, ...]
    dtype: str | None = None
    device: str | None = None
    pipeline_class: str | None = None
    level: str | None = None
    other_machine: bool = False
    other_key: bool = False

    def selected(self, names: tuple[str, ...]) -> tuple[Case, ...]:
        """Return the cases of these names, all of them for none. :class:`SettingsError` for a name that no case has."""
        known = [case.name for case in self.cases]
        if unknown := [name for name in names if name not in known]:
            raise SettingsError(f"{self.path} has no case {unknown[0]!r}. Its cases: {', '.join(known)}.")
        return tuple(case for case in self.cases if not names or case.name in names)
