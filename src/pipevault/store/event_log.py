"""Counting events: at most once, with no lock to wait for and no fsync.

``events/<process>.jsonl`` holds what one process counted, a line of canonical JSON for each event::

    {"event":"miss","key":"<key digest>","numbers":{"seconds":62.1},"reason":"absent","time":1738324801}

``key``, ``reason`` and ``numbers`` may be absent; ``time`` is in seconds since the epoch. A line is one write, so a
process that dies leaves at most a torn last line, which counts as none. The process, and the children that it forks,
hold a lock (flock) on the file; whoever gets that lock knows that they have ended, and may fold the file:
:mod:`pipevault.store.event_totals`. Where there is no vault yet, or it cannot be written, the same files go to the
user's state folder, see :func:`state_layout`.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeAlias

import msgspec

from pipevault.digest import Digest, canonical_json, digest_bytes
from pipevault.errors import VaultError
from pipevault.settings.user_folders import user_folder
from pipevault.store.atomic import FOLDER_MODE, share_like_folder
from pipevault.store.layout import Layout
from pipevault.store.liveness import ProcessIdentity

logger = logging.getLogger("pipevault")

OTHER_REASON = "other"
FOLD_EVERY = 64
"""A process that finds so many files, or a multiple, folds those of ended ones before it adds its own."""
LARGEST_FILE_BYTES = 1 << 20

_YEAR_10000 = 253_402_300_800
_LARGEST = 10**18
_LINE = re.compile(rb"[^\n]+")
_WORD = re.compile(r"[a-z][a-z0-9_-]{0,31}")
Word: TypeAlias = Annotated[str, msgspec.Meta(pattern=rf"^{_WORD.pattern}\Z")]
WordOrNone: TypeAlias = Annotated[str, msgspec.Meta(pattern=rf"^({_WORD.pattern})?\Z")]
Amount: TypeAlias = (
    Annotated[int, msgspec.Meta(ge=0, le=_LARGEST)] | Annotated[float, msgspec.Meta(ge=0, le=float(_LARGEST))]
)
"""What sums of a vault's life can hold; no NaN."""
Time: TypeAlias = (
    Annotated[int, msgspec.Meta(ge=0, lt=_YEAR_10000)] | Annotated[float, msgspec.Meta(ge=0, lt=float(_YEAR_10000))]
)
"""Seconds since the epoch, of a year that a calendar knows."""
_APPEND = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | getattr(os, "O_CLOEXEC", 0)


class Event(msgspec.Struct, frozen=True):
    """One line. ``key`` is that of the entry; empty if it happened to none. ``time``: seconds since the epoch."""

    event: Word
    time: Time
    key: Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{64}\Z")] = ""
    reason: WordOrNone = ""
    numbers: dict[Word, Amount] = msgspec.field(default_factory=dict)


_decoder = msgspec.json.Decoder(Event)


@dataclass(frozen=True)
class _Log:
    """An open file of this process; its device and inode tell whether the descriptor is still that file's."""

    descriptor: int
    identity: tuple[int, int]

    def status(self) -> os.stat_result | None:
        """``None`` where somebody closed the descriptor: another file may have its number by now."""
        try:
            status = os.fstat(self.descriptor)
        except OSError:
            return None
        return status if (status.st_dev, status.st_ino) == self.identity else None


_logs: dict[Path, _Log] = {}


def count(layout: Layout, event: str, *, key: Digest | None = None, reason: str = "", **numbers: float) -> None:
    """Count that ``event`` happened, to the entry ``key`` or to none. Never raises.

    ``event`` and ``reason`` are lower-case words (letters, digits, ``-``, ``_``; at most 32 characters); any other
    reason counts as ``other``. ``numbers`` are summed by name; one that is negative or no number is left out.
    """
    try:
        line = _line(event, key, reason, numbers)
        try:
            if not layout.vault_file.is_file():
                raise FileNotFoundError(layout.vault_file)
            _append(layout, line)
        except OSError:  # not there yet, read-only, full or gone: worth a second place, not an error
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


def parse_events(data: bytes) -> tuple[list[Event], int]:
    """The events, and how many complete lines are none; a torn last line is passed over."""
    parsed = [_parsed(line) for line in _LINE.findall(data, 0, data.rfind(b"\n") + 1)]
    events = [event for event in parsed if event is not None]
    return events, len(parsed) - len(events)


def try_own(descriptor: int) -> bool | None:
    """Lock an open events file for good. ``False``: a process that counts in it lives; ``None``: not known."""
    if sys.platform == "win32":
        return None
    import fcntl

    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return False if error.errno in (errno.EACCES, errno.EAGAIN) else None
    return True


def _line(event: str, key: Digest | None, reason: str, numbers: Mapping[str, float]) -> bytes:
    if not _WORD.fullmatch(event):
        raise ValueError(f"{event!r} is no name of an event")
    document: dict[str, Any] = {"event": event, "time": int(time.time())}
    if key is not None:
        document["key"] = key.hex
    if reason:
        document["reason"] = reason if _WORD.fullmatch(reason) else OTHER_REASON
    if numbers:
        document["numbers"] = {name: number for name, number in numbers.items() if 0 <= number <= _LARGEST}
    return canonical_json(document) + b"\n"


def _append(layout: Layout, line: bytes) -> None:
    log = _logs.get(layout.root)
    status = log.status() if log else None
    if log is None or status is None or not status.st_nlink or status.st_size >= LARGEST_FILE_BYTES:
        _forget(layout.root)
        log = _logs[layout.root] = _open(layout)
    if os.write(log.descriptor, line) != len(line):
        _forget(layout.root)  # the next line must not be appended to half of this one


def _open(layout: Layout) -> _Log:
    if not layout.events_dir.is_dir():
        os.makedirs(layout.events_dir, FOLDER_MODE, exist_ok=True)
        share_like_folder(layout.events_dir, layout.root)
    number = len(os.listdir(layout.events_dir))
    if number and number % FOLD_EVERY == 0:
        from pipevault.store.event_totals import fold

        with suppress(VaultError):  # told of by whoever asks for the statistics
            fold(layout)
    owner = ProcessIdentity.current()
    while True:
        path = layout.events_file(host=owner.host, pid=owner.pid, random_hex=os.urandom(8).hex(), mark=owner.mark)
        descriptor = os.open(path, _APPEND, 0o644)
        if hasattr(os, "fchmod"):
            os.fchmod(descriptor, 0o644)  # whatever the umask: others fold it
        is_ours, status = try_own(descriptor), os.fstat(descriptor)
        if is_ours is not False and status.st_nlink:
            return _Log(descriptor, (status.st_dev, status.st_ino))
        os.close(descriptor)  # another process took it for that of an ended one before it was locked


def _forget(root: Path) -> None:
    log = _logs.pop(root, None)
    if log is not None and log.status() is not None:
        os.close(log.descriptor)


def _parsed(line: bytes) -> Event | None:
    try:
        return _decoder.decode(line)
    except (ValueError, RecursionError):
        return None
