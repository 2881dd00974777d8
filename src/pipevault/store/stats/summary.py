"""Statistics of a vault: what was counted, per entry and in all.

Events, and the numbers that go with them:

================  ==========================================================================================
``hit``           an entry was loaded
``miss``          none could be; ``reason`` is a word: ``absent``, ``damaged``, ``newer``, ``machine``, ``unsafe``, …
``compiled``      graphs were compiled; ``seconds`` spent
``saved``         a hit; ``seconds`` that compiling the entry took, and that the hit did not take
``rebuilt``       an entry that was there was frozen again
``quarantined``   a bad file was moved away
``published``     an entry became visible; ``bytes`` of its artifacts
================  ==========================================================================================
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from typing import Any

from pipevault.digest import Digest
from pipevault.store.inventory import find_spread
from pipevault.store.layout import Layout
from pipevault.store.places import iter_keys, the_key
from pipevault.store.stats.event_log import TIMES, RowKey, compact, count, read_sums

__all__ = ["Counts", "Statistics", "compact", "count", "find_entry", "mean_compile_s", "summary"]

NO_REASON = "unknown"


@dataclass(frozen=True)
class Counts:
    """Counts of what happened. ``misses``: by reason; seconds and bytes are sums over all events."""

    hits: int = 0
    misses: Mapping[str, int] = field(default_factory=dict)
    compiled: int = 0
    compile_s: float = 0.0
    saved_s: float = 0.0
    rebuilt: int = 0
    quarantined: int = 0
    published: int = 0
    published_bytes: int = 0

    @property
    def missed(self) -> int:
        return sum(self.misses.values())

    @property
    def hit_rate(self) -> float | None:
        """The share of hits among all lookups, from 0 to 1; ``None`` if there were none."""
        lookups = self.hits + self.missed
        return self.hits / lookups if lookups else None

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "misses": dict(sorted(self.misses.items())), "hit_rate": self.hit_rate}


@dataclass(frozen=True)
class Statistics:
    """The sums. ``entries`` also holds entries that are gone by now; what belongs to no entry is in ``total`` alone.
    ``since``: when the oldest event was counted, ISO 8601 in UTC. ``stored_bytes``: of the manifests and artifacts that
    the vault holds now. ``unreadable``: sentences about what is missing here.
    """

    total: Counts
    entries: Mapping[Digest, Counts]
    since: str | None
    stored_entries: int
    stored_bytes: int
    unreadable: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return {
            "total": self.total.to_json(),
            "entries": {key.hex: counts.to_json() for key, counts in self.entries.items()},
            "since": self.since,
            "stored_entries": self.stored_entries,
            "stored_bytes": self.stored_bytes,
            "unreadable": list(self.unreadable),
        }


def summary(layout: Layout) -> Statistics:
    """Sum up what all processes counted, those that live included. :class:`~pipevault.errors.VaultError`."""
    sums = read_sums(layout)
    by_key: dict[str, list[tuple[RowKey, Counter[str]]]] = defaultdict(list)
    for row in sums.rows.items():
        by_key[row[0][0]].append(row)
    since = None
    if sums.since is not None:
        since = datetime.fromtimestamp(int(sums.since), timezone.utc).isoformat(timespec="seconds")
    manifests, artifacts = (find_spread(layout, folder) for folder in (layout.entries_dir, layout.artifacts_dir))
    return Statistics(
        total=_counts(sums.rows.items()),
        entries={Digest(key): _counts(rows) for key, rows in sorted(by_key.items()) if key},
        since=since,
        stored_entries=len(manifests),
        stored_bytes=sum(file.st_size for file in (*manifests.values(), *artifacts.values())),
        unreadable=tuple(sums.unreadable),
    )


def mean_compile_s(layout: Layout) -> float | None:
    """Return the seconds that a graph took to compile here, on average; ``None`` where none was."""
    counts = _counts(read_sums(layout).rows.items())
    return counts.compile_s / counts.compiled if counts.compiled else None


def find_entry(layout: Layout, statistics: Statistics, prefix: str) -> Digest:
    """Return the key that begins with ``prefix``, of an entry there or counted. Raises like
    :func:`~pipevault.store.places.the_key`.
    """
    return the_key(prefix, {*iter_keys(layout), *statistics.entries}, f"entry of {layout.root}, there or counted,")


def _counts(rows: Iterable[tuple[RowKey, Counter[str]]]) -> Counts:
    sums: Counter[tuple[str, str]] = Counter()
    misses: Counter[str] = Counter()
    for (_, event, reason), numbers in rows:
        sums.update({(event, name): number for name, number in numbers.items()})
        if event == "miss":
            misses[reason or NO_REASON] += numbers[TIMES]
    return Counts(
        hits=sums["hit", TIMES],
        misses=dict(misses),
        compiled=sums["compiled", TIMES],
        compile_s=float(sums["compiled", "seconds"]),
        saved_s=float(sums["saved", "seconds"]),
        rebuilt=sums["rebuilt", TIMES],
        quarantined=sums["quarantined", TIMES],
        published=sums["published", TIMES],
        published_bytes=int(sums["published", "bytes"]),
    )
