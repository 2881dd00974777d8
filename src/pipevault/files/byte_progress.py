"""Progress of work on many bytes."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[int, int], None]
"""Called with the bytes done so far and the bytes in all."""


def ignore_progress(done_bytes: int, total_bytes: int) -> None:
    """Do nothing."""
