"""Files that are held open with verified bytes: what was verified is what is used.

A path that is hashed and then opened again may lead to another file by then. So a file is opened once; its kind, owner,
mode and digest are read from that descriptor, and whoever needs a path is given that of the descriptor. Where somebody
else could write to the file meanwhile, its bytes are copied to memory while they are hashed, and sealed there
(memfd_create(2)); where that cannot be had, or a process may not look into its own ``/proc/self/fd`` (it gave up its
user without another ``exec``), to a private folder.
"""

from __future__ import annotations

import errno
import fcntl
import io
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from pipevault.digest import Digest, digest_chunks
from pipevault.errors import CorruptEntryError
from pipevault.files.atomic import write_all
from pipevault.files.scratch import kept_scratch_folder
from pipevault.reading import chunks, open_regular

_DESCRIPTORS = (Path("/proc/self/fd"), Path("/dev/fd"))
_MFD_EXEC = 0x0010
"""Linux 6.3: the copy may be mapped as code whatever ``vm.memfd_noexec`` has as the default."""

Question = Callable[[int, os.stat_result], bool]


class OpenedFile:
    """A file held open, or a copy of its bytes. ``origin`` is where it was found, for messages."""

    def __init__(self, file: io.FileIO, origin: Path, *, private: Path | None = None) -> None:
        """Take over ``file``; ``private`` is the path of a copy in a folder that no other user can open."""
        self._file = file
        self.origin = origin
        self._private = private

    @property
    def path(self) -> Path:
        """The path of the very file that is held, valid while it is. Where a process has no paths of its descriptors,
        that where it was found, of a file that only this user and root can change.
        """
        return self._private or _descriptor_path(self._file) or self.origin

    def duplicate(self) -> OpenedFile:
        """Hold the same file by a descriptor of its own."""
        if self._private is not None:
            return self.copied()
        return OpenedFile(io.FileIO(os.dup(self._file.fileno())), self.origin)

    def copied(self) -> OpenedFile:
        """Copy the bytes: for a file system from which no code may be mapped. Raises ``OSError``."""
        copy, path = _new_copy(self.origin.name)
        try:
            self._file.seek(0)
            for piece in chunks(self._file):
                write_all(copy.fileno(), piece)
            _seal(copy)
        except BaseException:  # whatever it was goes on
            copy.close()
            raise
        return OpenedFile(copy, self.origin, private=path)

    def close(self) -> None:
        self._file.close()
        if self._private is not None:
            shutil.rmtree(self._private.parent, ignore_errors=True)

    def __enter__(self) -> OpenedFile:
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()


def open_verified(
    path: Path,
    digest: Digest,
    size_bytes: int | None = None,
    *,
    what: str,
    is_changeable: Question = lambda descriptor, status: False,
) -> OpenedFile:
    """Open ``path`` and verify its bytes; ``what`` names it in errors. :class:`~pipevault.errors.CorruptEntryError`: it
    is missing, unreadable, no regular file, or has other bytes than ``digest`` and ``size_bytes`` say.

    ``is_changeable`` is asked whether somebody else could write to the open file while it is in use, and may raise.
    """
    with ExitStack() as stack:
        file = stack.enter_context(_open(path, what))
        status, opened = os.fstat(file.fileno()), OpenedFile(file, path)
        if is_changeable(file.fileno(), status):
            copy, private = _new_copy(path.name)
            opened = stack.enter_context(OpenedFile(copy, path, private=private))
        if size_bytes is not None and status.st_size != size_bytes:
            raise CorruptEntryError(
                f"{what} is damaged: {path} has {status.st_size} bytes instead of {size_bytes}.", path
            )
        is_copy = opened._file is not file
        sinks = [partial(write_all, opened._file.fileno())] if is_copy else []
        found = digest_chunks(_pieces(file, path, what, status.st_size), *sinks)
        if found != digest:
            raise CorruptEntryError(
                f"{what} is damaged: the bytes of {path} have digest {found.short}, not {digest.short}.", path
            )
        if is_copy:
            _seal(opened._file)
        stack.pop_all()
    if is_copy:
        file.close()
    return opened


def _open(path: Path, what: str) -> io.FileIO:
    try:
        return open_regular(path)
    except FileNotFoundError as error:
        raise CorruptEntryError(f"{what} is missing: {path}.", path) from error
    except OSError as error:
        reason = "is damaged" if error.errno == errno.EINVAL else "cannot be read"
        raise CorruptEntryError(f"{what} {reason}: {path}: {error.strerror}.", path) from error


def _pieces(file: io.FileIO, path: Path, what: str, size_bytes: int) -> Iterator[bytes]:
    """At most one byte more than ``size_bytes``: a file that grows must not fill the memory."""
    try:
        yield from chunks(file, size_bytes + 1)
    except OSError as error:
        raise CorruptEntryError(f"{what} cannot be read: {path}: {error.strerror}.", path) from error


def _new_copy(name: str) -> tuple[io.FileIO, Path | None]:
    file = _memory_file(name)
    if file is not None and _descriptor_path(file) is not None:
        return file, None
    if file is not None:
        file.close()
    path = kept_scratch_folder() / name
    return io.FileIO(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o500), "r+b"), path


def _memory_file(name: str) -> io.FileIO | None:
    if sys.platform != "linux":
        return None
    flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING
    for more in (_MFD_EXEC, 0):
        try:
            return io.FileIO(os.memfd_create(name, flags | more), "r+b")
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.EPERM, errno.EACCES):
                raise
    return None


def _descriptor_path(file: io.FileIO) -> Path | None:
    for folder in _DESCRIPTORS:
        path = folder / str(file.fileno())
        if os.access(path, os.R_OK):
            return path
    return None


def _seal(file: io.FileIO) -> None:
    """Take everybody's right to change the bytes, this process's too."""
    if sys.platform == "linux":
        try:
            fcntl.fcntl(
                file.fileno(),
                fcntl.F_ADD_SEALS,
                fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL,
            )
        except OSError as error:
            if error.errno != errno.EINVAL:  # not in memory, but without a name: nobody else can open it
                raise
