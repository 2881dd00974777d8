"""A lock on a file that the system frees when the last process that has it open ends. The mechanism alone.

Whoever gets the lock of a file must look whether that file still stands at its path
(:meth:`HeldLock.is_current`): it may have been removed or replaced while they waited.
"""

from __future__ import annotations

import errno
import os
import sys
import weakref
from enum import Enum
from pathlib import Path

_HELD = frozenset({errno.EACCES, errno.EAGAIN, errno.EWOULDBLOCK})
_NO_LOCKS = frozenset({errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP})
_LOCK_MODE = 0o644


class NotLocked(Enum):
    """Why a lock was not got."""

    HELD_ELSEWHERE = "held elsewhere"
    NO_LOCKS = "the file system has no locks"


class HeldLock:
    """The lock of the file that stood at ``path`` when it was taken; belongs to the process that took it."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path = path
        self._descriptor: int | None = descriptor
        _OPEN.add(self)

    def is_current(self) -> bool:
        """Whether the locked file still stands at ``path``. False once released."""
        if self._descriptor is None:
            return False
        try:
            return os.path.samestat(os.fstat(self._descriptor), os.stat(self.path, follow_symlinks=False))
        except FileNotFoundError:
            return False

    def release(self) -> None:
        """Give it up; nothing happens if it was given up before, or in a forked child."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            try:
                _unlock(descriptor)
            finally:
                os.close(descriptor)


def try_lock(path: Path) -> HeldLock | NotLocked:
    """The lock of the file at ``path``, which is made if need be; never waits.

    ``OSError`` if the file cannot be opened or locked for another reason.
    """
    descriptor = _open(path)
    try:
        _lock(descriptor)
    except OSError as error:
        os.close(descriptor)
        if error.errno in _NO_LOCKS:
            return NotLocked.NO_LOCKS
        if error.errno in _HELD:
            return NotLocked.HELD_ELSEWHERE
        raise
    except BaseException:  # whatever it was goes on, an interrupt too; only the descriptor must go
        os.close(descriptor)
        raise
    return HeldLock(path, descriptor)


def _open(path: Path) -> int:
    flags = os.O_RDWR | getattr(os, "O_NOFOLLOW", 0)
    try:
        return os.open(path, flags | os.O_CREAT, _LOCK_MODE)
    except PermissionError:  # another user of a group's vault made it; a lock needs no right to write
        return os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0))


if sys.platform == "win32":
    import msvcrt

    def _lock(descriptor: int) -> None:
        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)

    def _unlock(descriptor: int) -> None:
        msvcrt.locking(descriptor, msvcrt.LK_UNLCK, 1)

else:
    import fcntl

    def _lock(descriptor: int) -> None:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def _unlock(descriptor: int) -> None:
        fcntl.flock(descriptor, fcntl.LOCK_UN)


_OPEN: weakref.WeakSet[HeldLock] = weakref.WeakSet()


def _close_in_child() -> None:
    # A forked child shares the lock: it would keep it when the parent dies, or free it for the parent by unlocking.
    for lock in list(_OPEN):
        descriptor, lock._descriptor = lock._descriptor, None
        if descriptor is not None:
            os.close(descriptor)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_in_child)
