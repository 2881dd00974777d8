"""glibc's ``malloc`` while a pipeline generates: memory that was freed is used again, and not given back each time.

Activations are freed and allocated again at every step. By default glibc maps large ones each time, and the kernel
fills their pages with zeros: a fifth of the time of a large pipeline on a CPU (docs/measured.md).
https://sourceware.org/glibc/manual/2.36/html_node/Malloc-Tunable-Parameters.html
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_KEEPING = {_M_MMAP_THRESHOLD: 1 << 30, _M_TRIM_THRESHOLD: (1 << 31) - 1}
# What glibc comes to by itself once a program has freed 32 MiB, but for the memory that stays between two generations.
_USUAL = {_M_MMAP_THRESHOLD: 32 << 20, _M_TRIM_THRESHOLD: 256 << 20}
_DECIDED = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TOP_PAD_", "MALLOC_MMAP_MAX_")


class _Keeping:
    """Counts the blocks that want freed memory kept, in all threads."""

    def __init__(self) -> None:
        self._blocks = 0
        self._lock = threading.Lock()
        is_decided = "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", "") or any(map(os.environ.get, _DECIDED))
        library = None if is_decided else ctypes.CDLL(None)
        self._mallopt = getattr(library, "mallopt", None)
        self.trim = getattr(library, "malloc_trim", lambda pad_bytes: 0)

    def add(self, blocks: int) -> None:
        with self._lock:
            before, self._blocks = self._blocks, max(self._blocks + blocks, 0)
            if bool(before) != bool(self._blocks):
                self._set(_KEEPING if self._blocks else _USUAL)

    def _set(self, values: Mapping[int, int]) -> None:
        if self._mallopt is not None:
            for parameter, value in values.items():
                if not self._mallopt(parameter, value):  # glibc before 2.35 takes 32 MiB at most
                    self._mallopt(parameter, _USUAL[parameter])

    def restart(self) -> None:
        """Begin again in a forked child: blocks of its parent's other threads do not end there."""
        self._lock = threading.Lock()
        if self._blocks:
            self._blocks = 0
            self._set(_USUAL)


_KEEPING_NOW = _Keeping()
os.register_at_fork(after_in_child=_KEEPING_NOW.restart)


@contextmanager
def keeping_freed_memory() -> Iterator[None]:
    """Have glibc keep what is freed inside for what is allocated next; after the last such block of any thread it
    keeps 256 MiB, and what lies below memory in use until :func:`give_back`. Nothing is done under another C library,
    or where the environment sets glibc's own variables.
    """
    _KEEPING_NOW.add(1)
    try:
        yield
    finally:
        _KEEPING_NOW.add(-1)


def give_back() -> None:
    """Have glibc give the system all memory that was freed."""
    _KEEPING_NOW.trim(0)
