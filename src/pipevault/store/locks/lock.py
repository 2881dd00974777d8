"""The advisory lock of a key: it saves work, and correctness never depends on it.

``flock`` succeeds for everyone on some network file systems, so two processes may both hold a lock;
publishing is safe all the same. The holder leaves a note next to the lock::

    {"boot_id": "acdf2976-…", "host": "worker-3", "namespaces": "4026531836.4026531834", "pid": 4711,
     "since": "2025-01-31T12:00:00+00:00", "started": 1437466}

It tells waiters whom they wait for. The system frees the lock of a dead process; where it does not (a child
that was forked lives on, a file server that does not notice), a waiter replaces the lock file by one of its own:
when the note is that of a dead process of this host or, where locks prove nothing, when it was not changed for
15 minutes (:mod:`pipevault.files.heartbeat`). A note is written, and a lock file replaced, only under a
second lock that is held for a moment, ``<key>.guard``: else a waiter could take the note of the last holder
for that of a process that has the lock just now and is about to write its own.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import msgspec

from pipevault.digest import Digest, canonical_json
from pipevault.errors import LockTimeoutError, VaultError
from pipevault.files.atomic import make_folder, publish_file, vault_errors
from pipevault.files.claims import locks_hold
from pipevault.files.flock import HeldLock, NotLocked, locked, try_lock
from pipevault.files.heartbeat import is_silent, start_beating, stop_beating
from pipevault.files.liveness import ProcessIdentity
from pipevault.reading import read_file
from pipevault.store.layout import Layout
from pipevault.store.manifest import now_utc
from pipevault.store.publish import staging_folder, write_document

POLL_INTERVAL_S = 0.05
GUARD_TIMEOUT_S = 5.0
"""A guard is held while one small file is written; one that is held longer hangs, and is done without."""


@dataclass(frozen=True)
class Holder:
    process: ProcessIdentity
    since: str

    def describe(self, now_s: float) -> str:
        when = ", ".join(filter(None, (f"since {self.since}", _elapsed(self.since, now_s))))
        return f"process {self.process.pid} on {self.process.host} ({when})"


@contextmanager
def key_lock(
    layout: Layout, key: Digest, *, timeout_s: float, on_wait: Callable[[str], None] | None = None
) -> Iterator[None]:
    """Hold the lock of ``key``; wait up to ``timeout_s`` seconds (``math.inf``: for ever). :class:`LockTimeoutError`;
    :class:`VaultNotWritableError`: no lock file can be made.

    ``on_wait`` gets a sentence: whom this process waits for, again whenever the holder changes; that the lock of a dead
    process was taken over; that the block runs unlocked, where the file system has no locks.
    """
    if not timeout_s >= 0:
        raise ValueError(f"timeout_s is {timeout_s!r}: expected 0 or more seconds.")
    tell = on_wait or (lambda message: None)
    make_folder(layout.locks_dir)
    lock = _acquire(layout, key, timeout_s, tell)
    if lock is None:
        tell(f"The file system of {layout.root} has no locks; going on without.")
        yield
        return
    try:
        yield
    finally:
        _release(layout, key, lock)


def read_holder(path: Path) -> Holder | None:
    try:
        document = msgspec.json.decode(read_file(path), type=dict[str, Any])
        return Holder(ProcessIdentity.from_json(document), str(document["since"]))
    except (OSError, ValueError, KeyError, RecursionError):  # such a note says nothing, like none
        return None


def guard(layout: Layout, key: Digest, *, timeout_s: float = GUARD_TIMEOUT_S) -> AbstractContextManager[bool]:
    return locked(layout.guard_file(key), timeout_s=timeout_s)


def _acquire(layout: Layout, key: Digest, timeout_s: float, tell: Callable[[str], None]) -> HeldLock | None:
    """``None`` where the file system has no locks."""
    start = time.monotonic()
    told: object = ""
    while True:
        attempt = _try_acquire(layout, key)
        if attempt is not NotLocked.HELD_ELSEWHERE:
            return attempt if isinstance(attempt, HeldLock) else None
        holder = read_holder(layout.holder_file(key))
        alive = holder.process.is_alive() if holder else None
        is_left = holder is not None and (alive is False or not _shows_life(layout.holder_file(key)))
        if holder is not None and is_left and (taken := _take_over(layout, key, holder)):
            tell(f"Took over key {key.short} from {holder.describe(time.time())}, which ended without giving it up.")
            return taken
        waited_s = time.monotonic() - start
        if waited_s >= timeout_s:
            raise _timeout(key, holder, alive, waited_s)
        if holder != told:
            tell(f"Waiting for {_whom(holder)}, which freezes key {key.short}.")
            told = holder
        time.sleep(min(POLL_INTERVAL_S, timeout_s - waited_s))


def _try_acquire(layout: Layout, key: Digest) -> HeldLock | NotLocked:
    path = layout.lock_file(key)
    with vault_errors(path, "locked"):
        lock = try_lock(path)
        if isinstance(lock, NotLocked):
            return lock
        try:
            with guard(layout, key):
                if lock.is_current():
                    _leave_note(layout, key)
                    return lock
        except BaseException:  # an interrupt too: a lock that nobody knows of would be held until this process ends
            lock.release()
            raise
        lock.release()
        return NotLocked.HELD_ELSEWHERE  # removed or taken over just now; the next attempt sees the new file


def _take_over(layout: Layout, key: Digest, dead: Holder) -> HeldLock | None:
    """Replace the lock file that a dead process left locked; ``None`` if somebody else did something first."""
    path = layout.lock_file(key)
    with guard(layout, key) as guarded, vault_errors(path, "taken over"):
        if not guarded or read_holder(layout.holder_file(key)) != dead:
            return None
        with staging_folder(layout) as folder:
            fresh = try_lock(folder / path.name)
            if isinstance(fresh, NotLocked):
                return None
            try:
                publish_file(fresh.path, path)
                fresh.path = path
                _leave_note(layout, key)
            except BaseException:  # see _try_acquire
                fresh.release()
                raise
    return fresh


def _release(layout: Layout, key: Digest, lock: HeldLock) -> None:
    try:
        if lock.is_current():  # else another process has the key by now, and the note is its
            _remove_note(layout, key)
    finally:
        lock.release()


def _leave_note(layout: Layout, key: Digest) -> None:
    note = canonical_json({**ProcessIdentity.current().to_json(), "since": now_utc()})
    try:
        write_document(layout, layout.holder_file(key), note)
        if not locks_hold(layout.holder_file(key)):
            start_beating(layout.holder_file(key))
    except VaultError:  # a full disk: the lock is held all the same, and waiters say "another process"
        _remove_note(layout, key)  # the last holder's, by which waiters would take this process for dead


def _remove_note(layout: Layout, key: Digest) -> None:
    stop_beating(layout.holder_file(key))
    with suppress(OSError):  # a note that outlives its lock costs at worst that work is done twice
        layout.holder_file(key).unlink(missing_ok=True)


def _shows_life(note: Path) -> bool:
    """Tell whether the holder of a lock may live: where locks hold it does, for the lock is held."""
    try:
        return locks_hold(note) or not is_silent(note)
    except OSError:  # removed just now
        return True


def _timeout(key: Digest, holder: Holder | None, alive: bool | None, waited_s: float) -> LockTimeoutError:
    unknown = ""
    if holder is not None and alive is None:
        unknown = " It belongs to another host, boot or container, so whether it still runs cannot be told from here."
    return LockTimeoutError(
        f"Key {key.short} is still being frozen by {_whom(holder)} after {waited_s:.0f} s of waiting.{unknown} Wait "
        "longer (lock_timeout_s), stop that process if it hangs, or compile without waiting "
        "(on_lock_timeout='compile').",
        key.hex,
        waited_s,
    )


def _whom(holder: Holder | None) -> str:
    return holder.describe(time.time()) if holder else "another process"


def _elapsed(since: str, now_s: float) -> str:
    """``1 h 5 min``, ``2 min 5 s``, ``5 s``; empty if ``since`` is not a time, or lies ahead (another clock)."""
    try:
        start = datetime.fromisoformat(since)
    except ValueError:
        return ""
    seconds = int(now_s - (start if start.tzinfo else start.replace(tzinfo=timezone.utc)).timestamp())
    if seconds < 0:
        return ""
    minutes, hours = seconds // 60, seconds // 3600
    if hours:
        return f"{hours} h {minutes % 60} min"
    return f"{minutes} min {seconds % 60} s" if minutes else f"{seconds} s"
