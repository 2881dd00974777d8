"""Writing so that a reader sees the old file, the new file or none, and a crash leaves no half of one.

Order of each publication: write under a unique name, fsync the file, rename it into place, fsync the folder.
Every ``OSError`` on the way leaves as a :class:`~pipevault.errors.VaultError`.
"""

from __future__ import annotations

import errno
import hashlib
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipevault.digest import Digest
from pipevault.errors import PipevaultError, VaultError, VaultFullError, VaultNotWritableError
from pipevault.reading import open_regular

FOLDER_MODE = 0o755
"""Not writable for the group, whatever the umask: ``trust.check_ownership`` would refuse such a vault."""
SHARED_FOLDER_MODE = 0o2775
SHARED_FILE_MODE = 0o664

_COPY_SIZE_BYTES = 1 << 20
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_NOT_WRITABLE = frozenset({errno.EACCES, errno.EPERM, errno.EROFS})
_NO_FOLDER_FSYNC = frozenset({errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP})


@contextmanager
def vault_errors(path: Path, action: str) -> Iterator[None]:
    """Turn an ``OSError`` of the block into the fitting vault error about ``path``; ``action`` is a past
    participle.
    """
    try:
        yield
    except PipevaultError:  # some of them are OSErrors too
        raise
    except OSError as error:
        raise _translated(error, path, action) from error


def write_file(path: Path, data: bytes, *, mode: int = 0o644, staging: Path | None = None) -> None:
    """Replace or create ``path`` with ``data`` in one step; its folder must exist.

    The unique temporary file is written in ``staging`` (same file system as ``path``; default: the folder of
    ``path``) and removed on failure. Raises :class:`VaultFullError`, :class:`VaultNotWritableError`, or
    :class:`VaultError` for any other failure of the file system.
    """
    temporary = (staging or path.parent) / f".{path.name}.{os.getpid()}.{secrets.token_hex(8)}.tmp"
    with vault_errors(path, "written"):
        try:
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            try:
                _write_all(descriptor, data)
                _set_mode(descriptor, temporary, mode)
            finally:
                os.close(descriptor)
            publish_file(temporary, path)
        except BaseException:  # whatever it was goes on, an interrupt too; only the temporary file must go
            temporary.unlink(missing_ok=True)
            raise


def publish_file(source: Path, target: Path) -> None:
    """Move ``source`` to ``target`` on the same file system, durable once this returns; its folder must
    exist.

    Raises like :func:`write_file`; ``source`` then still exists.
    """
    with vault_errors(target, "written"):
        replace_durably(source, target)


def replace_durably(source: Path, target: Path) -> None:
    """Do what :func:`publish_file` does. Raises ``OSError``."""
    # Without the fsync before the rename, a power cut can leave the new name with the old or no content.
    _fsync_file(source)
    share_like_folder(source, target.parent)
    os.replace(source, target)
    fsync_folder(target.parent)


def create_file(path: Path, data: bytes, *, mode: int = 0o644, staging: Path) -> None:
    """Like :func:`write_file`, but ``FileExistsError`` if ``path`` is there: of two processes one gets it.

    A file system without hard links is only looked at before: there the later of two that race stays.
    """
    staged = staging / path.name
    write_file(staged, data, mode=mode)
    with vault_errors(path, "written"):
        share_like_folder(staged, path.parent)
        try:
            os.link(staged, path)
        except FileExistsError:
            staged.unlink()
            exists = True
        except OSError:
            exists = os.path.lexists(path)
            if not exists:
                os.replace(staged, path)
        else:
            staged.unlink()
            exists = False
        fsync_folder(path.parent)
    if exists:
        raise FileExistsError(path)


def copy_file(source: Path, target: Path, *, mode: int) -> tuple[Digest, int]:
    """Copy ``source`` to the new file ``target``; the digest and size in bytes of exactly what was written.

    An ``OSError`` in opening ``source`` is the caller's and passes; one in writing raises like
    :func:`write_file`.
    """
    hasher, size_bytes = hashlib.sha256(), 0
    with open_regular(source) as reader, vault_errors(target, "written"):
        descriptor = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            while chunk := reader.read(_COPY_SIZE_BYTES):
                hasher.update(chunk)
                size_bytes += len(chunk)
                _write_all(descriptor, chunk)
            _set_mode(descriptor, target, mode)
        finally:
            os.close(descriptor)
    return Digest(hasher.hexdigest()), size_bytes


def make_folder(folder: Path, *, alone: bool = False) -> None:
    """Create ``folder`` and its missing parents with :data:`FOLDER_MODE`, durably. Raises like
    :func:`write_file`. Unless it stands ``alone``, it is shared like the folder that it is made in.
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
    """Let the group use ``path`` as it may use ``folder``, in which it will stand: whatever the umask, in a vault that
    a group shares (``shared="group"``) folders have :data:`SHARED_FOLDER_MODE` and files :data:`SHARED_FILE_MODE`.
    """
    if is_shared(folder):
        os.chmod(path, SHARED_FOLDER_MODE if path.is_dir() else SHARED_FILE_MODE)


def is_shared(folder: Path) -> bool:
    """Return whether what is made in ``folder`` is its group's to change: it is set-group-ID and group-writable."""
    mode = os.stat(folder).st_mode
    return bool(mode & stat.S_ISGID and mode & stat.S_IWGRP)


def _translated(error: OSError, path: Path, action: str) -> VaultError:
    cause = error.strerror or str(error)
    if error.errno in _FULL:
        return VaultFullError(
            f"{path} could not be {action}: {cause}. The vault is unharmed; free space or raise the quota, "
            f"or "
            "give another folder.",
            path,
        )
    if error.errno in _NOT_WRITABLE:
        return VaultNotWritableError(
            f"{path} could not be {action}: {cause}. Give this user write permission there, or give another folder.",
            path,
        )
    return VaultError(f"{path} could not be {action}: {cause}. Check the folder and its file system.", path)


def _write_all(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def _set_mode(descriptor: int, path: Path, mode: int) -> None:
    if hasattr(os, "fchmod"):
        os.fchmod(descriptor, mode)
    else:
        path.chmod(mode)


def _fsync_file(path: Path) -> None:
    # Windows flushes only handles that may write.
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_folder(folder: Path) -> None:
    """Make what was created, renamed or removed in ``folder`` durable. Raises ``OSError``."""
    if os.name == "nt":  # folders cannot be opened there
        return
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network and FUSE file systems cannot fsync a folder; the rename is atomic there all the same.
        if error.errno not in _NO_FOLDER_FSYNC:
            raise
    finally:
        os.close(descriptor)
