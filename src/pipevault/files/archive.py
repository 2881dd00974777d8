"""A folder of files as one: a plain tar whose bytes depend on names and contents alone."""

from __future__ import annotations

import os
import tarfile
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

from pipevault.errors import CorruptEntryError
from pipevault.files.atomic import replacing

_MODE = 0o600
_EXECUTABLE_MODE = 0o700


def pack_files(files: Mapping[str, Path], target: Path) -> None:
    """Write ``files``, by relative name, to the archive ``target``."""
    with tarfile.open(target, "w", format=tarfile.PAX_FORMAT) as archive:
        for name, path in sorted(files.items()):
            with open(path, "rb") as file:
                member = tarfile.TarInfo(name)
                status = os.fstat(file.fileno())
                member.size = status.st_size
                member.mode = _EXECUTABLE_MODE if status.st_mode & 0o100 else _MODE
                archive.addfile(member, file)


def unpack_files(archive: Path, folder: Path) -> tuple[str, ...]:
    """Write the files of ``archive`` below ``folder``; one that is there stays. Return their names.
    :class:`CorruptEntryError` for anything but plain files with relative names, before any is written.
    """
    try:
        with tarfile.open(archive, "r:") as opened:
            members = opened.getmembers()
            for member in members:
                if not member.isreg() or not _is_inside(member.name):
                    raise CorruptEntryError(f"{archive} holds {member.name!r}, not a plain file in it.", archive)
            for member in members:
                path = folder / member.name
                if path.exists():
                    continue
                path.parent.mkdir(parents=True, exist_ok=True)
                content = opened.extractfile(member)
                assert content is not None
                # Another thread may look for the file meanwhile, so it appears whole.
                with replacing(path, durable=False) as temporary:
                    temporary.write_bytes(content.read())
                    temporary.chmod(member.mode & _EXECUTABLE_MODE)
            return tuple(member.name for member in members)
    except tarfile.TarError as error:
        raise CorruptEntryError(f"{archive} is not an archive: {error}.", archive) from error


def _is_inside(name: str) -> bool:
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts and "\\" not in name and bool(path.parts)
