"""Private temporary folders to compile in: where they may lie, and how they end.

Compilers are called through command lines that a path with a blank or a quote in it does not survive, and what they
make is run where it lies. So a folder that is named for temporary files may be of no use here; then the next is taken.
"""

from __future__ import annotations

import atexit
import os
import re
import secrets
import stat
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from pipevault.errors import TemporaryFolderError, TemporaryFolderFullError
from pipevault.files.claims import Claim, claim_folder, remove_abandoned

ROOM_NEEDED_BYTES = 32_000_000

_VARIABLES = ("TMPDIR", "TEMP", "TMP")
_USUAL = ("/tmp", "/var/tmp", "/usr/tmp")
_NAME = re.compile(r"pipevault\.[a-z]+\.[0-9a-f]{32}")
_UNSAFE = re.compile(r"[^\w./+=:@%,-]")
_TRIES = 3


@dataclass(frozen=True)
class Place:
    """A folder for temporary files. ``problem``: a clause that says why nothing can be compiled in it, else empty.
    ``is_named``: a variable or the program names it.
    """

    folder: Path
    problem: str = ""
    is_full: bool = False
    is_named: bool = False


@contextmanager
def scratch_folder(purpose: str, name: str = "") -> Iterator[Path]:
    """Make the empty folder ``pipevault.<purpose>.<name>``, removed at exit; ``name``: 32 digits, else random.

    ``FileExistsError``: another process works in it, or another user owns it. :class:`TemporaryFolderError`: nowhere
    can one be made; :class:`TemporaryFolderFullError`: for want of room.
    """
    root = scratch_root()
    for left in scratch_folders(root):
        remove_abandoned(left)
    path = root / f"pipevault.{purpose}.{name or secrets.token_hex(16)}"
    claim = _claim(path)
    try:
        yield path
    finally:
        claim.release()


def kept_scratch_folder() -> Path:
    """Make a folder that stays until the process ends. Raises like :func:`scratch_folder`."""
    stack = ExitStack()
    atexit.register(stack.close)
    return stack.enter_context(scratch_folder("kept"))


def scratch_root() -> Path:
    """Return the first folder of :func:`scratch_places` that can be used. Raises like :func:`scratch_folder`."""
    places = scratch_places()
    for place in places:
        if not place.problem:
            return place.folder
    cls = TemporaryFolderFullError if any(place.is_full for place in places) else TemporaryFolderError
    problems = "; ".join(f"{place.folder} {place.problem}" for place in places)
    raise cls(
        f"No temporary folder can be used to compile in: {problems}. Set TMPDIR to a folder that this user can "
        f"write, on a file system that is not mounted noexec, with {ROOM_NEEDED_BYTES // 1_000_000} MB free and a name "
        "without blanks or quotes; or load what was frozen already, which needs none.",
        places[0].folder,
    )


def scratch_places() -> list[Place]:
    """List the folders named for temporary files, then the system's usual ones, each with what is wrong with it."""
    with suppress(OSError):  # remembered by the library before a compilation sets TMPDIR for a while
        tempfile.gettempdir()
    named = [tempfile.tempdir, *(os.environ.get(variable) for variable in _VARIABLES)]
    unique = dict.fromkeys(Path(os.path.abspath(folder)) for folder in named if folder)
    usual = [folder for folder in map(Path, _USUAL) if folder.exists() and folder not in unique]
    return [*(replace(_problem(folder), is_named=True) for folder in unique), *map(_problem, usual)]


def scratch_folders(root: Path) -> list[Path]:
    """List this user's folders in ``root`` that :func:`scratch_folder` made, sorted; of living processes too."""
    try:
        names = sorted(os.listdir(root))
    except OSError:
        return []
    return [root / name for name in names if _NAME.fullmatch(name) and _is_own_folder(root / name)]


def is_fit_for_code(folder: Path) -> bool:
    """Return whether code can be compiled in ``folder`` and run from it, and this user alone can change it."""
    return not _problem(folder).problem and _is_own_folder(folder)


def _problem(folder: Path) -> Place:
    if unsafe := _UNSAFE.search(os.fspath(folder)):
        return Place(folder, f"has {unsafe[0]!r} in its name, which command lines of compilers do not survive")
    if not folder.is_dir():
        return Place(folder, "is not a folder" if folder.exists() else "does not exist")
    try:
        status = os.statvfs(folder)
    except OSError as error:
        return Place(folder, f"cannot be looked at ({error.strerror})")
    if status.f_flag & os.ST_RDONLY:
        return Place(folder, "is on a read-only file system")
    if not os.access(folder, os.W_OK | os.X_OK):
        return Place(folder, "cannot be written by this user")
    if status.f_flag & getattr(os, "ST_NOEXEC", 0):
        return Place(folder, "is on a file system mounted noexec, from which no compiled code is run")
    owner = os.stat(folder)
    if owner.st_uid not in (os.geteuid(), 0) or (owner.st_mode & 0o022 and not owner.st_mode & stat.S_ISVTX):
        return Place(folder, "can be changed by other users, who could replace what is made in it (chmod +t)")
    free_bytes = status.f_bavail * status.f_frsize
    if status.f_blocks and free_bytes < ROOM_NEEDED_BYTES:
        return Place(folder, f"has only {free_bytes // 1_000_000} MB free", is_full=True)
    return Place(folder)


def _claim(path: Path) -> Claim:
    for _ in range(_TRIES):
        try:
            claim = claim_folder(path)
        except FileExistsError as error:
            if not _is_own_folder(path):
                raise FileExistsError(f"{path} is not this user's folder") from error
            if not remove_abandoned(path):
                raise FileExistsError(f"{path} is in use") from error
            continue
        except OSError as error:
            raise TemporaryFolderError(f"{path} cannot be made: {error.strerror}. Set TMPDIR.", path.parent) from error
        if claim is not None:
            return claim
    raise FileExistsError(f"{path} is in use")


def _is_own_folder(path: Path) -> bool:
    try:
        status = path.lstat()
    except OSError:
        return False
    return stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid()
