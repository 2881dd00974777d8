"""What has to go so that a vault gets small enough: a plan; nothing is changed.

The size of a vault is the bytes of its manifests, artifacts, signatures and quarantined files. To get below a limit,
what nobody needs goes first (orphans, quarantine), then entries, least recently used first; an artifact goes with the
last entry that names it. Pinned entries, those that a live process has loaded, what these need (the graphs of a plan),
and manifests that cannot be understood stay.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import cached_property
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING

from pipevault.digest import Digest
from pipevault.store.inventory import FoundFile, FoundManifest, find_artifacts, find_files, find_manifests
from pipevault.store.layout import QUARANTINE_TIME, Layout
from pipevault.store.locks.leases import describe_leases, find_leases
from pipevault.store.needs import needed_by, needs_in, only_needed_by
from pipevault.store.retention.aging import Ages, Times, judge
from pipevault.store.retention.leftovers import Leftover, find_leftovers
from pipevault.store.retention.pins import pins
from pipevault.store.retention.removal import ORPHAN_MIN_AGE_S
from pipevault.store.retention.usage import last_uses_s

if TYPE_CHECKING:
    from pipevault.store.vault import Vault

UNUSED_MIN_AGE_S = 3600.0
"""An entry that no use is known of is unused only if it was published longer ago than this."""
_DAY_S = 86_400
QUARANTINE_MAX_AGE_S = 30.0 * _DAY_S
QUARANTINE_MAX_BYTES = 1_000_000_000
"""What was set aside earlier, or is more than this, goes with every pruning, oldest first."""
_NAMED_REASONS = 3


@dataclass(frozen=True)
class Going:
    """An entry that is to go. ``reason``: ``least recently used``, ``unused`` or ``not used for 40.0 days``."""

    key: Digest
    reason: str
    used_s: float | None
    """Its last use as noted; the entry stays if that changes before it goes."""
    modified_ns: int
    """Of its manifest; the same holds."""


@dataclass(frozen=True)
class Staying:
    """An entry that would have gone. ``reason``: ``pinned as prod``, ``in use by process 4711 on worker-3``, or
    ``needed by 7c2b5a1ac012, pinned as prod``.
    """

    key: Digest
    reason: str


@dataclass(frozen=True)
class PrunePlan:
    """What :func:`pipevault.store.retention.prune.carry_out` would do. Sizes in bytes."""

    entries: tuple[Going, ...]
    """In the order in which they go."""
    artifacts: tuple[Digest, ...]
    """What only these entries name."""
    orphans: tuple[Digest, ...]
    """Artifacts that no manifest names, older than an hour."""
    quarantined: tuple[Path, ...]
    strays: tuple[Digest, ...]
    """Keys without an entry that a signature or the note of a use is left of."""
    leftovers: tuple[Leftover, ...]
    """What dead processes left in ``tmp/``, ``locks/``, ``leases/`` and elsewhere; not part of the vault's size."""
    staying: tuple[Staying, ...]
    size_bytes: int
    """Of the vault as it is."""
    freed_bytes: int
    max_size: int | None
    because: tuple[str, ...]
    """Why ``max_size`` is not reached; empty if it is."""
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
        raise ValueError(f"max_size is {max_size}: 0 or more bytes are needed.")
    if older_than_s is not None and not older_than_s >= 0:
        raise ValueError(f"older_than_s is {older_than_s!r}: 0 or more seconds are needed.")
    now_s = time.time() if now_s is None else now_s
    contents = _Contents.read(vault.layout, now_s)
    kept = dict.fromkeys(keep, "just published")
    protected = {
        **_with_needed(kept, vault.layout, contents.manifests),
        **protections(vault.layout, contents.manifests, now_s),
        **kept,
    }
    choice = _Choice(contents, protected)
    chosen = chosen or {}
    going = only_needed_by([key for key in chosen if key not in protected], contents.manifests)
    chosen = {**dict.fromkeys(going, "nothing else needs it"), **chosen}
    for key in contents.ages.order:
        if key in chosen:
            choice.drop(key, chosen[key])
    for key, reason in _by_age(contents, older_than_s, unused, now_s):
        choice.drop(key, reason)
    quarantined = stale_quarantined(contents.quarantine, now_s)
    choice.left_bytes -= sum(contents.quarantine[path].size_bytes for path in quarantined)
    for path in _oldest_first(contents.quarantine)[len(quarantined) :]:
        if max_size is not None and choice.left_bytes > max_size:
            quarantined.append(path)
            choice.left_bytes -= contents.quarantine[path].size_bytes
    for key in contents.ages.order:
        if max_size is not None and choice.left_bytes > max_size:
            choice.drop(key, "least recently used")
    reached = max_size is None or choice.left_bytes <= max_size
    return PrunePlan(
        entries=tuple(
            Going(key, reason, contents.used_s.get(key), contents.manifests[key].modified_ns)
            for key, reason in choice.dropped.items()
        ),
        artifacts=tuple(sorted(choice.artifacts, key=attrgetter("hex"))),
        orphans=tuple(contents.old_orphans),
        quarantined=tuple(quarantined),
        strays=tuple(contents.strays),
        leftovers=find_leftovers(vault.layout),
        staying=tuple(Staying(key, reason) for key, reason in choice.staying.items()),
        size_bytes=contents.size_bytes,
        freed_bytes=contents.size_bytes - choice.left_bytes,
        max_size=max_size,
        because=() if reached else tuple(_obstacles(contents, choice)),
        problems=_problems(contents, older_than_s, unused),
        ahead=contents.ages.ahead,
        now_s=now_s,
    )


def stale_quarantined(files: Mapping[Path, FoundFile], now_s: float) -> list[Path]:
    """The quarantined ``files`` that are older or more than quarantine may hold, oldest first."""
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
    """When a file was set aside, as its name tells: moving it left its time of change as it was."""
    try:
        told = datetime.strptime(path.name.partition("-")[0], QUARANTINE_TIME)
    except ValueError:
        return file.modified_s
    return told.replace(tzinfo=timezone.utc).timestamp()


def protections(layout: Layout, manifests: Mapping[Digest, FoundManifest], now_s: float) -> dict[Digest, str]:
    """Why entries stay, whatever is asked. Raises like :func:`plan_prune`."""
    reasons = {
        key: "damaged, or of a later pipevault" for key, manifest in manifests.items() if not manifest.understood
    }
    return {**reasons, **use_reasons(layout, manifests)}


def use_reasons(layout: Layout, manifests: Mapping[Digest, FoundManifest] | None = None) -> dict[Digest, str]:
    """``pinned as prod`` or ``in use by process 4711 on worker-3`` for each entry that is, and ``needed by`` one of
    them for what they need. Raises as above. ``manifests``: those of the vault, if they were read already.
    """
    leases = [lease for lease in find_leases(layout) if lease.alive]
    by_key = {lease.key: [other for other in leases if other.key == lease.key] for lease in leases}
    reasons = {key: f"in use by {describe_leases(held)}" for key, held in by_key.items()}
    names: dict[Digest, list[str]] = {}
    for name, key in pins(layout).items():
        names.setdefault(key, []).append(name)
    reasons |= {key: f"pinned as {', '.join(named)}" for key, named in names.items()}
    return _with_needed(reasons, layout, manifests)


def _with_needed(
    reasons: Mapping[Digest, str], layout: Layout, manifests: Mapping[Digest, FoundManifest] | None
) -> dict[Digest, str]:
    """``reasons``, and one for each entry that is needed by those that have one."""
    needed = needed_by(reasons, needs_in(layout, manifests))
    return {**{key: f"needed by {root.short}, {reasons[root]}" for key, root in needed.items()}, **reasons}


@dataclass(frozen=True)
class _Contents:
    """A vault as it was read, each file once."""

    manifests: Mapping[Digest, FoundManifest]
    artifacts: Mapping[Digest, FoundFile]
    quarantine: Mapping[Path, FoundFile]
    signature_bytes: Mapping[Digest, int]
    names: Mapping[Digest, int]
    """How many manifests name an artifact."""
    used_s: Mapping[Digest, float]
    ages: Ages
    strays: tuple[Digest, ...]
    now_s: float

    @classmethod
    def read(cls, layout: Layout, now_s: float) -> _Contents:
        # The artifacts first: one whose manifest is published meanwhile must count as named.
        artifacts = find_artifacts(layout)
        used_s = last_uses_s(layout)
        signatures = find_files(layout.signatures_dir)
        manifests = find_manifests(layout)
        keys = {path: key for path in signatures if (key := layout.key_of_signature(path))}
        signature_bytes: Counter[Digest] = Counter()
        for path, key in keys.items():
            signature_bytes[key] += signatures[path].size_bytes
        left = {**used_s, **{keys[path]: signatures[path].modified_s for path in keys}}
        return cls(
            manifests=manifests,
            artifacts=artifacts,
            quarantine=find_files(layout.quarantine_dir),
            signature_bytes=signature_bytes,
            names=Counter(digest for manifest in manifests.values() for digest in manifest.artifacts),
            used_s=used_s,
            ages=judge({key: Times(found.modified_s, used_s.get(key)) for key, found in manifests.items()}, now_s),
            strays=tuple(
                sorted(
                    key for key, time_s in left.items() if key not in manifests and now_s - time_s >= ORPHAN_MIN_AGE_S
                )
            ),
            now_s=now_s,
        )

    @cached_property
    def size_bytes(self) -> int:
        return (
            sum(manifest.size_bytes for manifest in self.manifests.values())
            + sum(file.size_bytes for file in self.artifacts.values())
            + sum(file.size_bytes for file in self.quarantine.values())
            + sum(self.signature_bytes.values())
        )

    @cached_property
    def orphans(self) -> dict[Digest, FoundFile]:
        return {digest: file for digest, file in self.artifacts.items() if digest not in self.names}

    @cached_property
    def old_orphans(self) -> list[Digest]:
        return [digest for digest, file in self.orphans.items() if self.now_s - file.modified_s >= ORPHAN_MIN_AGE_S]


class _Choice:
    """Which entries go, and what is left then."""

    def __init__(self, contents: _Contents, protected: Mapping[Digest, str]) -> None:
        self._contents = contents
        self.protected = {key: reason for key, reason in protected.items() if key in contents.manifests}
        self._names = Counter(contents.names)
        self.dropped: dict[Digest, str] = {}
        self.artifacts: list[Digest] = []
        self.staying: dict[Digest, str] = {}
        gone_bytes = sum(contents.artifacts[digest].size_bytes for digest in contents.old_orphans)
        gone_bytes += sum(contents.signature_bytes.get(key, 0) for key in contents.strays)
        self.left_bytes = contents.size_bytes - gone_bytes

    def drop(self, key: Digest, reason: str) -> None:
        """Choose ``key`` unless it is chosen already or protected."""
        if key in self.dropped:
            return
        if key in self.protected:
            self.staying[key] = self.protected[key]
            return
        self.dropped[key] = reason
        manifest = self._contents.manifests[key]
        self.left_bytes -= manifest.size_bytes + self._contents.signature_bytes.get(key, 0)
        for digest in manifest.artifacts:
            self._names[digest] -= 1
            if not self._names[digest] and digest in self._contents.artifacts:
                self.artifacts.append(digest)
                self.left_bytes -= self._contents.artifacts[digest].size_bytes


def _by_age(contents: _Contents, older_than_s: float | None, unused: bool, now_s: float) -> list[tuple[Digest, str]]:
    """Entries with the reason why they go by age, least recently used first."""
    if contents.ages.clock_is_behind:
        return []
    limit_s = math.inf if older_than_s is None else older_than_s
    chosen = []
    for key in contents.ages.order:
        age_s = contents.ages.age_s[key]
        if age_s >= limit_s:
            chosen.append((key, f"not used for {age_s / _DAY_S:.1f} days"))
        elif unused and key not in contents.used_s and now_s - contents.manifests[key].modified_s >= UNUSED_MIN_AGE_S:
            chosen.append((key, "unused"))
    return chosen


def _problems(contents: _Contents, older_than_s: float | None, unused: bool) -> tuple[str, ...]:
    if contents.ages.clock_is_behind and (unused or older_than_s is not None):
        return (
            "Most times in the vault lie in the future, so the clock of this machine is behind: no entry is removed by "
            "its age.",
        )
    return ()


def _obstacles(contents: _Contents, choice: _Choice) -> list[str]:
    """Why no more can go, a clause each."""
    clauses = [f"{key.short} stays ({reason})" for key, reason in sorted(choice.protected.items())[:_NAMED_REASONS]]
    if (more := len(choice.protected) - _NAMED_REASONS) > 0:
        clauses.append(f"{more} more entries stay")
    if young := len(contents.orphans) - len(contents.old_orphans):
        clauses.append(f"{young} artifacts that no entry names are younger than an hour")
    return clauses
