"""A lock on a file that the system frees when the last process that has it open ends. The mechanism alone.

Whoever gets the lock of a file must look whether that file still stands at its path
(:meth:`HeldLock.is_current`): it may have been removed or replaced while they waited.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from enum import Enum
from pathlib import Path

from pipevault.reading import SAFE_FLAGS

_HELD = frozenset({errno.EACCES, errno.EAGAIN, errno.EWOULDBLOCK})
# EBADF, EINVAL, EISDIR: network file systems that lock no folder, or none that is open for reading.
_NO_LOCKS = frozenset(
    {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EBADF, errno.EINVAL, errno.EISDIR}
)
_LOCK_MODE = 0o644
_POLL_INTERVAL_S = 0.002


class NotLocked(Enum):
    """Reasons why a lock was not got."""

    HELD_ELSEWHERE = "held elsewhere"
    NO_LOCKS = "the file system has no locks"


class HeldLock:
    """The lock of the file or folder that stood at ``path`` when it was taken. A child that is forked meanwhile does
    not share it, unless it is ``inherited``: then it is held until both ended.
    """

    def __init__(self, path: Path, descriptor: int, *, inherited: bool = False) -> None:
        self.path = path
        self._descriptor: int | None = descriptor
        self._status = os.fstat(descriptor)
        if not inherited:
            _OPEN.add(self)

    def is_current(self) -> bool:
        """Return whether the locked file still stands at ``path``. False once released."""
        if self._descriptor is None:
            return False
        try:
            return os.path.samestat(os.fstat(self._descriptor), os.stat(self.path, follow_symlinks=False))
        except FileNotFoundError:
            return False

    def release(self) -> None:
        """Give it up; nothing happens if it was given up before, or in a forked child."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is None or look(descriptor, self._status) is None:
            return
        try:
            fcntl.flock(descriptor, fcntl.LOCK_UN)
        finally:
            os.close(descriptor)


def look(descriptor: int, opened: os.stat_result) -> os.stat_result | None:
    """Return the status of an open file, which had the status ``opened`` once; ``None`` where a program closed what is
    not its own: another file may have the number by now.
    """
    try:
        status = os.fstat(descriptor)
    except OSError:
        return None
    return status if os.path.samestat(status, opened) else None


def lock_descriptor(descriptor: int, *, shared: bool = False) -> NotLocked | None:
    """Lock what is open as ``descriptor`` until that is closed; say why not, else ``None``. Never waits. ``shared``:
    others may have a shared lock too. ``OSError`` if it cannot be locked for another reason.
    """
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _NO_LOCKS:
            return NotLocked.NO_LOCKS
        if error.errno in _HELD:
            return NotLocked.HELD_ELSEWHERE
        raise
    return None


def lock_open(descriptor: int, path: Path, *, shared: bool = False, inherited: bool = False) -> HeldLock | NotLocked:
    """Take the lock of what is open as ``descriptor``, which is closed with the lock, or now if there is none. Raises
    like :func:`lock_descriptor`.
    """
    try:
        why_not = lock_descriptor(descriptor, shared=shared)
    except BaseException:  # whatever it was goes on, an interrupt too; only the descriptor must go
        os.close(descriptor)
        raise
    if why_not is not None:
        os.close(descriptor)
        return why_not
    return HeldLock(path, descriptor, inherited=inherited)


def try_lock(path: Path) -> HeldLock | NotLocked:
    """Take the lock of the file at ``path``, which is made if need be; never waits. Raises like
    :func:`lock_descriptor`.
    """
    flags = SAFE_FLAGS | os.O_NOFOLLOW
    try:
        descriptor = os.open(path, os.O_RDWR | flags | os.O_CREAT, _LOCK_MODE)
    except PermissionError:  # another user of a group's vault made it; a lock needs no right to write
        descriptor = os.open(path, os.O_RDONLY | flags)
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        os.close(descriptor)
        raise OSError(errno.ENOTSUP, "it is not a regular file", str(path))
    if status.st_uid == os.geteuid() and stat.S_IMODE(status.st_mode) & _LOCK_MODE != _LOCK_MODE:
        with suppress(OSError):  # a file system without modes; it is locked all the same
            os.fchmod(descriptor, _LOCK_MODE)  # whatever the umask: others of a group's vault lock it too
    return lock_open(descriptor, path)


@contextmanager
def locked(path: Path, *, timeout_s: float) -> Iterator[bool]:
    """Hold the lock of the file that stands at ``path`` while the block runs; ``False`` if it could not be had. For
    locks that are held for a moment and only save work: nothing raises.
    """
    held = _wait(path, timeout_s)
    try:
        yield held is not None
    finally:
        if held is not None:
            held.release()


def _wait(path: Path, timeout_s: float) -> HeldLock | None:
    end_s = time.monotonic() + timeout_s
    while True:
        try:
            held = try_lock(path)
        except OSError:  # a full disk, or another user's folder
            return None
        if isinstance(held, HeldLock):
            if held.is_current():
                return held
            held.release()
        elif held is NotLocked.NO_LOCKS:
            return None
        if time.monotonic() >= end_s:
            return None
        time.sleep(_POLL_INTERVAL_S)


_OPEN: weakref.WeakSet[HeldLock] = weakref.WeakSet()


def _close_in_child() -> None:
    # A forked child shares the lock: it would keep it when the parent dies, or free it for the parent by unlocking.
    for lock in list(_OPEN):
        descriptor, lock._descriptor = lock._descriptor, None
        if descriptor is not None:
            os.close(descriptor)


os.register_at_fork(after_in_child=_close_in_child)
