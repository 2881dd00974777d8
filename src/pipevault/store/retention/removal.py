"""Removing entries, unless something holds them (pins, leases of live processes, the needs of entries that have one),
and artifacts that no entry names.

Manifests go before artifacts, so that no manifest ever names an artifact that this removed. Signatures and the note of
the last use go after the manifest.
"""

from __future__ import annotations

import os
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from pipevault.digest import Digest
from pipevault.errors import EntryInUseError, UnknownKeyError
from pipevault.files.atomic import fsync_folder, make_folder, vault_errors
from pipevault.files.flock import HeldLock, lock_open
from pipevault.reading import open_place
from pipevault.store.inventory import (
    FoundManifest,
    find_manifests,
    find_spread,
    mentioned,
    named_by,
    read_found,
    size_bytes_of,
)
from pipevault.store.layout import Layout
from pipevault.store.locks.leases import live_leases
from pipevault.store.needs import needed_by, needs_in, only_needed_by
from pipevault.store.places import signature_files
from pipevault.store.publish import own_place
from pipevault.store.retention.pins import pins
from pipevault.store.retention.usage import forget_use

ORPHAN_MIN_AGE_S = 3600.0
"""A younger artifact may belong to a publisher that has not written its manifest yet."""


@dataclass(frozen=True)
class Removal:
    """A removal that is planned, or the files that one removed; one that another process removed first is not counted.
    ``shared``: artifacts of these entries that stay, because other entries name them.
    """

    keys: tuple[Digest, ...]
    artifacts: tuple[Digest, ...]
    shared: tuple[Digest, ...]
    size_bytes: int


def plan_entries_removal(
    layout: Layout, keys: Sequence[Digest], *, with_needed: bool = False, shown: bool = True
) -> Removal:
    """Return the plan for ``keys``; entries with a damaged manifest can go too. :class:`UnknownKeyError`.

    ``with_needed``: also the entries that only these need, such as the graphs of a plan. Unless it is to be ``shown``,
    no manifest is searched for what is shared, which :func:`remove_entries` does anyway.
    """
    found = {key: read_found(layout, key) for key in keys}
    if missing := sorted(key for key, manifest in found.items() if manifest is None):
        raise UnknownKeyError(f"No entry of {layout.root} has the key {missing[0].short}.", missing[0].hex)
    if with_needed:
        manifests = find_manifests(layout)
        found |= {key: manifests[key] for key in only_needed_by(found.keys(), manifests)}
    wanted = sorted(found)
    named = named_by(manifest for manifest in found.values() if manifest is not None)
    if not shown:
        return Removal(tuple(wanted), tuple(sorted(named)), (), 0)
    shared = mentioned(layout, named, without=wanted)
    going = sorted(named - shared)
    files = [layout.artifact_file(item) for item in going]
    files += [file for key in wanted for file in (layout.manifest_file(key), *signature_files(layout, key))]
    return Removal(tuple(wanted), tuple(going), tuple(sorted(shared)), sum(map(size_bytes_of, files)))


@dataclass(frozen=True)
class Hold:
    """A reason to keep the entry ``key``: the entry ``holder``, itself or one that needs it, is ``pinned as prod`` or
    ``in use by process 4711 on worker-3``.
    """

    key: Digest
    holder: Digest
    cause: str
    remedy: str

    @property
    def reason(self) -> str:
        """``pinned as prod``, or ``needed by 7c2b5a1ac012, which is pinned as prod``."""
        return self.cause if self.key == self.holder else f"needed by {self.holder.short}, which is {self.cause}"


def find_holds(
    layout: Layout, manifests: Mapping[Digest, FoundManifest] | None = None, *, ignore_leases: bool = False
) -> dict[Digest, Hold]:
    """Return what keeps each entry that is kept. ``manifests``: those of the vault, if they were read already.
    :class:`~pipevault.errors.PinError`, :class:`~pipevault.errors.VaultError`: a pin or anything else cannot be read.
    """
    found: dict[Digest, Hold] = {}
    leases: dict[Digest, list[str]] = {} if ignore_leases else live_leases(layout)
    for key, (first, *others) in leases.items():
        cause = f"in use by {first}" + (f" and {len(others)} more" if others else "")
        found[key] = Hold(key, key, cause, "Stop it first, or remove the entry all the same with --force.")
    names: dict[Digest, list[str]] = defaultdict(list)
    for name, key in pins(layout).items():
        names[key].append(name)
    for key, pinned in names.items():
        found[key] = Hold(key, key, f"pinned as {', '.join(pinned)}", f"Unpin it first: pipevault unpin {pinned[0]}")
    for key, holder in needed_by(found, needs_in(layout, manifests)).items():
        found[key] = Hold(key, holder, found[holder].cause, found[holder].remedy)
    return found


def refuse_in_use(layout: Layout, keys: Sequence[Digest], *, ignore_leases: bool = False) -> None:
    """Raise :class:`EntryInUseError` if one of ``keys``, or an entry that needs it, is pinned or, unless
    ``ignore_leases``, loaded by a live process. :class:`~pipevault.errors.PinError`: a pin cannot be read.
    """
    holds = find_holds(layout, ignore_leases=ignore_leases)
    if hold := next((holds[key] for key in keys if key in holds), None):
        raise EntryInUseError(f"{hold.key.short} is {hold.reason}. {hold.remedy}", hold.key.hex)


def find_orphans(layout: Layout) -> tuple[Removal, Removal]:
    """Return the artifacts that no manifest names, those that are old enough to go and the others; those that a damaged
    manifest may name are left out. :class:`~pipevault.errors.VaultError`: a manifest or a folder cannot be read.
    """
    # The artifacts first: one whose manifest is published meanwhile must count as named.
    artifacts = find_spread(layout, layout.artifacts_dir)
    named, oldest_s = named_by(find_manifests(layout).values()), time.time() - ORPHAN_MIN_AGE_S
    old, young = dict[Digest, int](), dict[Digest, int]()
    for digest, file in artifacts.items():
        if digest not in named:
            (old if file.st_mtime <= oldest_s else young)[digest] = file.st_size
    return Removal((), tuple(old), (), sum(old.values())), Removal((), tuple(young), (), sum(young.values()))


def remove_entries(layout: Layout, plan: Removal, *, ignore_leases: bool = False) -> Removal:
    """Carry ``plan`` out; an artifact that an entry published since then names stays.

    :class:`EntryInUseError` if one is pinned by now, or leased: nothing is removed then.
    :class:`~pipevault.errors.VaultNotWritableError` if a file cannot be removed; what was removed stays removed.
    """
    with ExitStack() as stack:
        taken = {key: stack.enter_context(take_aside(layout, key)) for key in plan.keys}
        aside = {key: path for key, path in taken.items() if path is not None}
        # Whoever pinned or leased one before it was taken aside is seen now; whoever does so later finds it gone.
        refuse_in_use(layout, list(aside), ignore_leases=ignore_leases)
        size_bytes = sum(remove_file(path) or 0 for path in aside.values())
    artifacts, artifact_bytes, kept = remove_artifacts(layout, plan.artifacts, after=aside)
    remove_empty_shelves(layout, aside)
    size_bytes += artifact_bytes + sum(remove_belongings(layout, key) for key in aside)
    return Removal(tuple(aside), tuple(artifacts), tuple(sorted({*plan.shared, *kept})), size_bytes)


@contextmanager
def take_aside(layout: Layout, key: Digest) -> Iterator[Path | None]:
    """Move the manifest of ``key`` aside, so that the entry is absent, and give its place; ``None`` if there is none.
    Unless it was removed there, it is put back, if it was not frozen again meanwhile. Its lock keeps others from taking
    it for what a dead process left.
    """
    make_folder(layout.tmp_dir)
    manifest, place = layout.manifest_file(key), own_place(layout)
    with ExitStack() as held:
        with suppress(OSError):  # a socket, a link, or not for this user: it is renamed all the same
            lock = lock_open(open_place(manifest), manifest)
            if isinstance(lock, HeldLock):
                held.callback(lock.release)
        try:
            with vault_errors(manifest, "removed"), suppress(FileNotFoundError):
                os.rename(manifest, place)
            yield place if os.path.lexists(place) else None
        finally:
            if os.path.lexists(place):
                with vault_errors(manifest, "put back"):
                    make_folder(manifest.parent)
                    if not manifest.exists():
                        os.rename(place, manifest)
                    place.unlink(missing_ok=True)


def remove_artifacts(
    layout: Layout, digests: Iterable[Digest], *, after: Iterable[Digest] = ()
) -> tuple[list[Digest], int, set[Digest]]:
    """Remove those of ``digests`` that no manifest names now; return which, their bytes, and those that are named. One
    whose time of change moves meanwhile stays: a publisher that is about to name it has touched it. ``after``: the keys
    whose manifests were removed before; that is durable before the first artifact goes.
    """
    for folder in sorted({layout.manifest_file(key).parent for key in after}):
        # A power cut must not bring a manifest back whose artifacts are gone.
        with vault_errors(folder, "written"), suppress(FileNotFoundError):
            fsync_folder(folder)
    stamps = {digest: _modified_ns(layout.artifact_file(digest)) for digest in digests}
    named = mentioned(layout, stamps)
    removed: dict[Digest, int] = {}
    for digest, modified_ns in stamps.items():
        path = layout.artifact_file(digest)
        if digest not in named and _modified_ns(path) == modified_ns and (size_bytes := remove_file(path)) is not None:
            removed[digest] = size_bytes
    return list(removed), sum(removed.values()), named


def remove_belongings(layout: Layout, key: Digest) -> int:
    """Remove the signatures of ``key`` and the note of its last use, unless it has a manifest again; return bytes."""
    if layout.manifest_file(key).exists():
        return 0
    forget_use(layout, key)
    return sum(remove_file(path) or 0 for path in signature_files(layout, key))


def remove_empty_shelves(layout: Layout, keys: Iterable[Digest] | None = None) -> None:
    """Remove the folders of the shelves of ``keys``, or of all, that hold nothing. Never raises."""
    with suppress(OSError):
        every = layout.entries_dir.iterdir() if keys is None else map(layout.manifest_file, keys)
        folders = {path if keys is None else path.parent for path in every}
        for folder in sorted(filter(layout.is_shard, folders)):
            with suppress(OSError):  # not empty, as a rule
                os.rmdir(folder)


def remove_file(path: Path) -> int | None:
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
