"""The advisory lock of a key: it saves work, and correctness never depends on it.

``flock`` succeeds for everyone on some network file systems, so two processes may both hold a lock;
publishing is safe all the same. The holder leaves a note beside the lock, ``{"host": …, "pid": …, "since":
…}``, so that a waiter can say whom it waits for; the note may be out of date and decides nothing.
"""

from __future__ import annotations

import errno
import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING

from pipevault.digest import Digest, canonical_json
from pipevault.errors import LockTimeoutError, VaultError
from pipevault.store.atomic import make_folder, vault_errors, write_file
from pipevault.store.layout import Layout
from pipevault.store.manifest import now_utc
from pipevault.store.staging import staging_folder

if TYPE_CHECKING:
    from filelock import FileLock

POLL_INTERVAL_S = 0.05
_NO_LOCKS = frozenset({errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP})


class _Attempt(Enum):
    ACQUIRED = "acquired"
    HELD_ELSEWHERE = "held elsewhere"
    NO_LOCKS = "no locks"


@dataclass(frozen=True)
class Holder:
    """Who wrote the note beside a lock; ``since`` is ISO 8601, UTC."""

    host: str
    pid: int
    since: str

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host} (since {self.since})"


@contextmanager
def key_lock(
    layout: Layout, key: Digest, *, timeout_s: float, on_wait: Callable[[str], None] | None = None
) -> Iterator[None]:
    """Hold the lock of ``key``; wait up to ``timeout_s`` seconds (``math.inf``: for ever).

    ``on_wait`` is told in one sentence whom this process waits for, again whenever the holder changes, and
    that the block runs unlocked where the file system has no locks. Raises :class:`LockTimeoutError`, and
    :class:`VaultNotWritableError` where no lock file can be made.
    """
    if not timeout_s >= 0:
        raise ValueError(f"timeout_s is {timeout_s!r}: a number of seconds, 0 or more, is needed.")
    from filelock import FileLock  # a hit takes no lock and need not pay for the import

    tell = on_wait or _tell_nobody
    make_folder(layout.locks_dir)
    lock = FileLock(layout.lock_file(key))
    if not _acquire(lock, layout, key, timeout_s, tell):
        tell(f"The file system of {layout.root} has no locks; going on without.")
        yield
        return
    try:
        _leave_note(layout, key)
        yield
    finally:
        _remove_note(layout, key)
        lock.release()


def read_holder(path: Path) -> Holder | None:
    """The note at ``path``, or ``None`` if there is none that can be read."""
    try:
        document = json.loads(path.read_bytes())
        return Holder(str(document["host"]), int(document["pid"]), str(document["since"]))
    except (OSError, ValueError, KeyError, TypeError):  # the note only serves a message
        return None


def _acquire(lock: FileLock, layout: Layout, key: Digest, timeout_s: float, tell: Callable[[str], None]) -> bool:
    """``False`` where the file system has no locks."""
    start = time.monotonic()
    told: str | None = None
    while True:
        state = _try_acquire(lock)
        if state is not _Attempt.HELD_ELSEWHERE:
            return state is _Attempt.ACQUIRED
        waited_s = time.monotonic() - start
        whom = str(read_holder(layout.holder_file(key)) or "another process")
        if waited_s >= timeout_s:
            raise LockTimeoutError(
                f"Key {key.short} is still being frozen by {whom} after {waited_s:.0f} s. Wait longer, or "
                f"stop "
                "that process if it hangs.",
                key.hex,
                waited_s,
            )
        if whom != told:
            tell(f"Waiting for {whom}, which freezes key {key.short}.")
            told = whom
        time.sleep(min(POLL_INTERVAL_S, timeout_s - waited_s))


def _try_acquire(lock: FileLock) -> _Attempt:
    from filelock import Timeout

    with vault_errors(Path(lock.lock_file), "locked"):
        try:
            lock.acquire(timeout=0)
        except Timeout:  # an OSError too
            return _Attempt.HELD_ELSEWHERE
        except NotImplementedError:  # filelock's word for ENOSYS
            return _Attempt.NO_LOCKS
        except OSError as error:
            if error.errno in _NO_LOCKS:
                return _Attempt.NO_LOCKS
            raise
    return _Attempt.ACQUIRED


def _leave_note(layout: Layout, key: Digest) -> None:
    note = canonical_json({"host": socket.gethostname(), "pid": os.getpid(), "since": now_utc()})
    try:
        with staging_folder(layout) as folder:
            write_file(layout.holder_file(key), note, staging=folder)
    except VaultError:  # the lock is held all the same; waiters say "another process"
        _remove_note(layout, key)


def _remove_note(layout: Layout, key: Digest) -> None:
    try:
        layout.holder_file(key).unlink(missing_ok=True)
    except OSError:  # a note that outlives its lock is out of date, which readers allow for
        return


def _tell_nobody(message: str) -> None:
    del message
