"""Ctrl-C: one line and exit code 130, whatever it strikes; a second one ends a process that does not end by itself."""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType

from pipevault.cli.exits import Exit

_told = False


def catch_interrupts() -> None:
    """Have the first Ctrl-C raise :class:`KeyboardInterrupt`, so that commands tidy up, and the next one end all."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell asks for what runs in the background
        return
    signal.signal(signal.SIGINT, _raise)
    sys.unraisablehook = _end_if_swallowed


def has_struck() -> bool:
    """Tell whether Ctrl-C was pressed: an import that it struck may have raised another error instead."""
    return signal.getsignal(signal.SIGINT) is _end


def tell_interrupted() -> Exit:
    global _told
    if not _told:
        _told = True
        os.write(2, b"pipevault: interrupted\n")
    return Exit.INTERRUPTED


def _raise(number: int, frame: FrameType | None) -> None:
    signal.signal(signal.SIGINT, _end)
    raise KeyboardInterrupt


def _end(number: int = signal.SIGINT, frame: FrameType | None = None) -> None:
    os._exit(tell_interrupted())


def _end_if_swallowed(unraisable: sys.UnraisableHookArgs) -> None:
    """End the process where nothing can be raised, as in a finalizer: Python would print the stack and go on."""
    if isinstance(unraisable.exc_value, KeyboardInterrupt):
        _end()
    sys.__unraisablehook__(unraisable)
