"""Counting events: at most once, with no lock and no fsync where anybody waits.

``events/<process>.jsonl`` holds what one process counted, a line of canonical JSON for each event::

    {"event":"miss","key":"<key digest>","numbers":{"seconds":62.1},"reason":"absent","time":1738324801}

``key``, ``reason`` and ``numbers`` may be absent; ``time`` is in seconds since the epoch. A line is one write, so a
process that dies leaves at most a torn last line, which counts as none. The process holds a lock (flock) on its file;
whoever gets that lock knows that the process has ended, and may fold the file: :mod:`pipevault.store.event_totals`.

What a hit counts (:data:`DEFERRED`), and what is counted before there is a vault, is kept in memory and written with
the next other event, with the next one a second later, by :func:`write_out`, or at exit. Where the vault cannot be
written, the same files go to the user's state folder, see :func:`state_layout`.
"""

from __future__ import annotations

import atexit
import errno
import json
import logging
import os
import re
import stat
import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from pipevault.digest import Digest, canonical_json, digest_bytes
from pipevault.errors import VaultError
from pipevault.settings.user_folders import user_folder
from pipevault.store.atomic import FOLDER_MODE
from pipevault.store.layout import Layout
from pipevault.store.liveness import ProcessIdentity

logger = logging.getLogger("pipevault")

OTHER_REASON = "other"
DEFERRED = frozenset({"hit", "saved"})
"""Events of a hit, which are not written at once."""

FOLD_EVERY = 64
"""A process that finds so many files, or a multiple, folds those of ended ones before it adds its own."""
LARGEST_FILE_BYTES = 64 << 20

_LONGEST_DELAY_S = 1.0
_MOST_PENDING = 64
_YEAR_10000 = 253_402_300_800
_LARGEST = 1e18
_WORD = re.compile(r"[a-z][a-z0-9_-]{0,31}")
_APPEND = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND
_READ = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)


@dataclass(frozen=True)
class Event:
    """One line. ``time_s``: seconds since the epoch."""

    event: str
    key: Digest | None
    reason: str
    numbers: Mapping[str, float] = field(default_factory=dict)
    time_s: float = 0.0


@dataclass(frozen=True)
class _Log:
    """An open file of this process; its device and inode tell whether the descriptor is still that file's."""

    descriptor: int
    pid: int
    identity: tuple[int, int]


_logs: dict[Path, _Log] = {}
_pending: deque[tuple[Layout, Event]] = deque()
_is_forked = False


def count(layout: Layout, event: str, *, key: Digest | None = None, reason: str = "", **numbers: float) -> None:
    """Count that ``event`` happened, to the entry ``key`` or to none. Never raises, takes no lock.

    ``event`` and ``reason`` are lower-case words (letters, digits, ``-``, ``_``; at most 32 characters); any other
    reason counts as ``other``. ``numbers`` are summed by name; one that is negative or no number is left out.
    """
    if _is_forked:
        _write_out_at_end_of_child()
    now_s = time.time()
    _pending.append((layout, Event(event, key, reason, numbers, now_s)))
    with suppress(IndexError, OSError):  # another thread is writing them; no look at the vault
        is_deferred = event in DEFERRED or not layout.vault_file.exists()
        if is_deferred and len(_pending) < _MOST_PENDING and now_s - _pending[0][1].time_s < _LONGEST_DELAY_S:
            return
    write_out()


def write_out() -> None:
    """Write what this process counted and holds in memory. Never raises.

    Worth a call where nobody waits, such as after a generation, in processes that may end without a clean exit.
    """
    while True:
        try:
            layout, event = _pending.popleft()
        except IndexError:
            return
        try:
            line = _line(event)
            try:
                if not layout.vault_file.is_file():
                    raise FileNotFoundError(layout.vault_file)
                _append(layout, line)
            except OSError:  # read-only, full or gone: what was counted is worth a second place, not an error
                _append(state_layout(layout), line)
        except Exception as error:  # a generation must go on, whatever is wrong with its statistics
            logger.debug("an event was not counted: %s", error)


def state_layout(layout: Layout) -> Layout:
    """Where the events of a vault go that cannot be written: ``pipevault/vaults/<16 digits>`` in the user's state
    folder. The digits are the first of the SHA-256 of the vault's path.

    :class:`~pipevault.errors.NoHomeError`: there is no such folder.
    """
    name = digest_bytes(os.fsencode(layout.root)).hex[:16]
    return Layout(user_folder("state") / "vaults" / name)


def open_events(path: Path) -> BinaryIO:
    """An events file; ``OSError`` if there is none, if something else stands in its place, or if it is too large."""
    file = os.fdopen(os.open(path, _READ), "rb")
    status = os.fstat(file.fileno())
    if stat.S_ISREG(status.st_mode) and status.st_size <= LARGEST_FILE_BYTES:
        return file
    file.close()
    raise OSError(errno.EINVAL, f"it is no regular file of at most {LARGEST_FILE_BYTES >> 20} MiB")


def read_events(file: BinaryIO) -> tuple[list[Event], int]:
    """The events, and how many complete lines are none; a torn last line is passed over. ``OSError``."""
    data = file.read(LARGEST_FILE_BYTES)
    parsed = [_parsed(line) for line in data[: data.rfind(b"\n") + 1].splitlines()]
    events = [event for event in parsed if event is not None]
    return events, len(parsed) - len(events)


def try_own(descriptor: int) -> bool | None:
    """Lock an open events file for good. ``False``: the process that counts in it lives; ``None``: not known."""
    if sys.platform == "win32":
        return None
    import fcntl

    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return False if error.errno in (errno.EACCES, errno.EAGAIN) else None
    return True


def _line(event: Event) -> bytes:
    if not _WORD.fullmatch(event.event):
        raise ValueError(f"{event.event!r} is no name of an event")
    document: dict[str, Any] = {"event": event.event, "time": int(event.time_s)}
    if event.key is not None:
        document["key"] = event.key.hex
    if event.reason:
        document["reason"] = event.reason if _WORD.fullmatch(event.reason) else OTHER_REASON
    if event.numbers:
        document["numbers"] = {name: number for name, number in event.numbers.items() if is_amount(number)}
    return canonical_json(document) + b"\n"


def _append(layout: Layout, line: bytes) -> None:
    log = _logs.get(layout.root)
    if log is None or not _is_ours(log):
        _forget(layout.root)
        log = _logs[layout.root] = _open(layout)
    if os.write(log.descriptor, line) != len(line):
        _forget(layout.root)  # the next line must not be appended to half of this one


def _open(layout: Layout) -> _Log:
    os.makedirs(layout.events_dir, FOLDER_MODE, exist_ok=True)
    number = len(os.listdir(layout.events_dir))
    if number and number % FOLD_EVERY == 0:
        from pipevault.store.event_totals import fold

        with suppress(VaultError):  # told of by whoever asks for the statistics
            fold(layout)
    owner = ProcessIdentity.current()
    while True:
        path = layout.events_file(host=owner.host, pid=owner.pid, random_hex=os.urandom(8).hex(), mark=owner.mark)
        descriptor = os.open(path, _APPEND, 0o644)
        is_ours, status = try_own(descriptor), os.fstat(descriptor)
        if is_ours is not False and status.st_nlink:
            return _Log(descriptor, owner.pid, (status.st_dev, status.st_ino))
        os.close(descriptor)  # another process took it for that of an ended one before it was locked


def _is_ours(log: _Log) -> bool:
    """Not after a fork, nor where the file was removed or is large enough."""
    status = _status(log)
    if log.pid != os.getpid() or status is None:
        return False
    return status.st_nlink > 0 and status.st_size < LARGEST_FILE_BYTES // 2


def _status(log: _Log) -> os.stat_result | None:
    """``None`` where somebody closed the descriptor: another file may have its number by now."""
    try:
        status = os.fstat(log.descriptor)
    except OSError:
        return None
    return status if (status.st_dev, status.st_ino) == log.identity else None


def _forget(root: Path) -> None:
    log = _logs.pop(root, None)
    if log is not None and _status(log) is not None:
        os.close(log.descriptor)


def _start_anew() -> None:
    """In a forked child: the parent writes what is pending, and each process has files of its own."""
    global _is_forked
    _is_forked = True
    _pending.clear()
    for root in tuple(_logs):
        _forget(root)


def _write_out_at_end_of_child() -> None:
    """A child that ``multiprocessing`` forked ends without ``atexit``."""
    global _is_forked
    _is_forked = False
    from multiprocessing import parent_process, util

    if parent_process() is not None:
        util.Finalize(None, write_out, exitpriority=0)


atexit.register(write_out)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_start_anew)


def _parsed(line: bytes) -> Event | None:
    try:
        document = json.loads(line)
        key, reason, numbers = document.get("key"), document.get("reason", ""), document.get("numbers", {})
        if (
            not isinstance(reason, str)
            or not _WORD.fullmatch(document["event"])
            or not _WORD.fullmatch(reason or "none")
        ):
            return None
        if not is_time(document["time"]):
            return None
        if not all(isinstance(name, str) and is_amount(number) for name, number in numbers.items()):
            return None
        return Event(document["event"], None if key is None else Digest(key), reason, numbers, document["time"])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def is_amount(value: Any) -> bool:
    """A number that sums of a vault's life can hold; no NaN."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= _LARGEST


def is_time(value: Any) -> bool:
    """Seconds since the epoch of a year that a calendar knows."""
    return is_amount(value) and value < _YEAR_10000


def iter_events_files(layout: Layout) -> Iterator[Path]:
    """The events files, sorted; none where there is no folder. ``OSError`` if it cannot be listed."""
    try:
        names = sorted(os.listdir(layout.events_dir))
    except FileNotFoundError:
        return
    for name in names:
        path = layout.events_dir / name
        if layout.is_events(path):
            yield path
