"""Counting events: at most once, with no lock to wait for and no fsync; and sums over what was counted.

``events/<process>.jsonl`` has a line of canonical JSON for each event::

    {"event":"miss","key":"<key digest>","numbers":{"seconds":62.1},"reason":"absent","time":1738324801}

``key``, ``reason`` and ``numbers`` may be absent. The process that counts in a file, and the children that it forks,
hold its lock; whoever gets that lock knows that they have ended. A line is one write, so a process that dies leaves at
most a torn last line, which counts as none.

``events/totals.json``: ``{"rows": [[key, event, reason, {"times": 3, "seconds": 62.1}]], "since": 1738324800,
"totals_version": 2}``. Under the lock of ``events/totals.lock``, which readers take too: read the totals and the files
of ended processes, write the new totals next to them, remove the files, and only then rename the new totals into place.
So a crash may lose counts, and doubles none.
"""

from __future__ import annotations

import errno
import io
import logging
import os
import re
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, TypeAlias

import msgspec

from pipevault.digest import Digest, canonical_json, digest_bytes
from pipevault.errors import NewerVaultError, NoHomeError, VaultError
from pipevault.files.atomic import FOLDER_MODE, publish_file, share_like_folder, vault_errors, write_file
from pipevault.files.documents import Format
from pipevault.files.flock import NotLocked, lock_descriptor, locked, look
from pipevault.files.liveness import ProcessIdentity
from pipevault.reading import open_regular, read_file
from pipevault.settings.user_folders import user_folder
from pipevault.store.layout import Layout
from pipevault.store.places import children
from pipevault.store.publish import staging_folder

logger = logging.getLogger("pipevault")

TOTALS_VERSION = 2
TIMES = "times"
LARGEST_FILE_BYTES = 1 << 20
IDLE_MIN_AGE_S = 3600.0
"""A file is folded when nothing was written to it for so long, where the file system has no locks."""
FOLD_EVERY = 64
"""A process that finds so many files, or a multiple, folds those of ended ones before it adds its own."""
LARGEST = 10**18

_APPEND = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC
_LONGEST_WAIT_S = 5.0
_MOST_AT_ONCE = 256  # files are open
_YEAR_10000 = 253_402_300_800
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


class Event(msgspec.Struct, frozen=True, omit_defaults=True):
    """One line. ``key`` is that of the entry; empty if it happened to none. ``time``: seconds since the epoch."""

    event: Word
    time: Time
    key: Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{64}\Z")] = ""
    reason: WordOrNone = ""
    numbers: dict[Word, Amount] = msgspec.field(default_factory=dict)


_decoder = msgspec.json.Decoder(Event)

RowKey: TypeAlias = tuple[str, str, str]
"""Key digest or nothing, event, reason."""
_KeyOrNone: TypeAlias = Annotated[str, msgspec.Meta(pattern=r"^([0-9a-f]{64})?\Z")]
_Row: TypeAlias = tuple[_KeyOrNone, Word, WordOrNone, dict[Word, Amount]]


class _Totals(msgspec.Struct):
    rows: list[_Row]
    since: Time | None
    totals_version: int


_FORMAT = Format(
    _Totals,
    "totals_version",
    TOTALS_VERSION,
    newer=lambda problem: NewerVaultError(f"{problem} Upgrade pipevault.", problem.path),
    canonical=False,
)


@dataclass
class Sums:
    """Counts of what happened (:data:`TIMES`) and the sums of its numbers, ``since`` seconds after the epoch.
    ``unreadable``: sentences about what could not be read.
    """

    rows: dict[RowKey, Counter[str]] = field(default_factory=dict)
    since: float | None = None
    unreadable: list[str] = field(default_factory=list)

    def add(self, row_key: RowKey, numbers: Counter[str], since: float | None) -> None:
        self.rows.setdefault(row_key, Counter()).update(numbers)
        self.since = min((time_s for time_s in (self.since, since) if time_s is not None), default=None)

    def to_bytes(self) -> bytes:
        rows: list[_Row] = [(*row_key, dict(numbers)) for row_key, numbers in sorted(self.rows.items())]
        return _FORMAT.write(_Totals(rows, self.since, TOTALS_VERSION))


def state_layout(layout: Layout) -> Layout:
    """Return where the events of a vault go that cannot be written: ``pipevault/vaults/<16 digits of the SHA-256 of its
    path>`` in the user's state folder. :class:`~pipevault.errors.NoHomeError`.
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


_logs: dict[Path, tuple[int, os.stat_result]] = {}
"""The open file of this process for each vault, and its status."""


def count(layout: Layout, event: str, *, key: Digest | None = None, reason: str = "", **numbers: float) -> None:
    """Count that ``event`` happened, to the entry ``key`` or to none. Never raises.

    ``event`` and ``reason`` are lower-case words (:data:`WORD`); any other reason counts as ``other``. ``numbers`` are
    summed by name; one that is negative or no number is left out.
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
    counted = {name: number for name, number in numbers.items() if 0 <= number <= LARGEST}
    word = reason if not reason or WORD.fullmatch(reason) else "other"
    made = Event(event, int(time.time()), key.hex if key else "", word, counted)
    return canonical_json(msgspec.to_builtins(made)) + b"\n"


def _append(layout: Layout, line: bytes) -> None:
    log = _logs.get(layout.root)
    status = look(*log) if log else None
    if log is None or status is None or not status.st_nlink or status.st_size >= LARGEST_FILE_BYTES:
        _forget(layout.root)
        log = _logs[layout.root] = _new_log(layout)
    if os.write(log[0], line) != len(line):
        _forget(layout.root)  # the next line must not be appended to half of this one


def _new_log(layout: Layout) -> tuple[int, os.stat_result]:
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
            return descriptor, status
        os.close(descriptor)  # another process took it for that of an ended one before it was locked


def _forget(root: Path) -> None:
    log = _logs.pop(root, None)
    if log is not None and look(*log) is not None:
        os.close(log[0])


def compact(layout: Layout) -> int:
    """Fold what ended processes counted, in the vault and in the user's state folder; return how many files went.
    :class:`~pipevault.errors.VaultError`: a folder cannot be read or written, or a later version wrote totals.
    """
    return sum(fold(place) for place in with_state(layout))


def fold(layout: Layout) -> int:
    """Do the same in one folder; nothing is folded where another process does so for long, or cannot be locked."""
    with _lock(layout) as is_locked:
        return _fold(layout, Sums()) if is_locked else 0


def read_sums(layout: Layout) -> Sums:
    """Sum all that was counted for the vault, in it and in the user's state folder; fold what can be folded.
    :class:`~pipevault.errors.VaultError`: a folder cannot be read.
    """
    sums = Sums()
    for place in with_state(layout):
        # Without the lock what is folded meanwhile may be missed, as in a folder that this user cannot write.
        with _lock(place) as is_locked:
            if is_locked:
                with suppress(VaultError):  # a full disk, or a folder that this user may not change: only read, then
                    _fold(place, sums)
            _read(place, sums)
    return sums


def _lock(layout: Layout) -> AbstractContextManager[bool]:
    if not layout.events_dir.is_dir():
        return nullcontext(False)
    return locked(layout.totals_lock, timeout_s=_LONGEST_WAIT_S)


def _read(layout: Layout, sums: Sums) -> None:
    """Add everything. The totals come first: without the lock, what is folded meanwhile is missed, not doubled."""
    with vault_errors(layout.events_dir, "read"):
        with _noting(layout.totals_file, sums):
            _add_totals(layout, sums)
        for path in filter(layout.is_events, children(layout.events_dir)):
            with _noting(path, sums), _open(path) as file:
                _add_file(path, file, sums)


@contextmanager
def _noting(path: Path, sums: Sums) -> Iterator[None]:
    """Note what cannot be read; what is gone by now is not missed."""
    try:
        yield
    except FileNotFoundError:
        return
    except OSError as error:
        sums.unreadable.append(f"{path} cannot be read: {error.strerror or error}.")


def _fold(layout: Layout, noted: Sums) -> int:
    """Fold, and return the number of files; ``noted`` gets sentences about what was in them and is not counted."""
    with vault_errors(layout.events_dir, "compacted"), ExitStack() as kept_locked:
        sums, ended = Sums(), []
        _add_totals(layout, sums)
        for path in filter(layout.is_events, children(layout.events_dir)):
            with suppress(OSError), ExitStack() as opened:  # what cannot be read stays, and whoever reads tells of it
                file = opened.enter_context(_open(path))
                if _is_ended(file):
                    _add_file(path, file, sums)
                    ended.append(path)
                    kept_locked.push(opened.pop_all())  # until it is gone, lest its process begins to count in it
            if len(ended) == _MOST_AT_ONCE:
                break
        if ended or sums.unreadable:
            with staging_folder(layout) as folder:
                staged = folder / layout.totals_file.name
                write_file(staged, sums.to_bytes())
                for path in ended:
                    path.unlink()
                publish_file(staged, layout.totals_file)
        for problem in sums.unreadable:
            logger.warning("not counted: %s", problem)
        noted.unreadable += sums.unreadable
        return len(ended)


def _open(path: Path) -> io.FileIO:
    """``OSError`` if there is none, if something else stands in its place, or if it is too large."""
    file = open_regular(path, follow_links=False)
    if os.fstat(file.fileno()).st_size <= 2 * LARGEST_FILE_BYTES:
        return file
    file.close()
    raise OSError(errno.EINVAL, f"it has more than {2 * LARGEST_FILE_BYTES >> 20} MiB")


def _is_ended(file: io.FileIO) -> bool:
    why_not = try_own(file.fileno())
    if why_not is NotLocked.NO_LOCKS:
        return time.time() - os.fstat(file.fileno()).st_mtime > IDLE_MIN_AGE_S
    return why_not is None


def _add_file(path: Path, file: io.FileIO, sums: Sums) -> None:
    data, strange = file.read(), 0
    for line in _LINE.findall(data, 0, data.rfind(b"\n") + 1):  # a torn last line is passed over
        try:
            event = _decoder.decode(line)
        except (ValueError, RecursionError):
            strange += 1
            continue
        numbers: Counter[str] = Counter({TIMES: 1})
        numbers.update(event.numbers)
        sums.add((event.key, event.event, event.reason), numbers, event.time)
    if strange:
        sums.unreadable.append(f"{path} has {strange} lines that are not events.")


def _add_totals(layout: Layout, sums: Sums) -> None:
    """Nothing where there are none; what is damaged is noted. ``OSError`` where they cannot be read."""
    path = layout.totals_file
    try:
        totals = _FORMAT.parse(read_file(path), path)
    except FileNotFoundError:
        return
    except ValueError as error:
        sums.unreadable.append(str(error))
        return
    for key, event, reason, numbers in totals.rows:
        sums.add((key, event, reason), Counter(numbers), totals.since)
