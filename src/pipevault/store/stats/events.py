"""The files of events: a line of canonical JSON for each event, in ``events/<process>.jsonl``.

::

    {"event":"miss","key":"<key digest>","numbers":{"seconds":62.1},"reason":"absent","time":1738324801}

``key``, ``reason`` and ``numbers`` may be absent; ``time`` is in seconds since the epoch. The process that counts in a
file, and the children that it forks, hold its lock; whoever gets that lock knows that they have ended.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import suppress
from typing import Annotated, TypeAlias

import msgspec

from pipevault.digest import digest_bytes
from pipevault.errors import NoHomeError
from pipevault.files.flock import NotLocked, lock_descriptor
from pipevault.settings.user_folders import user_folder
from pipevault.store.layout import Layout

LARGEST_FILE_BYTES = 1 << 20

_YEAR_10000 = 253_402_300_800
LARGEST = 10**18
_LINE = re.compile(rb"[^\n]+")
WORD = re.compile(r"[a-z][a-z0-9_-]{0,31}")
Word: TypeAlias = Annotated[str, msgspec.Meta(pattern=rf"^{WORD.pattern}\Z")]
WordOrNone: TypeAlias = Annotated[str, msgspec.Meta(pattern=rf"^({WORD.pattern})?\Z")]
Amount: TypeAlias = (
    Annotated[int, msgspec.Meta(ge=0, le=LARGEST)] | Annotated[float, msgspec.Meta(ge=0, le=float(LARGEST))]
)
"""A number that sums of a vault's life can hold; no NaN."""
Time: TypeAlias = (
    Annotated[int, msgspec.Meta(ge=0, lt=_YEAR_10000)] | Annotated[float, msgspec.Meta(ge=0, lt=float(_YEAR_10000))]
)
"""Seconds since the epoch, of a year that a calendar knows."""


class Event(msgspec.Struct, frozen=True):
    """One line. ``key`` is that of the entry; empty if it happened to none. ``time``: seconds since the epoch."""

    event: Word
    time: Time
    key: Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{64}\Z")] = ""
    reason: WordOrNone = ""
    numbers: dict[Word, Amount] = msgspec.field(default_factory=dict)


_decoder = msgspec.json.Decoder(Event)


def state_layout(layout: Layout) -> Layout:
    """Return where the events of a vault go that cannot be written: ``pipevault/vaults/<16 digits>`` in the user's
    state folder. The digits are the first of the SHA-256 of the vault's path.

    :class:`~pipevault.errors.NoHomeError`: this user has no such folder.
    """
    name = digest_bytes(os.fsencode(layout.root)).hex[:16]
    return Layout(user_folder("state") / "vaults" / name)


def with_state(layout: Layout) -> Iterator[Layout]:
    """Give the vault and, if this user has one, the place in the state folder that stands in for it."""
    yield layout
    with suppress(NoHomeError):
        yield state_layout(layout)


def try_own(descriptor: int) -> NotLocked | None:
    """Lock an open events file for good, or say why not. A lock that fails for an unforeseen reason counts as none."""
    try:
        return lock_descriptor(descriptor)
    except OSError:
        return NotLocked.NO_LOCKS


def parse_events(data: bytes) -> tuple[list[Event], int]:
    """Return the events, and how many complete lines are none; a torn last line is passed over."""
    parsed = [_parsed(line) for line in _LINE.findall(data, 0, data.rfind(b"\n") + 1)]
    events = [event for event in parsed if event is not None]
    return events, len(parsed) - len(events)


def _parsed(line: bytes) -> Event | None:
    try:
        return _decoder.decode(line)
    except (ValueError, RecursionError):
        return None
