"""Ages of entries, and which was used least recently, when clocks disagree.

An entry's time is that of its last known use, else that of its manifest. A time from the future was told by a clock
that is ahead, or the clock here is behind:

- If more than half of the vault's times lie in the future, the clock here is behind. Then nothing has an age, and the
  order is that of the times as they stand.
- Else the few that do count as used now, behind all others and among themselves in their own order. Such an entry is
  not the first to go, and since pruning sets its note to now, it ages from then on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from pipevault.digest import Digest

CLOCK_TOLERANCE_S = 60.0
"""Clocks that are this far apart are taken for equal."""


@dataclass(frozen=True)
class Times:
    """The times of an entry, in seconds since the epoch; ``used_s`` ``None``: no use is known."""

    published_s: float
    used_s: float | None = None

    @property
    def latest_s(self) -> float:
        return self.published_s if self.used_s is None else max(self.published_s, self.used_s)


@dataclass(frozen=True)
class Ages:
    """The ages of entries. ``order``: least recently used first. ``age_s``: since the last use, never negative."""

    order: tuple[Digest, ...]
    age_s: Mapping[Digest, float]
    ahead: tuple[Digest, ...]
    """Entries whose time lies in the future and counts as now."""
    clock_is_behind: bool
    """The clock here tells less than most of the vault's times: every age is 0."""


def judge(times: Mapping[Digest, Times], now_s: float) -> Ages:
    """Return order and ages at ``now_s``, what this machine's clock tells."""
    told = [time for entry in times.values() for time in (entry.published_s, entry.used_s) if time is not None]
    behind = 2 * sum(time > now_s + CLOCK_TOLERANCE_S for time in told) > len(told)
    latest = {key: entry.latest_s for key, entry in times.items()}
    counted = latest if behind else {key: min(time, now_s) for key, time in latest.items()}
    return Ages(
        order=tuple(sorted(times, key=lambda key: (counted[key], latest[key], key))),
        age_s={key: 0.0 if behind else now_s - time for key, time in counted.items()},
        ahead=() if behind else tuple(sorted(key for key, time in latest.items() if time > now_s + CLOCK_TOLERANCE_S)),
        clock_is_behind=behind,
    )
