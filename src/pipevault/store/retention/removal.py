"""Removing entries, and artifacts that no entry names: first a plan, then what really happened.

Manifests go before artifacts, so that no manifest ever names an artifact that this removed. What belongs to an entry
and is no part of it (signatures, the note of its last use) goes after its manifest.
"""

from __future__ import annotations

import os
import secrets
import socket
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from pipevault.digest import Digest
from pipevault.errors import EntryInUseError, UnknownKeyError
from pipevault.files.atomic import fsync_folder, make_folder, vault_errors
from pipevault.files.flock import HeldLock, NotLocked, lock_open
from pipevault.store.inventory import find_artifacts, find_manifests, mentioned, named_by, read_found
from pipevault.store.layout import Layout
from pipevault.store.locks.leases import describe_leases, find_leases
from pipevault.store.needs import needed_by, needs_in, only_needed_by
from pipevault.store.retention.pins import pins
from pipevault.store.retention.usage import forget_use

ORPHAN_MIN_AGE_S = 3600.0
"""A younger artifact may belong to a publisher that has not written its manifest yet."""


@dataclass(frozen=True)
class Orphan:
    """An artifact that no entry names. ``age_s`` is negative where the file system's clock runs ahead."""

    digest: Digest
    size_bytes: int
    age_s: float

    @property
    def removable(self) -> bool:
        return self.age_s >= ORPHAN_MIN_AGE_S


@dataclass(frozen=True)
class RemovalPlan:
    """What :func:`remove_entries` would do: all sorted, nothing done yet."""

    keys: tuple[Digest, ...]
    artifacts: tuple[Digest, ...]
    shared: tuple[Digest, ...]
    """Artifacts of these entries that stay, because other entries name them."""
    size_bytes: int
    """Bytes of the manifests and artifacts that would go."""


@dataclass(frozen=True)
class RemovalReport:
    """What was removed by this call; a file that another process removed first is not counted."""

    keys: tuple[Digest, ...]
    artifacts: tuple[Digest, ...]
    shared: tuple[Digest, ...]
    freed_bytes: int


def plan_entries_removal(layout: Layout, keys: Sequence[Digest], *, with_needed: bool = False) -> RemovalPlan:
    """The plan for ``keys``; entries with a damaged manifest can go too. :class:`UnknownKeyError`.

    ``with_needed``: also the entries that these need and no other does, such as the graphs of a plan.
    """
    found = {key: read_found(layout, key) for key in keys}
    if missing := sorted(key for key, manifest in found.items() if manifest is None):
        raise UnknownKeyError(f"No entry of {layout.root} has the key {missing[0].short}.", missing[0].hex)
    if with_needed:
        manifests = find_manifests(layout)
        found |= {key: manifests[key] for key in only_needed_by(found.keys(), manifests)}
    wanted = found.keys()
    named = named_by(manifest for manifest in found.values() if manifest is not None)
    shared = mentioned(layout, named, without=wanted)
    going = sorted(named - shared)
    files = [layout.artifact_file(item) for item in going]
    files += [file for key in sorted(wanted) for file in (layout.manifest_file(key), *signature_files(layout, key))]
    return RemovalPlan(
        keys=tuple(sorted(wanted)),
        artifacts=tuple(going),
        shared=tuple(sorted(shared)),
        size_bytes=sum(_size_bytes(path) for path in files),
    )


def refuse_in_use(layout: Layout, keys: Sequence[Digest], *, ignore_leases: bool = False) -> None:
    """:class:`EntryInUseError` if one of ``keys`` is pinned or, unless ``ignore_leases``, a live process has loaded it;
    so it is if an entry that needs it is.

    :class:`~pipevault.errors.PinError`: a pin cannot be read.
    """
    needs = needs_in(layout)
    pinned = {key: name for name, key in pins(layout).items()}
    needed = needed_by(pinned, needs)
    for key in keys:
        holder = key if key in pinned else needed.get(key)
        if holder is not None:
            name = pinned[holder]
            raise EntryInUseError(
                f"{_is_held(key, holder)} pinned as {name}. Unpin it first: pipevault unpin {name}", key.hex
            )
    if ignore_leases:
        return
    leases = [lease for lease in find_leases(layout) if lease.alive]
    needed = needed_by([lease.key for lease in leases], needs)
    for key in keys:
        holder = needed.get(key, key)
        if held := [lease for lease in leases if lease.key == holder]:
            raise EntryInUseError(
                f"{_is_held(key, holder)} in use by {describe_leases(held)}. Stop it first, or remove the entry all "
                "the same with --force.",
                key.hex,
            )


def _is_held(key: Digest, holder: Digest) -> str:
    return f"{key.short} is" if holder == key else f"{key.short} is needed by {holder.short}, which is"


def find_orphans(layout: Layout, *, now_s: float | None = None) -> tuple[Orphan, ...]:
    """The artifacts that no manifest names, sorted. ``now_s``: seconds since the epoch; default: now.

    What a damaged manifest may name is no orphan. :class:`~pipevault.errors.VaultError`: a manifest or a folder
    cannot be read, so that nothing can be said.
    """
    now_s = time.time() if now_s is None else now_s
    # The artifacts first: one whose manifest is published meanwhile must count as named.
    artifacts = find_artifacts(layout)
    named = named_by(find_manifests(layout).values())
    return tuple(
        Orphan(digest, file.size_bytes, now_s - file.modified_s)
        for digest, file in artifacts.items()
        if digest not in named
    )


def plan_orphans_removal(orphans: Sequence[Orphan]) -> RemovalPlan:
    """The plan for those of ``orphans`` that are old enough; :func:`remove_entries` carries it out."""
    going = [orphan for orphan in orphans if orphan.removable]
    return RemovalPlan(
        keys=(),
        artifacts=tuple(sorted(orphan.digest for orphan in going)),
        shared=(),
        size_bytes=sum(orphan.size_bytes for orphan in going),
    )


def remove_entries(layout: Layout, plan: RemovalPlan, *, ignore_leases: bool = False) -> RemovalReport:
    """Carry ``plan`` out; an artifact that an entry published since then names stays.

    :class:`EntryInUseError` if one is pinned by now, or leased: nothing is removed then.

    :class:`~pipevault.errors.VaultNotWritableError` if a file cannot be removed; what was removed stays
    removed.
    """
    freed_bytes = 0
    removed_keys = []
    aside: dict[Digest, Aside] = {}
    try:
        for key in plan.keys:
            if (taken := take_aside(layout, key)) is not None:
                aside[key] = taken
        # Whoever pinned or leased one before it was taken aside is seen now; whoever does so later finds it gone.
        refuse_in_use(layout, tuple(aside), ignore_leases=ignore_leases)
    except BaseException:  # whatever it was goes on
        for key, taken in aside.items():
            taken.put_back(layout, key)
        raise
    for key, taken in aside.items():
        freed_bytes += taken.remove()
        removed_keys.append(key)
    removed_artifacts, freed, kept = remove_artifacts(layout, plan.artifacts, after=removed_keys)
    remove_empty_shelves(layout, removed_keys)
    return RemovalReport(
        keys=tuple(removed_keys),
        artifacts=tuple(removed_artifacts),
        shared=tuple(sorted({*plan.shared, *kept})),
        freed_bytes=freed_bytes + freed + sum(remove_belongings(layout, key) for key in removed_keys),
    )


@dataclass(frozen=True)
class Aside:
    """A manifest where nobody looks: the entry is absent, and not removed yet. Its lock keeps others from taking it for
    what a dead process left.
    """

    path: Path
    lock: HeldLock | None

    def remove(self) -> int:
        """Remove it; bytes."""
        size_bytes = remove_file(self.path) or 0
        self._release()
        return size_bytes

    def put_back(self, layout: Layout, key: Digest) -> None:
        """Give the entry its manifest again, unless it was frozen again meanwhile."""
        manifest = layout.manifest_file(key)
        with vault_errors(manifest, "put back"):
            make_folder(manifest.parent)
            if not manifest.exists():
                os.rename(self.path, manifest)
            self.path.unlink(missing_ok=True)
        self._release()

    def _release(self) -> None:
        if self.lock is not None:
            self.lock.release()


def take_aside(layout: Layout, key: Digest) -> Aside | None:
    """Move the manifest of ``key`` aside; ``None`` if there was none."""
    make_folder(layout.tmp_dir)
    manifest = layout.manifest_file(key)
    path = layout.staging_dir(host=socket.gethostname(), pid=os.getpid(), random_hex=secrets.token_hex(8))
    lock: HeldLock | NotLocked | None = None
    with vault_errors(manifest, "removed"):
        try:
            with suppress(OSError):  # a socket, a link to nowhere, or not for this user: it is renamed all the same
                lock = lock_open(os.open(manifest, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0)), manifest)
            os.rename(manifest, path)
        except FileNotFoundError:
            if isinstance(lock, HeldLock):
                lock.release()
            return None
    return Aside(path, lock if isinstance(lock, HeldLock) else None)


def remove_artifacts(
    layout: Layout, digests: Iterable[Digest], *, after: Iterable[Digest] = ()
) -> tuple[list[Digest], int, set[Digest]]:
    """Remove those of ``digests`` that no manifest names now; which they were, their bytes, and those that are named.

    One whose time of change moves meanwhile stays: a publisher that is about to name it has touched it.
    ``after``: the keys whose manifests were removed before; that is durable before the first artifact goes.
    """
    for folder in sorted({layout.manifest_file(key).parent for key in after}):
        # A power cut must not bring a manifest back whose artifacts are gone.
        with vault_errors(folder, "written"), suppress(FileNotFoundError):
            fsync_folder(folder)
    stamps = {digest: _modified_ns(layout.artifact_file(digest)) for digest in digests}
    named = mentioned(layout, stamps)
    removed, freed_bytes = [], 0
    for digest, modified_ns in stamps.items():
        path = layout.artifact_file(digest)
        size_bytes = None if digest in named or _modified_ns(path) != modified_ns else remove_file(path)
        if size_bytes is not None:
            removed.append(digest)
            freed_bytes += size_bytes
    return removed, freed_bytes, named


def remove_belongings(layout: Layout, key: Digest) -> int:
    """Remove the signatures of ``key`` and the note of its last use, unless it has a manifest again; bytes."""
    if layout.manifest_file(key).exists():
        return 0
    forget_use(layout, key)
    return sum(remove_file(path) or 0 for path in signature_files(layout, key))


def remove_empty_shelves(layout: Layout, keys: Iterable[Digest] | None = None) -> None:
    """Remove the folders of the shelves of ``keys``, or of all, that hold nothing; never raises.

    A publisher whose shelf vanishes makes it anew.
    """
    if keys is not None:
        folders = {layout.manifest_file(key).parent for key in keys}
    else:
        folders = set()
        with suppress(OSError):
            folders = {path for path in layout.entries_dir.iterdir() if layout.is_shard(path)}
    for folder in sorted(folders):
        with suppress(OSError):  # not empty, as a rule
            os.rmdir(folder)


def signature_files(layout: Layout, key: Digest) -> list[Path]:
    folder = layout.signature_file(key, "0" * 16).parent
    with vault_errors(folder, "listed"):
        try:
            names = [name for name in sorted(os.listdir(folder)) if name.startswith(key.hex)]
        except (FileNotFoundError, NotADirectoryError):
            return []
    return [folder / name for name in names if layout.key_of_signature(folder / name) == key]


def remove_file(path: Path) -> int | None:
    """Bytes of the removed file; ``None`` if it was not there. :class:`~pipevault.errors.VaultNotWritableError`."""
    with vault_errors(path, "removed"):
        try:
            size_bytes = os.lstat(path).st_size
            path.unlink()
        except FileNotFoundError:
            return None
    return size_bytes


def _modified_ns(path: Path) -> int:
    try:
        return os.lstat(path).st_mtime_ns
    except OSError:  # the removal will say why, or it is gone
        return 0


def _size_bytes(path: Path) -> int:
    try:
        return os.lstat(path).st_size
    except (FileNotFoundError, NotADirectoryError):
        return 0
