"""Count the calls that change a file system, and strike at one of them."""

from __future__ import annotations

import errno
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

CHANGING_CALLS = ("mkdir", "open", "write", "fchmod", "fsync", "replace", "rename", "unlink", "rmdir")
GROWING_CALLS = ("mkdir", "open", "write", "fsync", "replace", "rename")
KILLED = -signal.SIGKILL

Strike = Callable[[str, Callable[..., Any], tuple[Any, ...]], None]


@contextmanager
def strike_at(step: int, strike: Strike, calls: tuple[str, ...] = CHANGING_CALLS) -> Iterator[None]:
    """Call ``strike`` before the changing call number ``step`` (from 0) and before each later one."""
    count = 0

    def wrapped(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            nonlocal count
            if name != "open" or args[1] & os.O_CREAT:
                if count >= step:
                    strike(name, original, args)
                count += 1
            return original(*args, **options)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in calls:
            patch.setattr(os, name, wrapped(name, getattr(os, name)))
        yield


def kill(name: str, original: Callable[..., Any], args: tuple[Any, ...]) -> None:
    """End this process as a power cut would; a write gets half way."""
    if name == "write":
        original(args[0], args[1][: len(args[1]) // 2])
    os.kill(os.getpid(), signal.SIGKILL)


def disk_full(name: str, original: Callable[..., Any], args: tuple[Any, ...]) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def in_child(function: Callable[[], object]) -> int:
    """Run ``function`` in a forked process; its exit code, negative for a signal."""
    process = multiprocessing.get_context("fork").Process(target=function)
    process.start()
    process.join()
    assert process.exitcode is not None
    return process.exitcode


def killed_at_each_step(function: Callable[[], object]) -> Iterator[int]:
    """Run ``function`` in processes that are killed at step 0, 1, 2 … until one gets through."""
    for step in range(1000):

        def run(step: int = step) -> None:
            with strike_at(step, kill):
                function()

        code = in_child(run)
        yield step
        if code == 0:
            return
        assert code == KILLED, f"step {step} ended with {code}"
    raise AssertionError("it never got through")
