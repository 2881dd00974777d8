"""Planning what has to go so that a vault gets small enough; nothing is changed.

The size of a vault is the bytes of its manifests, artifacts, signatures and quarantined files. To get below a limit,
what is of no use goes first (orphans, quarantine), then entries, least recently used first; an artifact goes with the
last entry that names it. Pinned entries, those that a live process has loaded, what these need (the graphs of a plan),
and manifests that cannot be understood stay.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING

from pipevault.digest import Digest
from pipevault.store.inventory import FoundFile, find_artifacts, find_files, find_manifests
from pipevault.store.layout import QUARANTINE_TIME, Layout
from pipevault.store.needs import needed_by, needs_in, only_needed_by
from pipevault.store.retention.aging import Times, judge
from pipevault.store.retention.holds import find_holds
from pipevault.store.retention.leftovers import Leftover, find_leftovers
from pipevault.store.retention.removal import ORPHAN_MIN_AGE_S, orphans_among
from pipevault.store.retention.usage import last_uses_s

if TYPE_CHECKING:
    from pipevault.store.vault import Vault

_DAY_S = 86_400
QUARANTINE_MAX_AGE_S = 30.0 * _DAY_S
QUARANTINE_MAX_BYTES = 1_000_000_000
"""Files that were set aside earlier, or are more than this, go with every pruning, oldest first."""
_NAMED_REASONS = 3


@dataclass(frozen=True)
class Going:
    """An entry that is to go. ``reason``: ``least recently used``, ``unused`` or ``not used for 40.0 days``.

    It stays if ``used_s``, its last use as noted, or ``modified_ns`` of its manifest changes before it goes.
    """

    key: Digest
    reason: str
    used_s: float | None
    modified_ns: int


@dataclass(frozen=True)
class Staying:
    """An entry that would have gone. ``reason``: ``pinned as prod``, ``in use by process 4711 on worker-3``, or
    ``needed by 7c2b5a1ac012, which is pinned as prod``.
    """

    key: Digest
    reason: str


@dataclass(frozen=True)
class PrunePlan:
    """The work of :func:`pipevault.store.retention.prune.carry_out`. Sizes in bytes."""

    entries: tuple[Going, ...]
    """In the order in which they go."""
    artifacts: tuple[Digest, ...]
    """Artifacts that only these entries name."""
    orphans: tuple[Digest, ...]
    """Artifacts that no manifest names, older than an hour."""
    quarantined: tuple[Path, ...]
    strays: tuple[Digest, ...]
    """Keys without an entry that a signature or the note of a use is left of."""
    leftovers: tuple[Leftover, ...]
    """Files of dead processes in ``tmp/``, ``locks/``, ``leases/`` and elsewhere; not part of the vault's size."""
    staying: tuple[Staying, ...]
    size_bytes: int
    """The vault as it is."""
    freed_bytes: int
    max_size: int | None
    because: tuple[str, ...]
    """The reasons why ``max_size`` is not reached; empty if it is."""
    problems: tuple[str, ...]
    """Sentences about what could not be judged."""
    ahead: tuple[Digest, ...]
    """Entries whose last use lies in the future; carrying out makes it ``now_s``."""
    now_s: float

    @property
    def left_bytes(self) -> int:
        return self.size_bytes - self.freed_bytes


def plan_prune(
    vault: Vault,
    *,
    max_size: int | None = None,
    older_than_s: float | None = None,
    unused: bool = False,
    now_s: float | None = None,
    keep: Collection[Digest] = (),
    chosen: Mapping[Digest, str] | None = None,
) -> PrunePlan:
    """Plan to remove entries not used for ``older_than_s`` seconds; with ``unused`` those that were published over an
    hour ago and never used; then the least recently used until the vault has ``max_size`` bytes; orphans in any case.

    ``now_s``: seconds since the epoch; default: now. ``keep``: entries that stay, and what they need.
    ``chosen``: entries that go besides, and why; with them goes what only they need, such as the graphs of a plan.
    :class:`VaultError`: the vault cannot be read. :class:`PinError`: a pin cannot be read, so that no entry is safe to
    remove.
    """
    if max_size is not None and max_size < 0:
        raise ValueError(f"max_size is {max_size}: expected 0 or more bytes.")
    if older_than_s is not None and not older_than_s >= 0:
        raise ValueError(f"older_than_s is {older_than_s!r}: expected 0 or more seconds.")
    draft = _Draft(vault.layout, time.time() if now_s is None else now_s, keep)
    draft.drop_chosen(chosen or {})
    problems = draft.drop_by_age(older_than_s, unused)
    reached = draft.drop_down_to(max_size)
    return PrunePlan(
        entries=tuple(
            Going(key, reason, draft.used_s.get(key), draft.manifests[key].modified_ns)
            for key, reason in draft.entries.items()
        ),
        artifacts=tuple(sorted(draft.dropped_artifacts)),
        orphans=tuple(draft.old_orphans),
        quarantined=tuple(draft.dropped_quarantine),
        strays=tuple(draft.strays),
        leftovers=find_leftovers(vault.layout),
        staying=tuple(Staying(key, reason) for key, reason in draft.staying.items()),
        size_bytes=draft.size_bytes,
        freed_bytes=draft.size_bytes - draft.left_bytes,
        max_size=max_size,
        because=() if reached else tuple(draft.obstacles()),
        problems=problems,
        ahead=draft.ages.ahead,
        now_s=draft.now_s,
    )


class _Draft:
    """A plan in the making: the vault as it was read, each file once, and what goes of it."""

    def __init__(self, layout: Layout, now_s: float, keep: Collection[Digest]) -> None:
        self.now_s = now_s
        # The artifacts first: one whose manifest is published meanwhile must count as named.
        self._artifacts = find_artifacts(layout)
        self.used_s = last_uses_s(layout)
        signatures = find_files(layout.signatures_dir)
        self.manifests = find_manifests(layout)
        self._quarantine = find_files(layout.quarantine_dir)
        self._signature_bytes: Counter[Digest] = Counter()
        left = dict(self.used_s)
        for path, file in signatures.items():
            if key := layout.key_of_signature(path):
                self._signature_bytes[key] += file.size_bytes
                left[key] = file.modified_s
        self.strays = sorted(key for key, at_s in left.items() if key not in self.manifests and self._is_old(at_s))
        self._names = Counter(digest for manifest in self.manifests.values() for digest in manifest.artifacts)
        self._orphans = orphans_among(self._artifacts, self._names, now_s)
        self.old_orphans = [orphan.digest for orphan in self._orphans if orphan.removable]
        times = {key: Times(found.modified_s, self.used_s.get(key)) for key, found in self.manifests.items()}
        self.ages = judge(times, now_s)
        self._protected = self._protections(layout, keep)
        self.size_bytes = sum(found.size_bytes for found in self.manifests.values()) + self._signature_bytes.total()
        self.size_bytes += sum(file.size_bytes for file in (*self._artifacts.values(), *self._quarantine.values()))
        self.left_bytes = self.size_bytes - sum(self._artifacts[digest].size_bytes for digest in self.old_orphans)
        self.left_bytes -= sum(self._signature_bytes[key] for key in self.strays)
        self.entries: dict[Digest, str] = {}
        self.dropped_artifacts: list[Digest] = []
        self.dropped_quarantine: list[Path] = []
        self.staying: dict[Digest, str] = {}
        for path in stale_quarantined(self._quarantine, now_s):
            self._drop_quarantined(path)

    def drop_chosen(self, chosen: Mapping[Digest, str]) -> None:
        needed = only_needed_by([key for key in chosen if key not in self._protected], self.manifests)
        reasons = {**dict.fromkeys(needed, "nothing else needs it"), **chosen}
        for key in self.ages.order:
            if key in reasons:
                self._drop(key, reasons[key])

    def drop_by_age(self, older_than_s: float | None, unused: bool) -> tuple[str, ...]:
        """Drop the old and the unused; return what cannot be judged."""
        if self.ages.clock_is_behind and (unused or older_than_s is not None):
            text = "Most times in the vault lie in the future, so the clock of this machine is behind: "
            return (f"{text}no entry is removed by its age.",)
        limit_s = math.inf if older_than_s is None else older_than_s
        for key in self.ages.order:
            age_s = self.ages.age_s[key]
            if age_s >= limit_s:
                self._drop(key, f"not used for {age_s / _DAY_S:.1f} days")
            elif unused and key not in self.used_s and self._is_old(self.manifests[key].modified_s):
                self._drop(key, "unused")
        return ()

    def drop_down_to(self, max_size: int | None) -> bool:
        """Drop what was quarantined first, then what was used least recently; return whether that is enough."""
        limit = math.inf if max_size is None else max_size
        for path in _oldest_first(self._quarantine)[len(self.dropped_quarantine) :]:
            if self.left_bytes > limit:
                self._drop_quarantined(path)
        for key in self.ages.order:
            if self.left_bytes > limit:
                self._drop(key, "least recently used")
        return self.left_bytes <= limit

    def obstacles(self) -> Iterator[str]:
        """Say why no more can go, a clause each."""
        for key, reason in sorted(self._protected.items())[:_NAMED_REASONS]:
            yield f"{key.short} stays ({reason})"
        if (more := len(self._protected) - _NAMED_REASONS) > 0:
            yield f"{more} more {'entry stays' if more == 1 else 'entries stay'}"
        if young := len(self._orphans) - len(self.old_orphans):
            several = "artifacts that no entry names are" if young > 1 else "artifact that no entry names is"
            yield f"{young} {several} younger than an hour"

    def _drop(self, key: Digest, reason: str) -> None:
        """Choose ``key`` unless it is chosen already or protected."""
        if key in self._protected:
            self.staying[key] = self._protected[key]
        elif key not in self.entries:
            self.entries[key] = reason
            self.left_bytes -= self.manifests[key].size_bytes + self._signature_bytes[key]
            for digest in self.manifests[key].artifacts:
                self._names[digest] -= 1
                if not self._names[digest] and digest in self._artifacts:
                    self.dropped_artifacts.append(digest)
                    self.left_bytes -= self._artifacts[digest].size_bytes

    def _drop_quarantined(self, path: Path) -> None:
        self.dropped_quarantine.append(path)
        self.left_bytes -= self._quarantine[path].size_bytes

    def _protections(self, layout: Layout, keep: Collection[Digest]) -> dict[Digest, str]:
        kept = "just published"
        needed = needed_by(keep, needs_in(layout, self.manifests))
        reasons = {key: f"needed by {holder.short}, {kept}" for key, holder in needed.items()}
        reasons |= {
            key: "damaged, or of a later pipevault" for key, found in self.manifests.items() if not found.understood
        }
        reasons |= {key: hold.reason for key, hold in find_holds(layout, self.manifests).items()}
        reasons |= dict.fromkeys(keep, kept)
        return {key: reason for key, reason in reasons.items() if key in self.manifests}

    def _is_old(self, at_s: float) -> bool:
        return self.now_s - at_s >= ORPHAN_MIN_AGE_S


def stale_quarantined(files: Mapping[Path, FoundFile], now_s: float) -> list[Path]:
    """Return the quarantined ``files`` that are older or more than quarantine may hold, oldest first."""
    left_bytes = sum(file.size_bytes for file in files.values())
    stale = []
    for path in _oldest_first(files):
        if now_s - _quarantined_s(path, files[path]) < QUARANTINE_MAX_AGE_S and left_bytes <= QUARANTINE_MAX_BYTES:
            break
        stale.append(path)
        left_bytes -= files[path].size_bytes
    return stale


def _oldest_first(files: Mapping[Path, FoundFile]) -> list[Path]:
    return sorted(files, key=lambda path: (_quarantined_s(path, files[path]), path))


def _quarantined_s(path: Path, file: FoundFile) -> float:
    """The time when a file was set aside, as its name tells: moving it left its time of change as it was."""
    try:
        told = datetime.strptime(path.name.partition("-")[0], QUARANTINE_TIME)
    except ValueError:
        return file.modified_s
    return told.replace(tzinfo=timezone.utc).timestamp()
