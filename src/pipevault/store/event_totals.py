"""Sums of events, and folding the files of ended processes into them: a crash may lose counts, and doubles none.

``events/totals.json``, canonical JSON shown here with line breaks::

    {"rows": [{"count": 3, "event": "hit", "key": "<key digest>", "numbers": {}, "reason": ""}],
     "self_digest": "<sha256 of this document's canonical JSON without self_digest>",
     "since": 1738324800,
     "totals_version": 2}

Under the lock of ``events/totals.lock``, which readers take too: read the totals and the files that nobody counts in
any more, write the new totals beside, remove the files, and only then rename the new totals into place.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, TypeAlias

from pipevault.digest import Digest, canonical_json, digest_bytes
from pipevault.errors import NewerVaultError, NoHomeError, VaultError
from pipevault.files.flock import HeldLock, NotLocked, try_lock
from pipevault.store.atomic import publish_file, read_regular, vault_errors, write_file
from pipevault.store.event_log import (
    Event,
    is_amount,
    is_time,
    iter_events_files,
    open_events,
    read_events,
    state_layout,
    try_own,
)
from pipevault.store.layout import Layout
from pipevault.store.staging import staging_folder

logger = logging.getLogger("pipevault")

TOTALS_VERSION = 2
IDLE_MIN_AGE_S = 3600.0
"""Where the file system has no locks, a file is folded when nothing was written to it for so long."""

_LONGEST_WAIT_S = 5.0
_MOST_AT_ONCE = 256  # files are open

RowKey: TypeAlias = tuple[str, str, str]
"""Key digest or nothing, event, reason."""


@dataclass
class Row:
    """How often one event happened to one entry for one reason, and the sums of its numbers."""

    count: int = 0
    numbers: dict[str, float] = field(default_factory=dict)

    def add(self, count: int, numbers: Mapping[str, float]) -> None:
        self.count += count
        for name, number in numbers.items():
            self.numbers[name] = self.numbers.get(name, 0) + number


@dataclass
class Sums:
    """What was counted, ``since`` seconds after the epoch; ``unreadable``: sentences about what could not be read."""

    rows: dict[RowKey, Row] = field(default_factory=dict)
    since: float | None = None
    unreadable: list[str] = field(default_factory=list)

    def add_event(self, event: Event) -> None:
        row_key = (event.key.hex if event.key else "", event.event, event.reason)
        self.add(Sums({row_key: Row(1, dict(event.numbers))}, event.time_s))

    def add(self, other: Sums) -> None:
        for row_key, row in other.rows.items():
            self.rows.setdefault(row_key, Row()).add(row.count, row.numbers)
        self.unreadable += other.unreadable
        self.since = min((time_s for time_s in (self.since, other.since) if time_s is not None), default=None)

    def to_bytes(self) -> bytes:
        rows = [
            {"count": row.count, "event": event, "key": key, "numbers": row.numbers, "reason": reason}
            for (key, event, reason), row in sorted(self.rows.items())
        ]
        body = {"rows": rows, "since": self.since, "totals_version": TOTALS_VERSION}
        return canonical_json({**body, "self_digest": digest_bytes(canonical_json(body)).hex})


def compact(layout: Layout) -> int:
    """Fold what ended processes counted, in the vault and in the user's state folder; how many files went.

    :class:`~pipevault.errors.VaultError` where a folder cannot be read or written; ``NewerVaultError`` where a later
    version wrote totals.
    """
    return sum(fold(place) for place in _places(layout))


def fold(layout: Layout) -> int:
    """:func:`compact` in one folder; nothing is folded where another process does so for long, or cannot be locked."""
    with _lock(layout) as is_locked:
        return _fold(layout)[0] if is_locked else 0


def read_sums(layout: Layout) -> Sums:
    """All that was counted for the vault, in it and in the user's state folder; folds what can be folded.

    :class:`~pipevault.errors.VaultError` if a folder cannot be read.
    """
    sums = Sums()
    for place in _places(layout):
        with _lock(place) as is_locked:
            if is_locked:
                with suppress(VaultError):  # a full disk, or a folder that this user may not change: only read, then
                    sums.unreadable += _fold(place)[1]
            sums.add(_read(place))
    return sums


def _places(layout: Layout) -> Iterator[Layout]:
    yield layout
    with suppress(NoHomeError):
        yield state_layout(layout)


@contextmanager
def _lock(layout: Layout) -> Iterator[bool]:
    """Whether it was got. Without it a reader may miss what is folded meanwhile, as in a folder it cannot write."""
    lock = None
    end_s = time.monotonic() + _LONGEST_WAIT_S
    while layout.events_dir.is_dir():
        try:
            lock = try_lock(layout.totals_lock)
        except OSError:
            break
        if isinstance(lock, HeldLock) or lock is NotLocked.NO_LOCKS or time.monotonic() > end_s:
            break
        time.sleep(0.005)
    try:
        yield isinstance(lock, HeldLock)
    finally:
        if isinstance(lock, HeldLock):
            lock.release()


def _read(layout: Layout) -> Sums:
    """The totals first: without the lock, what is folded meanwhile is missed, not doubled."""
    sums = Sums()
    with vault_errors(layout.events_dir, "read"):
        try:
            sums = _totals(layout)
        except OSError as error:
            if isinstance(error, NewerVaultError):
                raise
            sums.unreadable.append(f"{layout.totals_file} cannot be read: {error.strerror or error}.")
        for path in iter_events_files(layout):
            try:
                with open_events(path) as file:
                    _add_file(sums, path, file)
            except FileNotFoundError:
                continue
            except OSError as error:
                sums.unreadable.append(f"{path} cannot be read: {error.strerror or error}.")
        sums.unreadable += [
            f"{path} is of an earlier pipevault, and not counted. Remove it."
            for path in sorted(layout.events_dir.glob("totals.*.json"))
            if layout.is_old_totals(path)
        ]
    return sums


def _fold(layout: Layout) -> tuple[int, list[str]]:
    """Files folded, and sentences about what was in them and is not counted."""
    with vault_errors(layout.events_dir, "compacted"), ExitStack() as kept_locked:
        sums, ended = _totals(layout), []
        for path in iter_events_files(layout):
            try:
                with ExitStack() as opened:
                    file = opened.enter_context(open_events(path))
                    if _is_ended(file):
                        _add_file(sums, path, file)
                        ended.append(path)
                        kept_locked.push(opened.pop_all())  # until it is gone, lest its process begins to count in it
            except OSError:  # it stays, and whoever reads tells of it
                continue
            if len(ended) == _MOST_AT_ONCE:
                break
        if not ended and not sums.unreadable:
            return 0, []
        with staging_folder(layout) as folder:
            staged = folder / layout.totals_file.name
            write_file(staged, sums.to_bytes())
            for path in ended:
                path.unlink()
            publish_file(staged, layout.totals_file)
        for problem in sums.unreadable:
            logger.warning("not counted: %s", problem)
        return len(ended), sums.unreadable


def _is_ended(file: BinaryIO) -> bool:
    is_ours = try_own(file.fileno())
    return time.time() - os.fstat(file.fileno()).st_mtime > IDLE_MIN_AGE_S if is_ours is None else is_ours


def _add_file(sums: Sums, path: Path, file: BinaryIO) -> None:
    events, strange = read_events(file)
    for event in events:
        sums.add_event(event)
    if strange:
        sums.unreadable.append(f"{path} has {strange} lines that are no events.")


def _totals(layout: Layout) -> Sums:
    """Nothing where there are none; what is damaged is noted. ``OSError`` where they cannot be read."""
    path = layout.totals_file
    try:
        return _parsed(read_regular(path), path)
    except FileNotFoundError:
        return Sums()
    except NewerVaultError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return Sums(unreadable=[f"{path} is damaged: {error}."])


def _parsed(data: bytes, path: Path) -> Sums:
    document = json.loads(data)
    version = document["totals_version"]
    if isinstance(version, int) and version > TOTALS_VERSION:
        raise NewerVaultError(
            f"{path} has totals version {version}; this pipevault reads up to {TOTALS_VERSION}. Upgrade pipevault.",
            path,
        )
    self_digest = document.pop("self_digest")
    if digest_bytes(canonical_json(document)).hex != self_digest:
        raise ValueError("its content does not match its self_digest")
    rows = {}
    for row in document["rows"]:
        if row["key"]:
            Digest(row["key"])
        if not all(map(is_amount, (row["count"], *row["numbers"].values()))):
            raise ValueError("a row has an amount that is none")
        rows[row["key"], str(row["event"]), str(row["reason"])] = Row(row["count"], dict(row["numbers"]))
    since = document["since"]
    if since is not None and not is_time(since):
        raise ValueError(f"since is {since!r}")
    return Sums(rows, since)
