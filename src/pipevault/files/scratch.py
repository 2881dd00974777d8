"""Private folders in the system's temporary folder, each held by a lock beside it: ``<folder>.lock``.

The system frees the lock of a process that dies, so that what it left can be told apart and removed.
"""

from __future__ import annotations

import atexit
import os
import secrets
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path


@contextmanager
def scratch_folder(purpose: str, name: str) -> Iterator[Path]:
    """The empty folder ``pipevault-<purpose>-<name>``, removed at exit; ``name``: 32 hexadecimal digits.

    ``OSError`` if another process works in it, another user owns it, or it cannot be made.
    """
    from filelock import FileLock, Timeout

    folder = Path(tempfile.gettempdir()) / f"pipevault-{purpose}-{name}"
    lock = FileLock(f"{folder}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout as error:  # its own words name the lock alone
        raise OSError(f"{folder} is in use") from error
    try:
        _make_private(folder)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    finally:
        # While the lock is held: later, the file may be another process's lock already.
        Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()


def kept_scratch_folder() -> Path:
    """A folder that stays until the process ends."""
    stack = ExitStack()
    atexit.register(stack.close)
    return stack.enter_context(scratch_folder("graphs", secrets.token_hex(16)))


def _make_private(folder: Path) -> None:
    """Make ``folder`` anew; what a dead process left there may be torn."""
    try:
        status = folder.lstat()
    except FileNotFoundError:
        pass
    else:
        if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid():
            raise OSError(f"{folder} is not this user's folder")
        shutil.rmtree(folder)
    folder.mkdir(mode=0o700)
