"""Files and folders that belong to one process while it lives, and how others see that it does.

The process holds a lock on what it claims, which the system frees when it ends, however it ends. So, in this order:

1. The lock is held: the process lives.
2. The lock is free, on a file system of this machine's own (:mod:`pipevault.files.file_systems`): it is dead, whatever
   host, container or boot it was of.
3. Elsewhere locks may be granted to everyone, or to none: it lives while it leaves signs of life
   (:mod:`pipevault.files.heartbeat`).
"""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pipevault.files.atomic import FILE_MODE
from pipevault.files.file_systems import is_local
from pipevault.files.flock import HeldLock, NotLocked, lock_open
from pipevault.files.heartbeat import is_silent, start_beating, stop_beating
from pipevault.reading import open_place


class Claim:
    """A file or folder of this process's. It ends with :meth:`release`, which removes it, or with the process."""

    def __init__(self, path: Path, lock: HeldLock | None) -> None:
        """Take over ``lock``, which is ``None`` where there are no locks."""
        self.path = path
        self._lock = lock
        self._pid: int | None = os.getpid()

    @property
    def held(self) -> bool:
        return self._pid == os.getpid()

    def release(self) -> None:
        """Remove it and give it up; a second time, or in a forked child, nothing happens. Never raises."""
        if not self.held:
            return
        self._pid = None
        stop_beating(self.path)
        remove(self.path)
        if self._lock is not None:
            with suppress(OSError):
                self._lock.release()


def claim_file(path: Path) -> Claim | None:
    """Make an empty file that is this process's, and its forked children's, until all of them ended. ``None``: another
    process took it for abandoned before it was locked; try another name. ``OSError``: it cannot be made, or is there.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, FILE_MODE)
    os.fchmod(descriptor, FILE_MODE)  # whatever the umask: others look at it
    claim = _claimed(path, descriptor, inherited=True)
    if claim is not None:
        os.utime(path)  # whoever looked before it was locked notices, and looks again
    return claim


def claim_folder(path: Path) -> Claim | None:
    """Make an empty folder that is private to this process. Answers and raises like :func:`claim_file`."""
    os.mkdir(path, 0o700)
    try:
        descriptor = open_place(path)
    except FileNotFoundError:
        return None
    return _claimed(path, descriptor, inherited=False)


@contextmanager
def abandoned(path: Path) -> Iterator[bool]:
    """Tell whether no living process holds ``path``; where locks work, none can take it while the block runs. ``False``
    where that is not known: it is gone, neither file nor folder, a link, or may not be opened by this user.
    """
    lock: HeldLock | NotLocked = NotLocked.HELD_ELSEWHERE
    is_free = False
    with suppress(OSError):
        descriptor = open_place(path)
        kind, local = stat.S_IFMT(os.fstat(descriptor).st_mode), is_local(descriptor)
        lock = lock_open(descriptor, path, shared=True)
        if lock is not NotLocked.HELD_ELSEWHERE and kind in (stat.S_IFREG, stat.S_IFDIR):
            is_free = lock.is_current() if local and isinstance(lock, HeldLock) else is_silent(path)
    try:
        yield is_free
    finally:
        if isinstance(lock, HeldLock):
            lock.release()


def remove_abandoned(path: Path) -> bool:
    with abandoned(path) as is_free:
        if is_free:
            remove(path)
        return is_free


def locks_hold(path: Path) -> bool:
    """Tell whether a lock of ``path`` that is free proves that it has no holder. ``False`` if that is not known."""
    try:
        descriptor = open_place(path)
    except OSError:
        return False
    try:
        return is_local(descriptor)
    finally:
        os.close(descriptor)


def remove(path: Path) -> None:
    """Remove a file, or a folder with all that is in it. What cannot be removed stays; the caller looks."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
        return
    with suppress(OSError):
        path.unlink(missing_ok=True)


def _claimed(path: Path, descriptor: int, *, inherited: bool) -> Claim | None:
    local = is_local(descriptor)
    lock = lock_open(descriptor, path, inherited=inherited)
    if lock is NotLocked.HELD_ELSEWHERE:
        return None
    if isinstance(lock, HeldLock) and not lock.is_current():
        lock.release()
        return None
    if not local or lock is NotLocked.NO_LOCKS:
        start_beating(path)
    return Claim(path, lock if isinstance(lock, HeldLock) else None)
