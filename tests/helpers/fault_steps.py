"""Count the calls that change a file system, and strike at one of them."""

from __future__ import annotations

import errno
import os
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from helpers.mounts import in_child

CHANGING_CALLS = (
    *("mkdir", "open", "write", "fchmod", "fsync", "replace", "rename", "link", "utime", "unlink", "rmdir"),
    *("chmod", "truncate", "ftruncate", "symlink"),
)
"""Of the module ``os``. That these are all: test_crash.py."""
GROWING_CALLS = ("mkdir", "open", "write", "fsync", "replace", "rename", "link")
KILLED = -signal.SIGKILL
AUDITED = {
    **{"os.mkdir": ("mkdir",), "os.rename": ("replace", "rename"), "os.remove": ("unlink",), "os.rmdir": ("rmdir",)},
    **{"os.link": ("link",), "os.symlink": ("symlink",), "os.utime": ("utime",), "os.chmod": ("chmod", "fchmod")},
    **{"os.truncate": ("truncate", "ftruncate"), "open": ("open",)},
    **dict.fromkeys(("os.chown", "os.setxattr", "os.removexattr", "os.mkfifo", "os.mknod", "shutil.chown"), ()),
}
"""Events that the interpreter reports whoever calls, and the counted calls that explain them."""
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC

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


def killed_at_each_step(function: Callable[[], object]) -> Iterator[int]:
    """Run ``function`` in processes that are killed at step 0, 1, 2 … until one gets through."""
    for step in range(1000):

        def run(step: int = step) -> None:
            with strike_at(step, kill):
                function()

        code = in_child(run)
        yield step
        if code == 0:
            assert step, "no step was ever reached"
            return
        assert code == KILLED, f"step {step} ended with {code}"
    raise AssertionError("it never got through")


def uncounted_changes(function: Callable[[], object]) -> int:
    """Run ``function`` in a process of its own and compare the changes that the interpreter reports with those that
    :func:`strike_at` counts; the exit code, 0 if they agree.

    Writes and fsyncs are not reported; they need a descriptor, and opening one is.
    """

    def run() -> None:
        counted: Counter[str] = Counter()
        reported: Counter[str] = Counter()
        on = False

        def report(event: str, args: tuple[Any, ...]) -> None:
            if not on or event not in AUDITED:
                return
            if event == "open" and not args[2] & _WRITING:
                return
            reported[event] += 1

        def count(name: str, original: Callable[..., Any], args: tuple[Any, ...]) -> None:
            counted[name] += 1

        sys.addaudithook(report)
        with strike_at(0, count):
            on = True
            function()
            on = False
        explained = {event: sum(counted[name] for name in names) for event, names in AUDITED.items()}
        assert {event: reported[event] for event in AUDITED} == explained
        assert sum(explained.values()) > 0

    return in_child(run)
