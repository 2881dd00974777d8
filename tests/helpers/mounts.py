"""Processes of their own, and file systems that only they see."""

from __future__ import annotations

import ctypes
import errno
import multiprocessing
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from pipevault.store import marker

_NEW_MOUNTS, _NEW_USERS = 0x00020000, 0x10000000
_NO_MOUNTS = 99
_NOBODY = 65534


def in_child(function: Callable[[], object]) -> int:
    """Run ``function`` in a forked process; its exit code, negative for a signal."""
    process = multiprocessing.get_context("fork").Process(target=function)
    process.start()
    process.join()
    assert process.exitcode is not None
    return process.exitcode


def with_own_tmpfs(folder: Path, size: str, function: Callable[[], None]) -> None:
    """Run ``function`` in a process of its own in which ``folder`` is a tmpfs; skip where that is not allowed."""

    def run() -> None:
        libc, user = ctypes.CDLL(None), os.geteuid()
        if libc.unshare(_NEW_MOUNTS | (0 if user == 0 else _NEW_USERS)) != 0:
            os._exit(_NO_MOUNTS)
        if user != 0:
            Path("/proc/self/uid_map").write_text(f"0 {user} 1")
        mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(folder)]
        if subprocess.run(["mount", "--make-rprivate", "/"]).returncode or subprocess.run(mount).returncode:
            os._exit(_NO_MOUNTS)
        function()

    if sys.platform != "linux":
        pytest.skip("needs mount namespaces")
    folder.mkdir()
    code = in_child(run)
    if code == _NO_MOUNTS:
        pytest.skip("this user may not mount")
    assert code == 0


def as_user_without_permission(folder: Path, function: Callable[[], None]) -> None:
    """Run ``function`` as somebody who may read below ``folder`` and not write."""
    if os.geteuid() != 0:
        folders = [folder, *(path for path in folder.rglob("*") if path.is_dir())]
        for path in folders:
            path.chmod(0o555)
        try:
            function()
        finally:
            for path in folders:
                path.chmod(0o755)
        return

    def run() -> None:
        os.setgid(_NOBODY)
        os.setuid(_NOBODY)
        function()

    assert in_child(run) == 0


@contextmanager
def silent(folder: Path) -> Iterator[None]:
    """Make a folder whose marker blocks whoever reads it, as on a dead mount."""
    folder.mkdir(exist_ok=True)
    let_go, read_file = threading.Event(), marker.read_file  # type: ignore[attr-defined]

    def blocked(path: Path, **options: Any) -> bytes:
        if path.parent == folder:
            let_go.wait()
            raise OSError(errno.EHOSTDOWN, os.strerror(errno.EHOSTDOWN))
        return read_file(path, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(marker, "read_file", blocked)
        try:
            yield
        finally:
            let_go.set()
