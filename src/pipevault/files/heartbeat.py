"""Signs of life where locks prove nothing: a process sets the time of change of what it holds, every few minutes.

All times are those of the file system that keeps the file, for clocks of several machines disagree: a beat lets it set
the time, and the age is counted from the time that it gives to the folder, just now.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from functools import lru_cache
from pathlib import Path

logger = logging.getLogger("pipevault")

BEAT_INTERVAL_S = 240.0
BEAT_LIMIT_S = 900.0
"""Seconds after which what was not changed belongs to no living process."""

_CLOCK_VALID_S = 60.0

_beating: set[Path] = set()
_changing = threading.Condition()
_thread: threading.Thread | None = None


def start_beating(path: Path) -> None:
    """Beat for ``path``, now and until :func:`stop_beating` or the end of the process, in one thread for all."""
    global _thread
    _beat(path)
    with _changing:
        _beating.add(path)
        if _thread is None:
            _thread = threading.Thread(target=_run, name="pipevault heartbeat", daemon=True)
            _thread.start()


def stop_beating(path: Path) -> None:
    with _changing:
        _beating.discard(path)
        _changing.notify()


def is_silent(path: Path) -> bool:
    """Tell whether ``path`` was not changed for :data:`BEAT_LIMIT_S`; its time may lie that far ahead, too.
    ``OSError``.
    """
    minute = int(time.monotonic() // _CLOCK_VALID_S)
    now_s = time.time() + _clock_ahead_s(path.parent, minute)
    return abs(now_s - path.lstat().st_mtime) >= BEAT_LIMIT_S


@lru_cache(maxsize=64)
def _clock_ahead_s(folder: Path, minute: int) -> float:
    """Return how far the file system's clock is ahead of this machine's, in seconds; 0 where it may not be asked."""
    del minute  # asked once in each
    try:
        os.utime(folder)
        return folder.stat().st_mtime - time.time()
    except OSError:
        return 0.0


def _run() -> None:
    global _thread
    while True:
        with _changing:
            if _changing.wait_for(lambda: not _beating, BEAT_INTERVAL_S):
                _thread = None
                return
            paths = tuple(_beating)
        for path in paths:
            _beat(path)


def _beat(path: Path) -> None:
    try:
        os.utime(path)
    except OSError as error:
        logger.debug("no sign of life could be left at %s: %s", path, error)


def _restart() -> None:
    """In a forked child, which has neither the thread nor what its parent holds."""
    global _changing, _thread
    _changing, _thread = threading.Condition(), None
    _beating.clear()


os.register_at_fork(after_in_child=_restart)
