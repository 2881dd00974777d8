"""The key of an entry: named factors that decide whether a frozen graph may be used.

A factor is anything whose change could change the compiled code or its bits. Factors are kept in readable form, in
groups; a digest over their canonical JSON names the entry. Paths, users, host names and ranks are never factors.

An entry is a **graph**, whose key has the group ``signature``, or a **plan**: which graphs a pipeline needs for a call
of one shape. The graphs of one part, whose keys differ only in ``signature`` and ``constants``, stand together on a
**shelf**; so do the plans of one pipeline architecture.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from pipevault.digest import Digest, digest_json

KEY_VERSION = 2
SHELF_DIGITS = 16
"""The number of digits of a key, its last, that name the folder of its shelf."""

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
_OF_ONE_GRAPH = frozenset({"signature", "constants"})
"""The groups in which graphs of one shelf may differ."""


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
    """A key: named factors. ``factors`` maps each of :data:`FACTOR_GROUPS` to plain JSON values."""

    factors: Mapping[str, Any]

    def __post_init__(self) -> None:
        if unknown := set(self.factors) - set(FACTOR_GROUPS):
            raise ValueError(f"Unknown factor groups: {', '.join(sorted(unknown))}.")

    @property
    def kind(self) -> Literal["graph", "plan"]:
        """The kind of the entry: ``graph`` if the key has the group ``signature``, else ``plan``."""
        return "graph" if "signature" in self.factors else "plan"

    @cached_property
    def shelf(self) -> Digest:
        """The digest that entries which stand together share: of a graph over all factors but ``signature`` and
        ``constants``; of a plan over the pipeline's class and ``architecture``, so that the plans of all call shapes,
        dtypes and machines are found together.
        """
        if self.kind == "graph":
            shared = {name: group for name, group in self.factors.items() if name not in _OF_ONE_GRAPH}
            return digest_json({"key_version": KEY_VERSION, "shelf": shared})
        pipeline = self.factors.get("pipeline")
        of = {
            "class": pipeline.get("class") if isinstance(pipeline, Mapping) else None,
            "architecture": self.factors.get("architecture"),
        }
        return digest_json({"key_version": KEY_VERSION, "plans_of": of})

    @cached_property
    def digest(self) -> Digest:
        """The name of the entry: 48 digits of the SHA-256 over all factors, then the first 16 digits of :attr:`shelf`,
        which name its folder. Two shelves whose 64 bits are equal share a folder, which does no harm: whoever takes an
        entry from a shelf compares its factors.
        """
        factors = digest_json({"key_version": KEY_VERSION, "factors": dict(self.factors)})
        return Digest(factors.hex[:-SHELF_DIGITS] + self.shelf.hex[:SHELF_DIGITS])

    def differences(self, other: Key) -> tuple[Difference, ...]:
        return leaf_differences(self.factors, other.factors)


def leaf_differences(ours: Mapping[str, Any], theirs: Mapping[str, Any], prefix: str = "") -> tuple[Difference, ...]:
    """Return every leaf in which two nested mappings differ, sorted by its dotted name after ``prefix``."""
    here, there = dict(_leaves(ours, prefix)), dict(_leaves(theirs, prefix))
    for one, other in ((here, there), (there, here)):
        for name in [name for name, value in one.items() if value == {}]:
            if any(leaf.startswith(f"{name}.") for leaf in other):  # what the other one has in there tells it all
                del one[name]
    return tuple(
        Difference(name, here.get(name), there.get(name))
        for name in sorted(here.keys() | there.keys())
        if here.get(name) != there.get(name)
    )


def nearest(key: Key, others: Iterable[Key]) -> tuple[Key, tuple[Difference, ...]] | None:
    """The key of ``others`` with the fewest differing factors (ties: the smaller digest), and those factors. Those of
    the same architecture come first: a factor that differs there explains a miss.
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
