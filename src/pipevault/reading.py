"""Reading files that anybody may have put there: only regular ones, and only so much of them.

A named pipe would block for ever, a device give bytes without end, and a large file fill the memory.
"""

from __future__ import annotations

import errno
import io
import os
import stat
from pathlib import Path

DOCUMENT_LIMIT_BYTES = 16 << 20
"""The most that a document may have; real ones have a thousandth of it."""

# O_NONBLOCK: a named pipe is opened at once; O_NOCTTY: a terminal does not become this process's own.
_FLAGS = os.O_RDONLY | sum(getattr(os, name, 0) for name in ("O_NONBLOCK", "O_NOCTTY", "O_CLOEXEC", "O_BINARY"))


def open_regular(path: Path, *, follow_links: bool = True) -> io.FileIO:
    """Open a regular file, unbuffered. ``OSError`` for anything else, at once."""
    descriptor = os.open(path, _FLAGS | (0 if follow_links else getattr(os, "O_NOFOLLOW", 0)))
    # Before FileIO, which leaves the descriptor of a folder open and does not name the folder.
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        return io.FileIO(descriptor)
    os.close(descriptor)
    raise OSError(errno.EINVAL, "it is not a regular file", str(path))


def read_file(path: Path, *, limit_bytes: int = DOCUMENT_LIMIT_BYTES, follow_links: bool = True) -> bytes:
    """The bytes of a regular file. ``OSError`` for anything else, and for a file of more than ``limit_bytes``."""
    return read_open(open_regular(path, follow_links=follow_links), path, limit_bytes=limit_bytes)


def read_open(file: io.FileIO, path: Path, *, limit_bytes: int = DOCUMENT_LIMIT_BYTES) -> bytes:
    """The bytes of an open regular file, which is closed. ``OSError`` if it has more than ``limit_bytes``."""
    with file:
        if os.fstat(file.fileno()).st_size <= limit_bytes:
            data = _read(file, limit_bytes + 1)
            if len(data) <= limit_bytes:
                return data
    raise OSError(errno.EINVAL, f"it has more than {limit_bytes} bytes", str(path))


def stamp_of(status: os.stat_result) -> str:
    """A text that changes when the file does."""
    return f"{status.st_mtime_ns} {status.st_ctime_ns} {status.st_ino} {status.st_size}"


def _read(file: io.FileIO, most_bytes: int) -> bytes:
    """A file that grows meanwhile ends with the limit too."""
    chunks = []
    while most_bytes and (chunk := file.read(most_bytes)):
        chunks.append(chunk)
        most_bytes -= len(chunk)
    return b"".join(chunks)
