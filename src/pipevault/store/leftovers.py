"""What dead processes left: staging folders, locks and their notes, folders in the system's temporary folder.

Nothing of it is ever read as part of an entry, so recovery needs none of this; it frees space. Never removed:
what belongs to a process that lives. Where that cannot be told (another host, container or boot), what was last
changed less than :data:`UNKNOWN_OWNER_MIN_AGE_S` ago stays, and so it does where its time lies ahead of the clock.
"""

from __future__ import annotations

import os
import re
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from pipevault.digest import Digest
from pipevault.store.atomic import vault_errors
from pipevault.store.flock import HeldLock, try_lock
from pipevault.store.layout import Layout
from pipevault.store.liveness import is_process_alive
from pipevault.store.lock import guard, read_holder

UNKNOWN_OWNER_MIN_AGE_S = 86_400.0
LOCK_MIN_AGE_S = 86_400.0
"""A lock file that nobody holds goes when its entry exists, else at this age."""

_MARKED_NAME = re.compile(r"pipevault-[a-z]+-(\d{1,10})-([0-9a-f]{24})-[a-z0-9_]+")
_LOCKED_NAME = re.compile(r"pipevault-(?:build|graphs)-[0-9a-f]{32}(?:\.lock)?")
_DIED = "the process that made it has ended"
_OLD = "it cannot be told whether the process that made it lives, but it is old"


@dataclass(frozen=True)
class Leftover:
    """A file or folder that nobody needs; ``size_bytes`` with all that is in it; ``reason``: a clause."""

    path: Path
    size_bytes: int
    reason: str


def find_leftovers(
    layout: Layout, *, now_s: float | None = None, temporary_dir: Path | None = None
) -> tuple[Leftover, ...]:
    """What :func:`sweep` would remove now; nothing is changed. A lock may look held for the moment of the look."""
    return tuple(_work(layout, now_s, temporary_dir, remove=False))


def sweep(layout: Layout, *, now_s: float | None = None, temporary_dir: Path | None = None) -> list[Leftover]:
    """Remove what dead processes left; what was removed. What this user may not remove stays and is left out.

    ``now_s``: seconds since the epoch; default: now. ``temporary_dir``: default: the system's. Processes may work
    in the vault meanwhile. :class:`~pipevault.errors.VaultError` if the vault cannot be listed.
    """
    return [item for item in _work(layout, now_s, temporary_dir, remove=True) if not os.path.lexists(item.path)]


def _work(layout: Layout, now_s: float | None, temporary_dir: Path | None, *, remove: bool) -> Iterator[Leftover]:
    now_s = time.time() if now_s is None else now_s
    yield from _staging(layout, now_s, remove)
    yield from _locks(layout, now_s, remove)
    yield from _temporary(temporary_dir or Path(tempfile.gettempdir()), now_s, remove)


def _staging(layout: Layout, now_s: float, remove: bool) -> Iterator[Leftover]:
    for path in _children(layout.tmp_dir):
        owner = layout.staging_owner(path)
        if owner is not None and (reason := _folder_reason(path, *owner, now_s)):
            yield _removed(path, reason, remove)


def _locks(layout: Layout, now_s: float, remove: bool) -> Iterator[Leftover]:
    keys = sorted({key for path in _children(layout.locks_dir) if (key := layout.key_of_lock(path))})
    for key in keys:
        guarding = guard(layout, key, timeout_s=0) if remove else nullcontext(True)
        with guarding as guarded, _free_lock(layout.lock_file(key)) as free:
            if guarded and free:
                yield from _lock_files(layout, key, now_s, remove)


def _lock_files(layout: Layout, key: Digest, now_s: float, remove: bool) -> Iterator[Leftover]:
    """The files of a lock that nobody holds; the caller holds it and its guard."""
    note, lock = layout.holder_file(key), layout.lock_file(key)
    if os.path.lexists(note):
        holder = read_holder(note)
        alive = holder.process.is_alive() if holder else None
        if alive or (alive is None and _age_s(note, now_s) < UNKNOWN_OWNER_MIN_AGE_S):
            return  # where locks lie, the lock may be held all the same
        yield _removed(note, _DIED if alive is False else _OLD, remove)
    has_entry = os.path.lexists(layout.manifest_file(key))
    if has_entry or not os.path.lexists(lock) or _age_s(lock, now_s) >= LOCK_MIN_AGE_S:
        reason = "nobody holds it, and the entry is there" if has_entry else "nobody holds it, and it is old"
        # The guard last: whoever waits for it sees that it is gone, and then that the lock is.
        yield from (_removed(path, reason, remove) for path in (lock, layout.guard_file(key)) if os.path.lexists(path))


def _temporary(folder: Path, now_s: float, remove: bool) -> Iterator[Leftover]:
    """Other users' folders, and names that this package does not make, are left alone."""
    for path in _children(folder):
        if not path.name.startswith("pipevault-") or not _is_own(path):
            continue
        if name := _MARKED_NAME.fullmatch(path.name):
            if reason := _folder_reason(path, int(name[1]), name[2], now_s):
                yield _removed(path, reason, remove)
        elif _LOCKED_NAME.fullmatch(path.name):
            if path.suffix == ".lock" and path.with_suffix("").exists():
                continue  # goes with its folder
            lock = path if path.suffix == ".lock" else path.with_name(f"{path.name}.lock")
            with _free_lock(lock) as free:
                if free:  # the lock goes while it is held: later, it may be another process's
                    yield from (_removed(place, _DIED, remove) for place in sorted({path, lock}) if _is_own(place))


def _folder_reason(path: Path, pid: int, mark: str, now_s: float) -> str:
    """Why the folder of this process may go; empty if it must stay."""
    alive = is_process_alive(pid, mark) if mark else None
    if alive is None:
        return _OLD if _age_s(path, now_s) >= UNKNOWN_OWNER_MIN_AGE_S else ""
    return "" if alive else _DIED


def _age_s(path: Path, now_s: float) -> float:
    """Seconds since ``path`` or anything in it was changed; less than 0 where its clock runs ahead."""
    return now_s - max((status.st_mtime for status in _statuses(path)), default=now_s)


def _statuses(path: Path) -> Iterator[os.stat_result]:
    for place in (path, *(Path(folder) / name for folder, names, files in os.walk(path) for name in (*names, *files))):
        try:
            yield os.lstat(place)
        except OSError:  # gone by now
            continue


@contextmanager
def _free_lock(path: Path) -> Iterator[bool]:
    """Whether nobody holds the lock of ``path``, which is then held while the block runs; a missing file is free."""
    held: HeldLock | None = None
    free = not os.path.lexists(path)
    if not free:
        try:
            attempt = try_lock(path)
        except OSError:  # another user's
            attempt = None
        held = attempt if isinstance(attempt, HeldLock) else None
        free = held is not None and held.is_current()
    try:
        yield free
    finally:
        if held is not None:
            held.release()


def _removed(path: Path, reason: str, remove: bool) -> Leftover:
    found = Leftover(path, sum(status.st_size for status in _statuses(path) if stat.S_ISREG(status.st_mode)), reason)
    if remove:
        _remove(path)
    return found


def _remove(path: Path) -> None:
    """What cannot be removed stays; the caller looks."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
        return
    try:
        path.unlink(missing_ok=True)
    except OSError:
        return


def _is_own(path: Path) -> bool:
    """Whether it is a folder or regular file of this user, and no link."""
    try:
        status = os.lstat(path)
    except OSError:
        return False
    is_own = not hasattr(os, "getuid") or status.st_uid == os.getuid()
    return is_own and (stat.S_ISDIR(status.st_mode) or stat.S_ISREG(status.st_mode))


def _children(folder: Path) -> list[Path]:
    with vault_errors(folder, "listed"):
        try:
            return sorted(folder.iterdir())
        except (FileNotFoundError, NotADirectoryError):
            return []
