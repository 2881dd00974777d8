"""Asking a folder that may never answer: a dead network mount blocks for hours whoever touches it.

Each question runs in a daemon thread. A folder that lets one pass is left out by this process for
:data:`RETRY_AFTER_S` seconds, and for as long as that thread still hangs, so that no more than one does.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import TypeVar

from pipevault.errors import SlowTierError

RETRY_AFTER_S = 300.0
MIN_BYTES_PER_S = 1 << 20
"""The rate that a folder must deliver at least, beyond the time that it has to answer at all."""

Answer = TypeVar("Answer")


_silent: dict[Path, tuple[threading.Thread, float]] = {}
"""The thread that hangs in each folder, and until when that is left out, by the monotonic clock."""


def ask(folder: Path, question: Callable[[], Answer], *, timeout_s: float, size_bytes: int = 0) -> Answer:
    """Return what ``question`` does; :class:`SlowTierError` if it does not within ``timeout_s`` seconds, and more for
    ``size_bytes`` that it reads from ``folder``. What comes later is dropped.
    """
    if silent_s := left_out_s(folder):
        raise SlowTierError(
            f"{folder} did not answer a while ago and is left out for {silent_s:.0f} s more. Check its mount.", folder
        )
    answer: Future[Answer] = Future()

    def run() -> None:
        try:
            answer.set_result(question())
        except Exception as error:  # handed to the thread that asked
            answer.set_exception(error)

    allowed_s = timeout_s + size_bytes / MIN_BYTES_PER_S
    thread = threading.Thread(target=run, name=f"pipevault {folder}", daemon=True)
    thread.start()
    thread.join(min(allowed_s, threading.TIMEOUT_MAX))
    if thread.is_alive():
        _silent[folder] = thread, time.monotonic() + RETRY_AFTER_S
        raise SlowTierError(
            f"{folder} did not answer within {allowed_s:g} s; this process leaves it out for {RETRY_AFTER_S:.0f} s. "
            "Check its mount, or raise tier_timeout_s.",
            folder,
        )
    return answer.result(0)


def left_out_s(folder: Path) -> float:
    if (silence := _silent.get(folder)) is None:
        return 0.0
    thread, until_s = silence
    if (remaining_s := until_s - time.monotonic()) > 0:
        return remaining_s
    if thread.is_alive():
        return RETRY_AFTER_S
    _silent.pop(folder, None)
    return 0.0
