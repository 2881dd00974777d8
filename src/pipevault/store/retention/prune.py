"""Keeping a vault small: a plan of what has to go, and carrying it out.

To get below a limit, what is of no use goes first (orphans, quarantine), then entries, least recently used first; an
artifact goes with the last entry that names it. Pinned entries, those that a live process has loaded, what these need,
and manifests that cannot be understood stay. A process that dies in between leaves whole entries or none, and what no
manifest names, which the next pruning removes.

An entry's time is that of its last known use, else that of its manifest. If more than half of the vault's times lie in
the future, the clock here is behind: nothing has an age, and the order is that of the times as they stand. Else the few
that do count as used now, behind all others; pruning sets their notes to now, so that they age from then on.
"""

from __future__ import annotations

import math
import os
import time
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from pipevault.digest import Digest
from pipevault.errors import PinError, VaultError
from pipevault.store.inventory import find_files, find_manifests, find_spread, size_bytes_of, statuses
from pipevault.store.layout import QUARANTINE_TIME, Layout
from pipevault.store.needs import needed_by, needs_in, only_needed_by
from pipevault.store.retention.leftovers import Leftover, find_leftovers, sweep
from pipevault.store.retention.removal import (
    ORPHAN_MIN_AGE_S,
    find_holds,
    remove_artifacts,
    remove_belongings,
    remove_empty_shelves,
    remove_file,
    take_aside,
)
from pipevault.store.retention.usage import last_use_s, last_uses_s, set_last_use
from pipevault.store.stats.event_log import compact

if TYPE_CHECKING:
    from pipevault.store.vault import Vault

_DAY_S = 86_400
QUARANTINE_MAX_AGE_S = 30.0 * _DAY_S
QUARANTINE_MAX_BYTES = 1_000_000_000
"""Files that were set aside earlier, or are more than this, go with every pruning, oldest first."""
_NAMED_REASONS = 3
CLOCK_TOLERANCE_S = 60.0
"""Clocks that are this far apart are taken for equal."""


@dataclass(frozen=True)
class Going:
    """An entry that is to go, unless ``used_s``, its last use as noted, or ``modified_ns`` of its manifest changes
    before. ``reason``: ``least recently used``, ``unused`` or ``not used for 40.0 days``.
    """

    key: Digest
    reason: str
    used_s: float | None
    modified_ns: int


@dataclass(frozen=True)
class Staying:
    """An entry that would have gone. ``reason``: such as ``needed by 7c2b5a1ac012, which is pinned as prod``."""

    key: Digest
    reason: str


@dataclass(frozen=True)
class Pruning:
    """The work of :func:`carry_out` in the order in which it goes, or what that removed.

    ``artifacts``: those that only ``entries`` name and, once removed, ``orphans``: those that no manifest names, older
    than an hour. ``strays``: keys without an entry that a signature or a note of a use is left of. ``leftovers`` of
    dead processes are no part of ``size_bytes``. ``staying``: would have gone or, once carried out, were used, pinned,
    loaded or frozen again since. ``because``: why ``max_size`` is not reached. ``problems``: what could not be judged
    or removed. ``ahead``: entries whose last use lies in the future; it becomes ``now_s``.
    """

    entries: tuple[Going, ...] = ()
    artifacts: tuple[Digest, ...] = ()
    orphans: tuple[Digest, ...] = ()
    quarantined: tuple[Path, ...] = ()
    strays: tuple[Digest, ...] = ()
    leftovers: tuple[Leftover, ...] = ()
    staying: tuple[Staying, ...] = ()
    size_bytes: int = 0
    freed_bytes: int = 0
    max_size: int | None = None
    because: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()
    ahead: tuple[Digest, ...] = ()
    now_s: float = 0.0

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
) -> Pruning:
    """Plan to remove entries not used for ``older_than_s`` seconds; with ``unused`` those that were published over an
    hour ago and never used; then the least recently used until the vault has ``max_size`` bytes; orphans in any case.

    ``now_s``: seconds since the epoch. ``keep``: entries that stay, and what they need. ``chosen``: entries that go
    besides, and why, with what only they need. :class:`VaultError`: the vault cannot be read. :class:`PinError`: a pin
    cannot be read, so that no entry is safe to remove.
    """
    if max_size is not None and max_size < 0:
        raise ValueError(f"max_size is {max_size}: expected 0 or more bytes.")
    if older_than_s is not None and not older_than_s >= 0:
        raise ValueError(f"older_than_s is {older_than_s!r}: expected 0 or more seconds.")
    draft = _Draft(vault.layout, time.time() if now_s is None else now_s, keep)
    draft.drop_chosen(chosen or {})
    problems = draft.drop_by_age(older_than_s, unused)
    reached = draft.drop_down_to(max_size)
    return Pruning(
        entries=tuple(draft.entries.values()),
        artifacts=tuple(sorted(draft.dropped_artifacts)),
        orphans=tuple(draft.old_orphans),
        quarantined=tuple(draft.dropped_quarantine),
        strays=tuple(draft.strays),
        leftovers=find_leftovers(vault.layout),
        staying=tuple(draft.staying.values()),
        size_bytes=draft.size_bytes,
        freed_bytes=draft.size_bytes - draft.left_bytes,
        max_size=max_size,
        because=() if reached else tuple(draft.obstacles()),
        problems=problems,
        ahead=draft.ages.ahead,
        now_s=draft.now_s,
    )


def carry_out(vault: Vault, plan: Pruning) -> Pruning:
    """Do what was planned, but leave entries that were used, pinned, loaded or frozen again since; remove what dead
    processes left, too.

    :class:`VaultNotWritableError`: a file cannot be removed; what was removed stays removed. :class:`PinError`: as
    above.
    """
    vault.require_writable("Prune it as its owner.")
    layout = vault.layout
    leftovers = sweep(layout)
    quarantined = {path: size for path in plan.quarantined if (size := remove_file(path)) is not None}
    removed, staying = _remove_entries(layout, plan)
    artifacts, artifact_bytes, _ = remove_artifacts(layout, (*plan.artifacts, *plan.orphans), after=removed)
    remove_empty_shelves(layout)
    problems = list(plan.problems)
    belongings_bytes = 0
    for key in (*removed, *plan.strays):
        try:
            belongings_bytes += remove_belongings(layout, key)
        except VaultError as error:  # what is left of a removed entry harms nobody
            problems.append(str(error))
    for key in plan.ahead:
        if key not in removed:
            set_last_use(layout, key, plan.now_s)
    try:
        compact(layout)  # last, for it needs room
    except VaultError as error:
        problems.append(str(error))
    freed_bytes = sum(quarantined.values()) + sum(removed.values()) + artifact_bytes + belongings_bytes
    return replace(
        plan,
        entries=tuple(going for going in plan.entries if going.key in removed),
        artifacts=tuple(artifacts),
        orphans=(),
        quarantined=tuple(quarantined),
        leftovers=tuple(leftovers),
        staying=staying,
        freed_bytes=freed_bytes,
        problems=tuple(problems),
    )


def enforce_max_size(vault: Vault, key: Digest, *, max_size: int) -> Pruning | None:
    """After ``key`` was published: remove the least recently used others if the vault is above ``max_size`` bytes.
    ``None`` if it is not, which takes one look at each file's size. Never raises: ``problems`` says what went wrong,
    and why the limit is not reached.
    """
    if not vault.writable:
        return None
    try:
        for path in _stale_quarantined(find_files(vault.layout.quarantine_dir), time.time()):
            remove_file(path)
        if vault_size_bytes(vault.layout) <= max_size:
            return None
        plan = plan_prune(vault, max_size=max_size, keep=(key,))
        report = carry_out(vault, plan)
    except (VaultError, PinError, OSError, ValueError, MemoryError) as error:
        return Pruning(problems=(f"The vault could not be kept within its max_size of {max_size} bytes: {error}",))
    if report.left_bytes <= max_size:
        return report
    reasons = "; ".join((*plan.because, *(f"{entry.key.short} stays ({entry.reason})" for entry in report.staying)))
    problem = f"The vault has {report.left_bytes} bytes, more than its max_size of {max_size}: {reasons}."
    return replace(report, problems=(*report.problems, problem))


def vault_size_bytes(layout: Layout) -> int:
    """Return the bytes of manifests, artifacts, signatures and quarantined files; what vanishes meanwhile, or cannot be
    read, counts as empty.
    """
    folders = (layout.entries_dir, layout.artifacts_dir, layout.signatures_dir, layout.quarantine_dir)
    return sum(map(size_bytes_of, folders))


@dataclass(frozen=True)
class Ages:
    """The ages of entries. ``order``: least recently used first. ``age_s``: since the last use, never negative.
    ``ahead``: entries whose time lies in the future and counts as now.
    """

    order: tuple[Digest, ...]
    age_s: Mapping[Digest, float]
    ahead: tuple[Digest, ...]
    clock_is_behind: bool


def judge(published_s: Mapping[Digest, float], used_s: Mapping[Digest, float], now_s: float) -> Ages:
    """Return order and ages of the published entries at ``now_s``, what this machine's clock tells; of those whose last
    use is known, that counts too. Times are in seconds since the epoch.
    """
    latest = {key: max(at_s, used_s.get(key, at_s)) for key, at_s in published_s.items()}
    told = [*published_s.values(), *(used_s[key] for key in published_s if key in used_s)]
    ahead_s = now_s + CLOCK_TOLERANCE_S
    behind = 2 * sum(time_s > ahead_s for time_s in told) > len(told)
    counted = latest if behind else {key: min(time_s, now_s) for key, time_s in latest.items()}
    return Ages(
        order=tuple(sorted(latest, key=lambda key: (counted[key], latest[key], key))),
        age_s={key: 0.0 if behind else now_s - time_s for key, time_s in counted.items()},
        ahead=() if behind else tuple(sorted(key for key, time_s in latest.items() if time_s > ahead_s)),
        clock_is_behind=behind,
    )


class _Draft:
    """A plan in the making: the vault as it was read, each file once, and what goes of it."""

    def __init__(self, layout: Layout, now_s: float, keep: Collection[Digest]) -> None:
        self.now_s = now_s
        # The artifacts first: one whose manifest is published meanwhile must count as named.
        self._artifacts = find_spread(layout, layout.artifacts_dir)
        self.used_s = last_uses_s(layout)
        signatures = find_files(layout.signatures_dir)
        self.manifests = find_manifests(layout)
        self._quarantine = find_files(layout.quarantine_dir)
        self._signature_bytes: Counter[Digest] = Counter()
        left = dict(self.used_s)
        for path, file in signatures.items():
            if key := layout.key_of_signature(path):
                self._signature_bytes[key] += file.st_size
                left[key] = file.st_mtime
        self.strays = sorted(key for key, at_s in left.items() if key not in self.manifests and self._is_old(at_s))
        self._names = Counter(digest for manifest in self.manifests.values() for digest in manifest.artifacts)
        orphans = [digest for digest in self._artifacts if digest not in self._names]
        self.old_orphans = [digest for digest in orphans if self._is_old(self._artifacts[digest].st_mtime)]
        self._young_orphans = len(orphans) - len(self.old_orphans)
        self.ages = judge({key: found.modified_ns / 1e9 for key, found in self.manifests.items()}, self.used_s, now_s)
        self._protected = self._protections(layout, keep)
        self.size_bytes = sum(found.size_bytes for found in self.manifests.values()) + self._signature_bytes.total()
        self.size_bytes += sum(file.st_size for file in (*self._artifacts.values(), *self._quarantine.values()))
        self.left_bytes = self.size_bytes - sum(self._artifacts[digest].st_size for digest in self.old_orphans)
        self.left_bytes -= sum(self._signature_bytes[key] for key in self.strays)
        self.entries: dict[Digest, Going] = {}
        self.dropped_artifacts: list[Digest] = []
        self.dropped_quarantine: list[Path] = []
        self.staying: dict[Digest, Staying] = {}
        for path in _stale_quarantined(self._quarantine, now_s):
            self._drop_quarantined(path)

    def drop_chosen(self, chosen: Mapping[Digest, str]) -> None:
        needed = only_needed_by([key for key in chosen if key not in self._protected], self.manifests)
        reasons = {**dict.fromkeys(needed, "nothing else needs it"), **chosen}
        for key in self.ages.order:
            if key in reasons:
                self._drop(key, reasons[key])

    def drop_by_age(self, older_than_s: float | None, unused: bool) -> tuple[str, ...]:
        if self.ages.clock_is_behind and (unused or older_than_s is not None):
            text = "Most times in the vault lie in the future, so the clock of this machine is behind: "
            return (f"{text}no entry is removed by its age.",)
        limit_s = math.inf if older_than_s is None else older_than_s
        for key in self.ages.order:
            age_s = self.ages.age_s[key]
            if age_s >= limit_s:
                self._drop(key, f"not used for {age_s / _DAY_S:.1f} days")
            elif unused and key not in self.used_s and self._is_old(self.manifests[key].modified_ns / 1e9):
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
        for key, reason in sorted(self._protected.items())[:_NAMED_REASONS]:
            yield f"{key.short} stays ({reason})"
        if (more := len(self._protected) - _NAMED_REASONS) > 0:
            yield f"{more} more {'entry stays' if more == 1 else 'entries stay'}"
        if young := self._young_orphans:
            several = "artifacts that no entry names are" if young > 1 else "artifact that no entry names is"
            yield f"{young} {several} younger than an hour"

    def _drop(self, key: Digest, reason: str) -> None:
        manifest = self.manifests[key]
        if key in self._protected:
            self.staying[key] = Staying(key, self._protected[key])
        elif key not in self.entries:
            self.entries[key] = Going(key, reason, self.used_s.get(key), manifest.modified_ns)
            self.left_bytes -= manifest.size_bytes + self._signature_bytes[key]
            for digest in manifest.artifacts:
                self._names[digest] -= 1
                if not self._names[digest] and digest in self._artifacts:
                    self.dropped_artifacts.append(digest)
                    self.left_bytes -= self._artifacts[digest].st_size

    def _drop_quarantined(self, path: Path) -> None:
        self.dropped_quarantine.append(path)
        self.left_bytes -= self._quarantine[path].st_size

    def _protections(self, layout: Layout, keep: Collection[Digest]) -> dict[Digest, str]:
        needed = needed_by(keep, needs_in(layout, self.manifests))
        reasons = {key: f"needed by {holder.short}, just published" for key, holder in needed.items()}
        strange = [key for key, found in self.manifests.items() if not found.understood]
        reasons |= dict.fromkeys(strange, "damaged, or of a later pipevault")
        reasons |= {key: hold.reason for key, hold in find_holds(layout, self.manifests).items()}
        reasons |= dict.fromkeys(keep, "just published")
        return {key: reason for key, reason in reasons.items() if key in self.manifests}

    def _is_old(self, at_s: float) -> bool:
        return self.now_s - at_s >= ORPHAN_MIN_AGE_S


def _stale_quarantined(files: Mapping[Path, os.stat_result], now_s: float) -> list[Path]:
    """The quarantined ``files`` that are older or more than quarantine may hold, oldest first."""
    left_bytes = sum(file.st_size for file in files.values())
    stale = []
    for path in _oldest_first(files):
        if now_s - _quarantined_s(path, files[path]) < QUARANTINE_MAX_AGE_S and left_bytes <= QUARANTINE_MAX_BYTES:
            break
        stale.append(path)
        left_bytes -= files[path].st_size
    return stale


def _oldest_first(files: Mapping[Path, os.stat_result]) -> list[Path]:
    return sorted(files, key=lambda path: (_quarantined_s(path, files[path]), path))


def _quarantined_s(path: Path, file: os.stat_result) -> float:
    """The time when a file was set aside, as its name tells: moving it left its time of change as it was."""
    try:
        return datetime.strptime(path.name.partition("-")[0] + "+0000", QUARANTINE_TIME + "%z").timestamp()
    except ValueError:
        return file.st_mtime


def _remove_entries(layout: Layout, plan: Pruning) -> tuple[dict[Digest, int], tuple[Staying, ...]]:
    watch = _Watch(layout)
    removed: dict[Digest, int] = {}
    staying: list[Staying] = []
    for going in plan.entries:
        if reason := watch.reason_to_stay(going):
            staying.append(Staying(going.key, reason))
            continue
        with take_aside(layout, going.key) as aside:
            # Whoever leased or pinned it before it was taken aside is seen now; whoever does so later finds it gone.
            if aside is not None and (reason := watch.reason_to_stay(going)):
                staying.append(Staying(going.key, reason))
            elif aside is not None:
                removed[going.key] = remove_file(aside) or 0
    return removed, tuple(staying)


class _Watch:
    """Notices pins and leases that appear while entries are being removed."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._seen: object = None
        self._reasons: dict[Digest, str] = {}

    def reason_to_stay(self, going: Going) -> str:
        layout, key = self._layout, going.key
        if (seen := self._look()) != self._seen:
            self._reasons = {held: hold.reason for held, hold in find_holds(layout).items()}
            self._seen = seen
        if reason := self._reasons.get(key):
            return reason
        if last_use_s(layout, key) != going.used_s:
            return "used since the plan was made"
        try:
            unchanged = layout.manifest_file(key).stat().st_mtime_ns == going.modified_ns
        except OSError:  # gone, or the removal will say why not
            return ""
        return "" if unchanged else "frozen again since the plan was made"

    def _look(self) -> object:
        try:
            return [
                sorted((name, status.st_ino, status.st_mtime_ns) for name, status in statuses(folder))
                for folder in (self._layout.pins_dir, self._layout.leases_dir)
            ]
        except VaultError:
            return object()  # equal to nothing seen before: the holds are read again
