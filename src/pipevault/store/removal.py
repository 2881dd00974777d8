"""Removing entries, and artifacts that no entry names: first a plan, then what really happened.

Manifests go before artifacts, so that no manifest ever names an artifact that this removed.
"""

from __future__ import annotations

import os
import re
import stat
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipevault.digest import Digest
from pipevault.errors import CorruptEntryError, NewerVaultError, UnknownKeyError
from pipevault.store.atomic import vault_errors
from pipevault.store.layout import Layout
from pipevault.store.manifest import Manifest
from pipevault.store.read import iter_keys

_DIGEST_IN_TEXT = re.compile(rb"(?<![0-9a-f])[0-9a-f]{64}(?![0-9a-f])")


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


def plan_entries_removal(layout: Layout, keys: Sequence[Digest]) -> RemovalPlan:
    """The plan for ``keys``; entries with a damaged manifest can go too. :class:`UnknownKeyError`."""
    wanted, present = set(keys), set(iter_keys(layout))
    if missing := sorted(wanted - present):
        raise UnknownKeyError(f"No entry of {layout.root} has the key {missing[0].short}.", missing[0].hex)
    named = _named_artifacts(layout, wanted)
    shared = named & _named_artifacts(layout, present - wanted)
    going = sorted(named - shared)
    files = [layout.manifest_file(key) for key in sorted(wanted)] + [layout.artifact_file(item) for item in going]
    return RemovalPlan(
        keys=tuple(sorted(wanted)),
        artifacts=tuple(going),
        shared=tuple(sorted(shared)),
        size_bytes=sum(_size_bytes(path) for path in files),
    )


def find_orphans(layout: Layout, *, now_s: float | None = None) -> tuple[Orphan, ...]:
    """The artifacts that no manifest names, sorted. ``now_s``: seconds since the epoch; default: now.

    What a damaged manifest may name is no orphan. :class:`~pipevault.errors.VaultError`: a manifest or a folder
    cannot be read, so that nothing can be said.
    """
    now_s = time.time() if now_s is None else now_s
    # The artifacts first: one whose manifest is published meanwhile must count as named.
    found = list(_artifacts(layout))
    named = _named_artifacts(layout, iter_keys(layout))
    return tuple(
        Orphan(digest, status.st_size, now_s - status.st_mtime) for digest, status in found if digest not in named
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


def remove_entries(layout: Layout, plan: RemovalPlan) -> RemovalReport:
    """Carry ``plan`` out; an artifact that an entry published since then names stays.

    :class:`~pipevault.errors.VaultNotWritableError` if a file cannot be removed; what was removed stays
    removed.
    """
    freed_bytes = 0
    removed_keys, removed_artifacts = [], []
    for key in plan.keys:
        size_bytes = _remove(layout.manifest_file(key))
        if size_bytes is not None:
            removed_keys.append(key)
            freed_bytes += size_bytes
    still_named = _named_artifacts(layout, iter_keys(layout))
    for digest in plan.artifacts:
        size_bytes = None if digest in still_named else _remove(layout.artifact_file(digest))
        if size_bytes is not None:
            removed_artifacts.append(digest)
            freed_bytes += size_bytes
    return RemovalReport(
        keys=tuple(removed_keys),
        artifacts=tuple(removed_artifacts),
        shared=tuple(sorted({*plan.shared, *plan.artifacts} & still_named)),
        freed_bytes=freed_bytes,
    )


def _artifacts(layout: Layout) -> Iterator[tuple[Digest, os.stat_result]]:
    """Every regular file at an artifact's place, sorted by digest."""
    with vault_errors(layout.artifacts_dir, "listed"):
        shards = sorted(layout.artifacts_dir.iterdir()) if layout.artifacts_dir.is_dir() else []
        for shard in filter(layout.is_shard, shards):
            for path in sorted(shard.iterdir()) if shard.is_dir() and not shard.is_symlink() else []:
                digest = layout.digest_of_artifact(path)
                if digest is None:
                    continue
                try:
                    status = path.lstat()
                except FileNotFoundError:
                    continue
                if stat.S_ISREG(status.st_mode):
                    yield digest, status


def _named_artifacts(layout: Layout, keys: Iterable[Digest]) -> set[Digest]:
    named: set[Digest] = set()
    for key in keys:
        path = layout.manifest_file(key)
        with vault_errors(path, "read"):
            try:
                data = path.read_bytes()
            except FileNotFoundError:
                continue
        try:
            named.update(Manifest.from_bytes(data, path).artifact_sizes)
        except (CorruptEntryError, NewerVaultError):
            # It may be a later format or mended by hand: keep every artifact that it could mean.
            named.update(Digest(match.decode()) for match in _DIGEST_IN_TEXT.findall(data))
    return named


def _size_bytes(path: Path) -> int:
    try:
        return os.lstat(path).st_size
    except FileNotFoundError:
        return 0


def _remove(path: Path) -> int | None:
    """Bytes of the removed file; ``None`` if it was not there."""
    with vault_errors(path, "removed"):
        try:
            size_bytes = os.lstat(path).st_size
            path.unlink()
        except FileNotFoundError:
            return None
    return size_bytes
