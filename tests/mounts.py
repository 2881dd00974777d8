"""Processes of their own, and file systems that only they see."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

_NEW_MOUNTS, _NEW_USERS = 0x00020000, 0x10000000
_NO_MOUNTS = 99


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
