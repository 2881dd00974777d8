"""Leftovers of dead processes: staging folders, leases, locks and their notes, temporary folders of the system.

Recovery needs none of this; it frees space. Never removed: what belongs to a process that lives, see
:mod:`pipevault.files.claims`. :func:`sweep` looks at everything, :func:`tidy` at a few files, and so often that their
number stays bounded without any pruning.
"""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Iterable, Iterator
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path

from pipevault.digest import Digest
from pipevault.errors import VaultError
from pipevault.files.claims import abandoned, locks_hold
from pipevault.files.claims import remove as remove_path
from pipevault.files.flock import locked
from pipevault.files.heartbeat import BEAT_LIMIT_S, is_silent
from pipevault.files.scratch import scratch_folders, scratch_places
from pipevault.store.inventory import size_bytes_of
from pipevault.store.layout import Layout
from pipevault.store.locks.lock import guard
from pipevault.store.places import children

LOCK_MIN_AGE_S = BEAT_LIMIT_S
"""A lock file without a holder goes when its entry exists, else at this age."""
TIDY_ABOVE = 64
"""So many files may lie in a folder before :func:`tidy` looks at it."""
TIDY_AT_ONCE = 16
"""It looks at so many, picked by chance: more than any process leaves for each call, so that they become fewer."""

_DIED = "the process that made it has ended"


@dataclass(frozen=True)
class Leftover:
    """A file or folder that has become useless; ``size_bytes`` with all that is in it; ``reason``: a clause."""

    path: Path
    size_bytes: int
    reason: str


def find_leftovers(layout: Layout, *, temporary_dir: Path | None = None) -> tuple[Leftover, ...]:
    """Return what :func:`sweep` would remove now; nothing is changed. A lock looks held for the moment of the look."""
    return tuple(_work(layout, temporary_dir, remove=False))


def sweep(layout: Layout, *, temporary_dir: Path | None = None) -> list[Leftover]:
    """Remove what dead processes left, and return it. What this user may not remove stays and is left out."""
    return [item for item in _work(layout, temporary_dir, remove=True) if not os.path.lexists(item.path)]


def tidy(layout: Layout) -> None:
    """Remove a few files of dead processes where many lie. Costs the listing of three folders, and never raises."""
    for folder, look in ((layout.leases_dir, _claimed), (layout.tmp_dir, _claimed), (layout.locks_dir, _locks)):
        with suppress(OSError, VaultError):
            names = os.listdir(folder)
            if len(names) > TIDY_ABOVE:
                picked = secrets.SystemRandom().sample(names, TIDY_AT_ONCE)
                for _ in look(layout, [folder / name for name in picked], remove=True):
                    pass


def _work(layout: Layout, temporary_dir: Path | None, *, remove: bool) -> Iterator[Leftover]:
    yield from _claimed(layout, (*children(layout.tmp_dir), *children(layout.leases_dir)), remove=remove)
    yield from _locks(layout, children(layout.locks_dir), remove=remove)
    temporary = [temporary_dir] if temporary_dir else [place.folder for place in scratch_places()]
    for path in (path for folder in temporary for path in scratch_folders(folder)):
        with abandoned(path) as is_free:
            if is_free:
                yield _removed(path, _DIED, remove)


def _claimed(layout: Layout, paths: Iterable[Path], *, remove: bool) -> Iterator[Leftover]:
    """Staging folders and leases."""
    for path in paths:
        if layout.is_staging(path) or layout.key_of_lease(path) is not None:
            with abandoned(path) as is_free:
                # Earlier releases, which put a mark into the name, locked no folder.
                if is_free and (not layout.is_marked_staging(path) or is_silent(path)):
                    yield _removed(path, _DIED, remove)


def _locks(layout: Layout, paths: Iterable[Path], *, remove: bool) -> Iterator[Leftover]:
    for key in sorted({key for path in paths if (key := layout.key_of_lock(path))}):
        guarding = guard(layout, key, timeout_s=0) if remove else nullcontext(True)
        lock = layout.lock_file(key)
        # A lock file that is missing is free, and is not made by looking at it.
        with guarding as guarded, locked(lock, timeout_s=0) if os.path.lexists(lock) else nullcontext(True) as free:
            if guarded and free:
                yield from _lock_files(layout, key, remove)


def _lock_files(layout: Layout, key: Digest, remove: bool) -> Iterator[Leftover]:
    """The files of a lock without a holder; the caller holds it and its guard."""
    note, lock = layout.holder_file(key), layout.lock_file(key)
    if os.path.lexists(note):
        if not locks_hold(note) and not is_silent(note):
            return  # the lock may be held all the same
        yield _removed(note, _DIED, remove)
    has_entry = os.path.lexists(layout.manifest_file(key))
    if has_entry or not os.path.lexists(lock) or time.time() - lock.lstat().st_mtime >= LOCK_MIN_AGE_S:
        reason = "no process holds it, and the entry is there" if has_entry else "no process holds it, and it is old"
        # The guard last: whoever waits for it sees that it is gone, and then that the lock is.
        yield from (_removed(path, reason, remove) for path in (lock, layout.guard_file(key)) if os.path.lexists(path))


def _removed(path: Path, reason: str, remove: bool) -> Leftover:
    size_bytes = size_bytes_of(path)
    if remove:
        remove_path(path)
    return Leftover(path, size_bytes, reason)
