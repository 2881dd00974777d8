"""Statistics in Prometheus' text format 0.0.4, as node_exporter's textfile collector reads it.

https://prometheus.io/docs/instrumenting/exposition_formats/#text-based-format
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pipevault.store.stats.summary import Counts, Statistics


@dataclass(frozen=True)
class _Counter:
    name: str
    help: str
    value: Callable[[Counts], float]


_COUNTERS = (
    _Counter("hits_total", "Loads that found their entry.", lambda counts: counts.hits),
    _Counter("compiles_total", "Times that graphs were compiled.", lambda counts: counts.compiled),
    _Counter("compile_seconds_total", "Seconds spent compiling.", lambda counts: counts.compile_s),
    _Counter("saved_seconds_total", "Compile seconds that hits did not spend.", lambda counts: counts.saved_s),
    _Counter("rebuilds_total", "Entries that were there and were frozen again.", lambda counts: counts.rebuilt),
    _Counter("quarantined_total", "Bad files that were moved away.", lambda counts: counts.quarantined),
    _Counter("published_total", "Entries published.", lambda counts: counts.published),
    _Counter("published_bytes_total", "Bytes of artifacts published.", lambda counts: counts.published_bytes),
)


def exposition(found: Statistics, root: Path) -> str:
    """Return all of ``found``; every sample has the label ``vault``, those of ``pipevault_entry_…`` also ``key``."""
    return "".join(f"{line}\n" for line in _lines(found, {"vault": str(root)}))


def _lines(found: Statistics, vault: Mapping[str, str]) -> Iterator[str]:
    yield from _family("pipevault_entries", "gauge", "Entries in the vault.", [(vault, found.stored_entries)])
    yield from _family(
        "pipevault_size_bytes", "gauge", "Bytes of manifests and artifacts in the vault.", [(vault, found.stored_bytes)]
    )
    yield from _family(
        "pipevault_misses_total",
        "counter",
        "Loads that found no usable entry, by reason.",
        [({**vault, "reason": reason}, count) for reason, count in sorted(found.total.misses.items())],
    )
    for counter in _COUNTERS:
        samples = [(vault, counter.value(found.total))]
        yield from _family(f"pipevault_{counter.name}", "counter", counter.help, samples)
    entries = [({**vault, "key": key.hex}, counts) for key, counts in found.entries.items()]
    misses = _Counter("misses_total", "Loads that found no usable entry.", lambda counts: counts.missed)
    for counter in (misses, *_COUNTERS):
        by_key = [(labels, counter.value(counts)) for labels, counts in entries]
        yield from _family(f"pipevault_entry_{counter.name}", "counter", f"{counter.help} By entry.", by_key)


def _family(name: str, kind: str, text: str, samples: Sequence[tuple[Mapping[str, str], float]]) -> Iterator[str]:
    yield f"# HELP {name} {_escaped(text)}"
    yield f"# TYPE {name} {kind}"
    for labels, value in samples:
        listed = ",".join(f'{label}="{_escaped(given, quotes=True)}"' for label, given in labels.items())
        yield f"{name}{{{listed}}} {value!r}"


def _escaped(text: str, *, quotes: bool = False) -> str:
    escaped = text.replace("\\", "\\\\").replace("\n", "\\n")
    return escaped.replace('"', '\\"') if quotes else escaped
