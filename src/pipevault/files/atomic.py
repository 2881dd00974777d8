"""Writing so that a reader sees the old file, the new file or none, and a crash leaves no half of one.

Order of each publication: write under a unique name, fsync the file, rename it into place, fsync the folder.
:func:`replacing` and :func:`replace_durably` raise ``OSError``; the rest makes a :class:`~pipevault.errors.VaultError`
of it.
"""

from __future__ import annotations

import errno
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pipevault.digest import Digest, digest_chunks
from pipevault.errors import PipevaultError, VaultError, VaultFullError, VaultNotWritableError
from pipevault.reading import chunks, open_regular

FOLDER_MODE = 0o755
"""Not writable for the group, whatever the umask: ``check_ownership`` would refuse such a vault."""
FILE_MODE = 0o644
SHARED_FOLDER_MODE = 0o2775
SHARED_FILE_MODE = 0o664

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_NOT_WRITABLE = frozenset({errno.EACCES, errno.EPERM, errno.EROFS})
_NO_FOLDER_FSYNC = frozenset({errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP})


@contextmanager
def vault_errors(path: Path, action: str) -> Iterator[None]:
    """Turn an ``OSError`` of the block into the fitting vault error about ``path``; ``action`` is a past participle."""
    try:
        yield
    except PipevaultError:  # some of them are OSErrors too
        raise
    except OSError as error:
        text = f"{path} could not be {action}: {error.strerror or error}."
        if error.errno in _FULL:
            raise VaultFullError(
                f"{text} The vault is unharmed; free space or raise the quota, or give another folder.", path
            ) from error
        if error.errno in _NOT_WRITABLE:
            raise VaultNotWritableError(f"{text} Fix the permissions, or give another folder.", path) from error
        raise VaultError(f"{text} Check the folder and its file system.", path) from error


@contextmanager
def replacing(path: Path, *, staging: Path | None = None, durable: bool = True) -> Iterator[Path]:
    """Give a unique name, in ``staging`` or next to ``path``, for a new file, which takes the place of ``path`` when
    the block ends without an error. Unless ``durable``, it appears whole to other processes and may be lost in a power
    cut.
    """
    temporary = (staging or path.parent) / f".pipevault-{os.getpid()}-{secrets.token_hex(8)}.tmp"
    try:
        yield temporary
        if durable:
            replace_durably(temporary, path)
        else:
            os.replace(temporary, path)
    except BaseException:  # whatever it was goes on, an interrupt too; only the temporary file must go
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def replace_durably(source: Path, target: Path) -> None:
    """Move a file to ``target`` on the same file system; it is durable once this returns. Raises ``OSError``."""
    # Without the fsync before the rename, a power cut can leave the new name with the old or no content.
    _fsync(source)
    os.replace(source, target)
    fsync_folder(target.parent)


def publish_file(source: Path, target: Path) -> None:
    """Move ``source`` to ``target``, durably. Raises like :func:`write_file`; ``source`` then still exists."""
    with vault_errors(target, "written"):
        share_like_folder(source, target.parent)
        replace_durably(source, target)


def write_file(path: Path, data: bytes, *, staging: Path | None = None) -> None:
    """Replace or create ``path`` with ``data`` in one step, see :func:`replacing`; its folder must exist.
    :class:`VaultFullError`, :class:`VaultNotWritableError`, :class:`VaultError`.
    """
    with vault_errors(path, "written"), replacing(path, staging=staging) as temporary:
        mode = SHARED_FILE_MODE if is_shared(path.parent) else FILE_MODE
        with new_file(temporary, mode) as new:
            write_all(new, data)


def create_file(path: Path, data: bytes, *, staging: Path) -> None:
    """Like :func:`write_file`, but ``FileExistsError`` if ``path`` is there: of two processes one gets it. A file
    system without hard links is only looked at before: there the later of two that race stays.
    """
    staged = staging / path.name
    write_file(staged, data)
    exists = False
    with vault_errors(path, "written"):
        share_like_folder(staged, path.parent)
        try:
            os.link(staged, path)
        except FileExistsError:
            exists = True
        except OSError:
            exists = os.path.lexists(path)
            if not exists:
                os.replace(staged, path)
        fsync_folder(path.parent)
    if exists:
        raise FileExistsError(path)


@contextmanager
def new_file(path: Path, mode: int) -> Iterator[int]:
    """Give the descriptor of a new file, which is this user's alone until it has ``mode``, whatever the umask."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        yield descriptor
        os.fchmod(descriptor, mode)
    finally:
        os.close(descriptor)


def write_all(descriptor: int, data: bytes | memoryview) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def copy_file(source: Path, target: Path, *, mode: int) -> tuple[Digest, int]:
    """Copy ``source`` to the new file ``target``; return the digest and size in bytes of exactly what was written. An
    ``OSError`` in opening ``source`` passes; one in writing raises like :func:`write_file`.
    """
    with open_regular(source) as reader, vault_errors(target, "written"), new_file(target, mode) as new:
        digest = digest_chunks(chunks(reader), lambda piece: write_all(new, piece))
        return digest, os.fstat(new).st_size


def make_folder(folder: Path, *, alone: bool = False) -> None:
    """Create ``folder`` and its missing parents, durably. Raises like :func:`write_file`. Unless it stands ``alone``,
    it is shared like the folder that it is made in.
    """
    with vault_errors(folder, "created"):
        if folder.is_dir():
            return
        if folder.parent != folder:
            make_folder(folder.parent, alone=alone)
        try:
            os.mkdir(folder, FOLDER_MODE)
            if not alone:
                share_like_folder(folder, folder.parent)
        except FileExistsError:
            if not folder.is_dir():
                raise
        fsync_folder(folder.parent)


def share_like_folder(path: Path, folder: Path) -> None:
    """Let the group use ``path`` as it may use ``folder``, in which it will stand, whatever the umask."""
    if is_shared(folder):
        os.chmod(path, SHARED_FOLDER_MODE if path.is_dir() else SHARED_FILE_MODE)


def is_shared(folder: Path) -> bool:
    """Return whether what is made in ``folder`` is its group's to change: it is set-group-ID and group-writable."""
    mode = os.stat(folder).st_mode
    return bool(mode & stat.S_ISGID and mode & stat.S_IWGRP)


def fsync_folder(folder: Path) -> None:
    """Make what was created, renamed or removed in ``folder`` durable. Raises ``OSError``."""
    try:
        _fsync(folder)
    except OSError as error:
        # Some network and FUSE file systems cannot fsync a folder; the rename is atomic there all the same.
        if error.errno not in _NO_FOLDER_FSYNC:
            raise


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
