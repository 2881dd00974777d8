"""The last use of an entry: the time of change of ``uses/<aa>/<key digest>``, an empty file.

Where the vault cannot be written, the note goes to the user's state folder
(:func:`pipevault.store.stats.event_log.state_layout`) under the same name; both are read. Clocks of several machines
disagree, so a note is only ever moved forward. What a note from the future counts as,
:mod:`~pipevault.store.retention.prune` decides.
"""

from __future__ import annotations

import os
import time
from contextlib import suppress
from pathlib import Path

from pipevault.digest import Digest
from pipevault.errors import VaultError
from pipevault.files.atomic import FOLDER_MODE, share_like_folder
from pipevault.store.inventory import find_spread
from pipevault.store.layout import Layout
from pipevault.store.stats.event_log import with_state


def record_use(layout: Layout, key: Digest, *, writable: bool = True) -> None:
    """Note that ``key`` is used now. Never raises: a use that cannot be noted only makes the entry look older than it
    is.
    """
    for place in with_state(layout):
        if (writable or place != layout) and _touch(place.use_file(key)):
            return


def last_use_s(layout: Layout, key: Digest) -> float | None:
    """Return seconds since the epoch, as the clock that noted it told them, so perhaps in the future; ``None``: no use
    is known. Raises nothing.
    """
    times = []
    for file in _notes(layout, key):
        with suppress(OSError):
            times.append(file.stat().st_mtime)
    return max(times, default=None)


def last_uses_s(layout: Layout) -> dict[Digest, float]:
    """Return :func:`last_use_s` of every key that has one, read in bulk; keys without an entry among them."""
    times: dict[Digest, float] = {}
    for place in with_state(layout):
        with suppress(VaultError):  # a place that cannot be read tells of no use
            for key, file in find_spread(place, place.uses_dir, skip_unreadable=True).items():
                times[key] = max(file.st_mtime, times.get(key, file.st_mtime))
    return times


def forget_use(layout: Layout, key: Digest) -> None:
    for file in _notes(layout, key):
        with suppress(OSError):
            file.unlink()


def set_last_use(layout: Layout, key: Digest, time_s: float) -> None:
    """Make ``time_s`` the time of every note of ``key``, later notes too; never raises."""
    for file in _notes(layout, key):
        with suppress(OSError):
            os.utime(file, times=(time_s, time_s))


def _touch(file: Path) -> bool:
    try:
        try:
            if file.stat().st_mtime < time.time():
                os.utime(file)
        except FileNotFoundError:
            _create(file)
        except PermissionError:  # another user's file in a folder that this user may write
            file.unlink()
            _create(file)
    except OSError:
        return False
    return True


def _create(file: Path) -> None:
    for folder in (file.parent.parent, file.parent):
        if not folder.is_dir():
            folder.mkdir(mode=FOLDER_MODE, parents=True, exist_ok=True)
            share_like_folder(folder, folder.parent)
    file.touch(mode=0o644)


def _notes(layout: Layout, key: Digest) -> list[Path]:
    return [place.use_file(key) for place in with_state(layout)]
