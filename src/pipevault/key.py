"""The key of an entry: named factors that decide whether a frozen graph may be used.

A factor is anything whose change could change the compiled code or its bits. Factors are grouped by where
they come from (``architecture``, ``call``, ``machine`` …) and kept in readable form; the digest over their
canonical JSON names the entry. Paths, users, host names and ranks are never factors.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from pipevault.digest import Digest, digest_json

KEY_VERSION = 2

FACTOR_GROUPS = (
    "pipeline",
    "architecture",
    "weights",
    "call",
    "dtype",
    "machine",
    "toolchain",
    "backend",
    "determinism",
    "signature",
    "constants",
)


@dataclass(frozen=True)
class Difference:
    """One factor that two keys do not share; a value that a key lacks is ``None``."""

    factor: str
    ours: Any
    theirs: Any

    def __str__(self) -> str:
        return f"{self.factor}: {self.theirs!r} in the vault, {self.ours!r} here"


@dataclass(frozen=True)
class Key:
    """Named factors. ``factors`` maps each of :data:`FACTOR_GROUPS` to plain JSON values."""

    factors: Mapping[str, Any]

    def __post_init__(self) -> None:
        if unknown := set(self.factors) - set(FACTOR_GROUPS):
            raise ValueError(f"Unknown factor groups: {', '.join(sorted(unknown))}.")

    @property
    def kind(self) -> str:
        return "graph" if "signature" in self.factors else "plan"

    @cached_property
    def shelf(self) -> Digest:
        if self.kind == "plan":
            plans_of = {
                "class": self.factors.get("pipeline", {}).get("class"),
                "architecture": self.factors.get("architecture"),
            }
            return digest_json({"key_version": KEY_VERSION, "plans_of": plans_of})
        shared = {k: v for k, v in self.factors.items() if k not in ("signature", "constants")}
        return digest_json({"key_version": KEY_VERSION, "shelf": shared})

    @cached_property
    def digest(self) -> Digest:
        whole = digest_json({"key_version": KEY_VERSION, "factors": dict(self.factors)})
        return Digest(whole.hex[:48] + self.shelf.hex[:16])

    def differences(self, other: Key) -> tuple[Difference, ...]:
        """Every leaf factor in which ``other`` (an entry of the vault) differs from this key, sorted by name."""
        return leaf_differences(self.factors, other.factors)


def leaf_differences(ours: Mapping[str, Any], theirs: Mapping[str, Any], prefix: str = "") -> tuple[Difference, ...]:
    """Every leaf in which two nested mappings differ, sorted by its dotted name after ``prefix``."""
    here, there = dict(_leaves(ours, prefix)), dict(_leaves(theirs, prefix))
    return tuple(
        Difference(name, here.get(name), there.get(name))
        for name in sorted(here.keys() | there.keys())
        if here.get(name) != there.get(name)
    )


def nearest(key: Key, others: Iterable[Key]) -> tuple[Key, tuple[Difference, ...]] | None:
    """The key of ``others`` with the fewest differing factors (ties: the smaller digest), and those factors.

    Entries of the same architecture come before all others: a factor that differs there explains a miss.
    """
    ranked = sorted(
        ((key.differences(other), other) for other in others),
        key=lambda item: (
            any(d.factor.startswith(("pipeline.class", "architecture")) for d in item[0]),
            len(item[0]),
            item[1].digest,
        ),
    )
    if not ranked:
        return None
    differences, other = ranked[0]
    return other, differences


def _leaves(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        for name in value:
            yield from _leaves(value[name], f"{prefix}.{name}" if prefix else str(name))
    else:
        yield prefix, value
