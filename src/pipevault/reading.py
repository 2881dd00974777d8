"""Reading files that anybody may have put there: only regular ones, and only so much of them.

A named pipe would block for ever, a device give bytes without end, and a large file fill the memory.
"""

from __future__ import annotations

import errno
import io
import os
import stat
from collections.abc import Iterator
from pathlib import Path

DOCUMENT_LIMIT_BYTES = 16 << 20
"""The most that a document may have; real ones have a thousandth of it."""
SAFE_FLAGS = os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
"""A named pipe is opened at once, and a terminal does not become this process's own."""
_CHUNK_BYTES = 1 << 20


def open_regular(path: Path | str, *, follow_links: bool = True) -> io.FileIO:
    """Open a regular file, unbuffered. ``OSError`` for anything else, at once."""
    descriptor = os.open(path, os.O_RDONLY | SAFE_FLAGS | (0 if follow_links else os.O_NOFOLLOW))
    # Before FileIO, which leaves the descriptor of a folder open and does not name the folder.
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        return io.FileIO(descriptor)
    os.close(descriptor)
    raise OSError(errno.EINVAL, "it is not a regular file", str(path))


def open_place(path: Path) -> int:
    """Open what stands at ``path``, a folder too, to look at it or lock it. ``OSError``, also for a link."""
    return os.open(path, os.O_RDONLY | SAFE_FLAGS | os.O_NOFOLLOW)


def read_file(path: Path | str, *, limit_bytes: int = DOCUMENT_LIMIT_BYTES, follow_links: bool = True) -> bytes:
    """Return the bytes of a regular file. ``OSError`` for anything else, and for more than ``limit_bytes``."""
    return read_open(open_regular(path, follow_links=follow_links), path, limit_bytes=limit_bytes)


def read_open(file: io.FileIO, path: Path | str, *, limit_bytes: int = DOCUMENT_LIMIT_BYTES) -> bytes:
    """Return the bytes of an open regular file, and close it. ``OSError`` if it has more than ``limit_bytes``."""
    with file:
        size_bytes = os.fstat(file.fileno()).st_size
        if size_bytes <= limit_bytes:
            # A small piece for a small file; one that grows meanwhile ends with the limit too.
            data = b"".join(chunks(file, limit_bytes + 1, min(size_bytes + 1, _CHUNK_BYTES)))
            if len(data) <= limit_bytes:
                return data
    raise OSError(errno.EINVAL, f"it has more than {limit_bytes} bytes", str(path))


def chunks(file: io.RawIOBase, most_bytes: int | None = None, piece_bytes: int = _CHUNK_BYTES) -> Iterator[bytes]:
    """Read ``file`` piece by piece, to its end or until ``most_bytes`` were read."""
    left_bytes = most_bytes
    while left_bytes != 0:
        chunk = file.read(piece_bytes if left_bytes is None else min(piece_bytes, left_bytes))
        if not chunk:
            return
        if left_bytes is not None:
            left_bytes -= len(chunk)
        yield chunk


def stamp_of(status: os.stat_result) -> str:
    """Return a text that changes when the file does."""
    return f"{status.st_mtime_ns} {status.st_ctime_ns} {status.st_ino} {status.st_size}"
