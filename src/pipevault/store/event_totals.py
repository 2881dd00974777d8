"""Sums of events, and folding the files of dead processes into them without losing or doubling a count.

``events/totals.<n>.json``, canonical JSON shown here with line breaks; the valid one with the highest number counts::

    {"includes": {"worker-3.4711.0123456789abcdef01234567.0123456789abcdef.jsonl": 1834},
     "rows": [{"count": 3, "event": "hit", "key": "<key digest>", "numbers": {}, "reason": ""}],
     "self_digest": "<sha256 of this document's canonical JSON without self_digest>",
     "since": 1738324800,
     "totals_version": 1}

``includes`` names the events files whose first so many bytes are in the sums; of such a file only what follows is
counted beside them. Order of :func:`compact`: read the totals ``n`` and the files to fold; write the totals ``n + 1``
to a temporary file, fsync it, and give it its name with a hard link, which fails if another process was first; only
then remove the files that it includes, and older totals. So a crash at any step leaves every event in exactly one place
that counts. A number that was used is never free again before a higher one exists, which is how a slow process notices
that its totals came too late.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

from pipevault.digest import Digest, canonical_json, digest_bytes
from pipevault.errors import NewerVaultError, NoHomeError
from pipevault.store.atomic import create_file, read_regular, vault_errors
from pipevault.store.event_log import Event, is_amount, is_time, iter_events_files, read_events, state_layout
from pipevault.store.layout import Layout
from pipevault.store.liveness import is_process_alive
from pipevault.store.staging import staging_folder

TOTALS_VERSION = 1
IDLE_MIN_AGE_S = 7 * 86_400.0
"""The file of a process of which nobody can tell whether it lives is folded when it was not written for so long."""

_TRIES = 8

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
    """What was counted, ``since`` seconds after the epoch; ``includes`` as in the file."""

    rows: dict[RowKey, Row] = field(default_factory=dict)
    includes: dict[str, int] = field(default_factory=dict)
    since: float | None = None
    unreadable: list[str] = field(default_factory=list)
    """Sentences about what could not be read, and so was not counted."""

    def add_events(self, events: Iterable[Event]) -> None:
        for event in events:
            self.rows.setdefault((event.key.hex if event.key else "", event.event, event.reason), Row()).add(
                1, event.numbers
            )
            self._begin(event.time_s)

    def add(self, other: Sums) -> None:
        for key, row in other.rows.items():
            self.rows.setdefault(key, Row()).add(row.count, row.numbers)
        self.unreadable.extend(other.unreadable)
        if other.since is not None:
            self._begin(other.since)

    def to_bytes(self) -> bytes:
        body = {
            "includes": self.includes,
            "rows": [
                {"count": row.count, "event": event, "key": key, "numbers": row.numbers, "reason": reason}
                for (key, event, reason), row in sorted(self.rows.items())
            ],
            "since": self.since,
            "totals_version": TOTALS_VERSION,
        }
        return canonical_json({**body, "self_digest": digest_bytes(canonical_json(body)).hex})

    def _begin(self, time_s: float) -> None:
        self.since = time_s if self.since is None else min(self.since, time_s)


@dataclass(frozen=True)
class Compaction:
    """What :func:`compact` did: files folded into totals and removed, and files that stayed since their process may
    live.
    """

    folded: int
    kept: int


def read_sums(layout: Layout) -> Sums:
    """All that was counted for the vault, in it and in the user's state folder. Takes no lock and writes nothing.

    :class:`~pipevault.errors.VaultError` if a folder cannot be read.
    """
    sums = _consistent_sums(layout)
    with suppress(NoHomeError):
        sums.add(_consistent_sums(state_layout(layout)))
    return sums


def compact(layout: Layout) -> Compaction:
    """Fold what dead processes counted into one file. Another process may do the same at the same time.

    Raises :class:`~pipevault.errors.VaultError` where the vault cannot be read or written, and
    :class:`~pipevault.errors.NewerVaultError` where a later version wrote totals.
    """
    here = _compact_folder(layout)
    elsewhere = Compaction(0, 0)
    with suppress(NoHomeError):
        state = state_layout(layout)
        elsewhere = _compact_folder(state) if state.events_dir.is_dir() else elsewhere
    return Compaction(here.folded + elsewhere.folded, here.kept + elsewhere.kept)


def _consistent_sums(layout: Layout) -> Sums:
    """Read until nothing was folded meanwhile: between two equal lists of names, every event stood in one place."""
    with vault_errors(layout.events_dir, "read"):
        for _ in range(_TRIES):
            totals, files = _totals_files(layout), list(iter_events_files(layout))
            sums, vanished = _read_once(layout, totals, files)
            if not vanished and totals == _totals_files(layout):
                break
    return sums


def _read_once(layout: Layout, totals: Mapping[int, Path], files: Iterable[Path]) -> tuple[Sums, bool]:
    sums, vanished = Sums(), False
    try:
        _, sums = _newest_totals(totals)
    except FileNotFoundError:
        vanished = True
    for path in files:
        try:
            read = read_events(path, start_bytes=sums.includes.get(path.name, 0))
        except FileNotFoundError:
            vanished = True
        except OSError as error:
            sums.unreadable.append(f"{path} cannot be read: {error.strerror or error}.")
        else:
            sums.add_events(read.events)
            if read.unreadable:
                sums.unreadable.append(f"{path} has {read.unreadable} lines that are no events.")
    return sums, vanished


def _compact_folder(layout: Layout) -> Compaction:
    with vault_errors(layout.events_dir, "compacted"):
        files = list(iter_events_files(layout))
        try:
            folded = _fold(layout, files)
        except FileNotFoundError:  # another process folds the same files at this moment
            folded = 0
        return Compaction(folded, len(files) - folded)


def _fold(layout: Layout, files: Sequence[Path]) -> int:
    totals = _totals_files(layout)
    newest, sums = _newest_totals(totals)
    # A name may go once its file has gone: names are never used twice.
    sums.includes = {path.name: sums.includes[path.name] for path in files if path.name in sums.includes}
    finished = [path for path in files if _is_finished(layout, path)]
    changed = newest != max(totals, default=0)  # the highest is damaged
    for path in finished:
        start_bytes = sums.includes.get(path.name, 0)
        read = read_events(path, start_bytes=start_bytes)
        if read.end_bytes > start_bytes:
            sums.add_events(read.events)
            sums.includes[path.name] = read.end_bytes
            changed = True
    if changed:
        newest = max(totals, default=0) + 1
        if not _publish_totals(layout, newest, sums):
            return 0
    folded = sum(_remove_folded(path, sums.includes.get(path.name, 0)) for path in finished)
    for number, path in totals.items():
        if number < newest:
            path.unlink(missing_ok=True)
    return folded


def _publish_totals(layout: Layout, number: int, sums: Sums) -> bool:
    """Whether these totals count now; ``False`` if another process was first."""
    path = layout.totals_file(number)
    try:
        with staging_folder(layout) as folder:
            create_file(path, sums.to_bytes(), staging=folder)
    except FileExistsError:
        return False
    if max(_totals_files(layout), default=0) > number:
        path.unlink(missing_ok=True)  # this process was slow: the number was used before, and had become free again
        return False
    return True


def _remove_folded(path: Path, end_bytes: int) -> bool:
    """A file that grew since it was read stays: its process lives after all. A torn last line goes with it."""
    data_end = read_events(path, start_bytes=end_bytes).end_bytes
    if data_end != end_bytes:
        return False
    path.unlink(missing_ok=True)
    return True


def _is_finished(layout: Layout, path: Path) -> bool:
    """Whether the process that wrote the file is dead or, where that cannot be told, idle."""
    owner = layout.events_owner(path)
    alive = is_process_alive(*owner) if owner and owner[1] else None
    return not alive if alive is not None else time.time() - path.stat().st_mtime > IDLE_MIN_AGE_S


def _totals_files(layout: Layout) -> dict[int, Path]:
    """By number. A folder may be listed incompletely while names come and go, hence two lists that agree."""
    seen: dict[int, Path] | None = None
    for _ in range(_TRIES):
        listed: dict[int, Path] = {}
        with suppress(FileNotFoundError):
            for name in os.listdir(layout.events_dir):
                path = layout.events_dir / name
                if (number := layout.totals_number(path)) is not None:
                    listed[number] = path
        if listed == seen:
            break
        seen = listed
    return seen or {}


def _newest_totals(totals: Mapping[int, Path]) -> tuple[int, Sums]:
    """The valid totals with the highest number, 0 and nothing if there are none; what is damaged is noted."""
    unreadable = []
    for number, path in sorted(totals.items(), reverse=True):
        try:
            sums = _parsed(read_regular(path), path)
        except FileNotFoundError:  # another process folds at this moment, and the caller reads again
            raise
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            if isinstance(error, NewerVaultError):
                raise
            unreadable.append(f"{path} is damaged: {error}.")
            continue
        sums.unreadable = unreadable
        return number, sums
    return 0, Sums(unreadable=unreadable)


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
    includes, since = dict(document["includes"]), document["since"]
    if not all(isinstance(end_bytes, int) and end_bytes >= 0 for end_bytes in includes.values()):
        raise ValueError("it includes a file up to no number of bytes")
    if since is not None and not is_time(since):
        raise ValueError(f"since is {since!r}")
    return Sums(rows, includes, since)
