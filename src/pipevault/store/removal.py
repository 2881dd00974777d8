"""Removing entries: first a plan, then what really happened.

Manifests go before artifacts, so that no manifest ever names an artifact that this removed.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipevault.digest import Digest
from pipevault.errors import CorruptEntryError, NewerVaultError, UnknownKeyError
from pipevault.store.atomic import vault_errors
from pipevault.store.layout import Layout
from pipevault.store.manifest import Manifest
from pipevault.store.read import iter_keys

_DIGEST_IN_TEXT = re.compile(rb"(?<![0-9a-f])[0-9a-f]{64}(?![0-9a-f])")


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


def _named_artifacts(layout: Layout, keys: Iterable[Digest]) -> set[Digest]:
    named: set[Digest] = set()
    for key in keys:
        path = layout.manifest_file(key)
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
