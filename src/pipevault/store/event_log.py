"""Counting events: each process appends lines to a file of its own, so nothing is locked and no one waits.

One file of ``events/`` holds what one process counted, a line of canonical JSON for each event::

    {"event":"compiled","key":"<key digest>","numbers":{"seconds":62.1},"time":1738324800}
    {"event":"miss","key":"<key digest>","reason":"absent","time":1738324801}

``key``, ``reason`` and ``numbers`` may be absent; ``time`` is in seconds since the epoch. A line is one write, so a
process that dies leaves at most a torn last line, which readers leave out. Lines are not fsynced: a power cut may lose
the last of them.

The first line of a process costs the making of a file, up to half a millisecond, each later one ten microseconds. So
what a hit counts (:data:`DEFERRED`) is kept in memory, which costs a few microseconds, and written with the next other
event, with the next one a second later, by :func:`write_out`, or at exit: a process that is killed may lose its last
hits. Where the vault cannot be written, the same files go to the user's state folder, see :func:`state_layout`.
"""

from __future__ import annotations

import atexit
import json
import logging
import os
import re
import stat
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipevault.digest import Digest, canonical_json, digest_bytes
from pipevault.settings.user_folders import user_folder
from pipevault.store.atomic import FOLDER_MODE
from pipevault.store.layout import Layout
from pipevault.store.liveness import ProcessIdentity

logger = logging.getLogger("pipevault")

OTHER_REASON = "other"
DEFERRED = frozenset({"hit", "saved"})
"""Events of a hit, which are not written at once."""

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
class EventFile:
    """What was read of a file: complete lines up to ``end_bytes``; ``unreadable`` counts those that are no event."""

    events: tuple[Event, ...]
    end_bytes: int
    unreadable: int


@dataclass(frozen=True)
class _Log:
    """An open file of this process; its device and inode tell whether the descriptor is still that file's."""

    descriptor: int
    pid: int
    identity: tuple[int, int]


@dataclass(frozen=True)
class _Pending:
    layout: Layout
    event: str
    key: Digest | None
    reason: str
    numbers: Mapping[str, float]
    time_s: float


_logs: dict[Path, _Log] = {}
_pending: deque[_Pending] = deque()
_is_forked = False


def count(layout: Layout, event: str, *, key: Digest | None = None, reason: str = "", **numbers: float) -> None:
    """Count that ``event`` happened, to the entry ``key`` or to none. Never raises, takes no lock.

    ``event`` and ``reason`` are lower-case words (letters, digits, ``-``, ``_``; at most 32 characters); any other
    reason counts as ``other``. ``numbers`` are summed by name; one that is negative or no number is left out.
    """
    if _is_forked:
        _write_out_at_end_of_child()
    now_s = time.time()
    _pending.append(_Pending(layout, event, key, reason, numbers, now_s))
    with suppress(IndexError):  # another thread is writing them
        if event in DEFERRED and len(_pending) < _MOST_PENDING and now_s - _pending[0].time_s < _LONGEST_DELAY_S:
            return
    write_out()


def write_out() -> None:
    """Write what this process counted and holds in memory. Never raises.

    Worth a call where nobody waits, such as after a generation, in processes that may end without a clean exit.
    """
    while True:
        try:
            pending = _pending.popleft()
        except IndexError:
            return
        try:
            line = _line(pending)
            try:
                _append(pending.layout, line)
            except OSError:  # read-only, full or gone: what was counted is worth a second place, not an error
                _forget(pending.layout.root)
                _append_elsewhere(pending.layout, line)
        except Exception as error:  # a generation must go on, whatever is wrong with its statistics
            logger.debug("an event was not counted: %s", error)


def state_layout(layout: Layout) -> Layout:
    """Where the events of a vault go that cannot be written: ``pipevault/vaults/<16 digits>`` in the user's state
    folder. The digits are the first of the SHA-256 of the vault's path.

    :class:`~pipevault.errors.NoHomeError`: there is no such folder.
    """
    name = digest_bytes(os.fsencode(layout.root)).hex[:16]
    return Layout(user_folder("state") / "vaults" / name)


def read_events(path: Path, *, start_bytes: int = 0) -> EventFile:
    """The complete lines of an events file from ``start_bytes`` on; a torn last line is left for later.

    ``OSError``: it cannot be read (``FileNotFoundError``: it was folded meanwhile), or is no regular file.
    """
    descriptor = os.open(path, _READ)
    with os.fdopen(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(f"{path} is no regular file")
        file.seek(start_bytes)
        data = file.read()
    complete = data[: data.rfind(b"\n") + 1]
    parsed = [_parsed(line) for line in complete.splitlines()]
    events = tuple(event for event in parsed if event is not None)
    return EventFile(events, start_bytes + len(complete), len(parsed) - len(events))


def _line(pending: _Pending) -> bytes:
    if not _WORD.fullmatch(pending.event):
        raise ValueError(f"{pending.event!r} is no name of an event")
    document: dict[str, Any] = {"event": pending.event, "time": int(pending.time_s)}
    if pending.key is not None:
        document["key"] = pending.key.hex
    if pending.reason:
        document["reason"] = pending.reason if _WORD.fullmatch(pending.reason) else OTHER_REASON
    if pending.numbers:
        document["numbers"] = {name: number for name, number in pending.numbers.items() if is_amount(number)}
    return canonical_json(document) + b"\n"


def _append(layout: Layout, line: bytes) -> None:
    log = _logs.get(layout.root)
    if log is None or not _is_ours(log):
        _forget(layout.root)
        log = _logs[layout.root] = _open(layout, may_be_new=layout.vault_file.is_file)
    _write(layout.root, log, line)


def _append_elsewhere(layout: Layout, line: bytes) -> None:
    """Later events of this process go there too: a vault that could not be written is not tried again."""
    state = state_layout(layout)
    os.makedirs(state.root, FOLDER_MODE, exist_ok=True)
    log = _logs[layout.root] = _open(state, may_be_new=lambda: True)
    _write(layout.root, log, line)


def _write(root: Path, log: _Log, line: bytes) -> None:
    if os.write(log.descriptor, line) != len(line):
        _forget(root)  # the next line must not be appended to half of this one


def _open(layout: Layout, *, may_be_new: Callable[[], bool]) -> _Log:
    """A new file; ``may_be_new`` is asked before its folder is made, for nothing may appear in a folder of others."""
    owner = ProcessIdentity.current()
    path = layout.events_file(host=owner.host, pid=owner.pid, random_hex=os.urandom(8).hex(), mark=owner.mark)
    try:
        descriptor = os.open(path, _APPEND, 0o644)
    except FileNotFoundError:
        if not may_be_new():
            raise
        with suppress(FileExistsError):
            os.mkdir(layout.events_dir, FOLDER_MODE)
        descriptor = os.open(path, _APPEND, 0o644)
    status = os.fstat(descriptor)
    return _Log(descriptor, owner.pid, (status.st_dev, status.st_ino))


def _is_ours(log: _Log) -> bool:
    """Not after a fork, nor where the file was removed."""
    status = _status(log)
    return log.pid == os.getpid() and status is not None and status.st_nlink > 0


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
