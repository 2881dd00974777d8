"""Counting events: at most once, with no lock to wait for and no fsync.

A line of the process's file (:mod:`~pipevault.store.stats.event_totals`) is one write, so a process that dies leaves at
most a torn last line, which counts as none. Where no vault stands yet, or it cannot be written, the same files go to
the user's state folder, see :func:`~pipevault.store.stats.event_totals.state_layout`.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipevault.digest import Digest, canonical_json
from pipevault.errors import VaultError
from pipevault.files.atomic import FOLDER_MODE, share_like_folder
from pipevault.files.flock import NotLocked
from pipevault.files.liveness import ProcessIdentity
from pipevault.store.layout import Layout
from pipevault.store.stats.event_totals import LARGEST, LARGEST_FILE_BYTES, WORD, fold, state_layout, try_own

logger = logging.getLogger("pipevault")

OTHER_REASON = "other"
FOLD_EVERY = 64
"""A process that finds so many files, or a multiple, folds those of ended ones before it adds its own."""
_APPEND = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC


@dataclass(frozen=True)
class _Log:
    """An open file of this process; its device and inode tell whether the descriptor is still that file's."""

    descriptor: int
    identity: tuple[int, int]

    def status(self) -> os.stat_result | None:
        """Look at the file; ``None`` where somebody closed the descriptor: another file may have its number by now."""
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


def _line(event: str, key: Digest | None, reason: str, numbers: Mapping[str, float]) -> bytes:
    if not WORD.fullmatch(event):
        raise ValueError(f"{event!r} is not a name of an event")
    document: dict[str, Any] = {"event": event, "time": int(time.time())}
    if key is not None:
        document["key"] = key.hex
    if reason:
        document["reason"] = reason if WORD.fullmatch(reason) else OTHER_REASON
    if numbers:
        document["numbers"] = {name: number for name, number in numbers.items() if 0 <= number <= LARGEST}
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
        with suppress(VaultError):  # whoever asks for the statistics says so
            fold(layout)
    owner = ProcessIdentity.current()
    while True:
        path = layout.events_file(host=owner.host, pid=owner.pid, random_hex=os.urandom(8).hex(), mark=owner.mark)
        descriptor = os.open(path, _APPEND, 0o644)
        os.fchmod(descriptor, 0o644)  # whatever the umask: others fold it
        why_not, status = try_own(descriptor), os.fstat(descriptor)
        if why_not is not NotLocked.HELD_ELSEWHERE and status.st_nlink:
            return _Log(descriptor, (status.st_dev, status.st_ino))
        os.close(descriptor)  # another process took it for that of an ended one before it was locked


def _forget(root: Path) -> None:
    log = _logs.pop(root, None)
    if log is not None and log.status() is not None:
        os.close(log.descriptor)
