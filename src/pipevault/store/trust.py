"""Whether a file may be trusted before native code is loaded from it: who owns it, and who else could change it.

From the file up to the vault's folder, everything must belong to this user or to root, and nobody else may write it.
For the folders above, up to ``/``, the same holds, but for one case: a folder with the sticky bit, such as ``/tmp``, is
safe although everyone may write it, because the kernel lets only the owner of what is in it (and of the folder, and
root) rename or remove that (inode(7), ``S_ISVTX``), and the owner of what is in it is checked in the same walk. Inside
the vault the sticky bit excuses nothing: there anyone could still add files.

The walk is that of OpenSSH's ``safe_path`` (misc.c), which knows no sticky folders; that case is taken from Kupsch and
Miller, "How to Open a File and Not Get Hacked" (2008), and their library safefile.

Links on the way to the vault are followed first: what counts is where the folder really is. A hard link is not looked
for: whoever may not write a file may not write it through another name either, and to place one in the vault takes
permission to write the vault. Access control lists of POSIX show in the group's bits of the mode.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from pipevault.errors import UnsafeVaultError
from pipevault.files.file_systems import is_local

_OVERFLOW_ID_FILE = Path("/proc/sys/kernel/overflowuid")


def check_ownership(path: Path, *, root: Path, allow_group_write: bool = False) -> None:
    """Raise unless only this user or root can change the regular file ``path`` under the vault's ``root``.

    The folders above ``root`` are the business of :func:`check_root`. :class:`UnsafeVaultError` names what is unsafe
    and the command that mends it; ``OSError`` (``FileNotFoundError`` and the like) if something cannot be looked at.
    Systems without POSIX owners are not checked.
    """
    if not hasattr(os, "geteuid"):
        return
    if not path.is_relative_to(root) or ".." in path.parts:
        raise UnsafeVaultError(f"{path} lies outside the vault {root}: load only files of the vault.", path)
    target = _check_chain(path, root, allow_group_write)
    if target != path:
        _check_chain(target, Path(os.path.realpath(root)), allow_group_write)
    if not stat.S_ISREG(os.lstat(target).st_mode):
        raise UnsafeVaultError(f"{path} is no regular file. Remove it: rm -r {path}", path)


def is_changeable(descriptor: int, status: os.stat_result) -> bool:
    """Return whether anybody but this user and root could write to an open file: by its owner, by its mode, or because
    other machines may write to its file system.
    """
    if not hasattr(os, "geteuid"):
        return False
    is_mine = status.st_uid in (os.geteuid(), 0)
    return not is_mine or bool(status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)) or not is_local(descriptor)


def check_root(root: Path, *, allow_group_write: bool = False) -> None:
    """The same for the vault's folder and those above it.

    Worth it before an entry is frozen that could not be loaded. ``allow_group_write`` holds for the folders above too.
    """
    if not hasattr(os, "geteuid"):
        return
    resolved = Path(os.path.realpath(root))
    _check_status(root, os.stat(resolved), allow_group_write)
    for place in resolved.parents:
        _check_parent(place, resolved, os.lstat(place), allow_group_write)


def check_lone_file(path: Path) -> None:
    """The same for a regular file outside any vault, such as one with a trusted key, and the folders above it."""
    if not hasattr(os, "geteuid"):
        return
    resolved = Path(os.path.realpath(path))
    status = os.stat(resolved)
    if not stat.S_ISREG(status.st_mode):
        raise UnsafeVaultError(f"{path} is no regular file.", path)
    _check_status(path, status, allow_group_write=False)
    for place in resolved.parents:
        _check_parent(place, resolved, os.lstat(place), allow_group_write=False)


def _check_chain(path: Path, root: Path, allow_group_write: bool) -> Path:
    """Check ``path`` and its parents up to ``root``; where the path leads once links are followed."""
    place, has_link = path, False  # the root itself may be reached through a link
    while True:
        status = os.stat(place) if place == root else os.lstat(place)
        if stat.S_ISLNK(status.st_mode):
            has_link = True
        else:
            _check_status(place, status, allow_group_write)
        if place == root:
            break
        place = place.parent
    if not has_link:
        return path
    resolved = path.resolve(strict=True)
    if not resolved.is_relative_to(root.resolve()):
        raise UnsafeVaultError(f"{path} is a link that leads outside the vault, to {resolved}. Remove it.", path)
    return resolved


def _check_status(place: Path, status: os.stat_result, allow_group_write: bool) -> None:
    user = os.geteuid()
    if status.st_uid not in (user, 0):
        raise UnsafeVaultError(
            f"{place} belongs to {_owner_text(status.st_uid)}, neither to this user ({user}) nor to root, so it is "
            f"not trusted and no code is loaded. If you trust it: chown {user} {place}",
            place,
        )
    if who := _other_writers(status.st_mode, allow_group_write):
        mend = "o-w" if allow_group_write else "go-w"
        raise UnsafeVaultError(
            f"{place} can be written by {who} (mode {stat.S_IMODE(status.st_mode):04o}), so it is not trusted and no "
            f"code is loaded. If you trust what is in it: chmod {mend} {place}",
            place,
        )


def _check_parent(place: Path, child: Path, status: os.stat_result, allow_group_write: bool) -> None:
    """``place``, above ``child``. What it may do is replace what is below, not change it: hence the sticky bit."""
    user = os.geteuid()
    if status.st_uid not in (user, 0):
        raise UnsafeVaultError(
            f"{place}, above {child}, belongs to {_owner_text(status.st_uid)}, neither to this user ({user}) nor to "
            f"root. Its owner could put another folder in place of this one, so no code is loaded. {_advice(place)}",
            place,
        )
    if status.st_mode & stat.S_ISVTX:
        return
    if who := _other_writers(status.st_mode, allow_group_write):
        mend = "chmod o-w" if allow_group_write else "chmod go-w"
        condition = (
            "If you trust what is there now" if who == "others" else "Set allow_group_write if you trust it, or run"
        )
        raise UnsafeVaultError(
            f"{place}, above {child}, can be written by {who} (mode {stat.S_IMODE(status.st_mode):04o}), who could put "
            f"another folder in place of this one, so no code is loaded. {condition}: {mend} {place}",
            place,
        )


def _other_writers(mode: int, allow_group_write: bool) -> str:
    if mode & stat.S_IWOTH:
        return "others"
    return "its group" if mode & stat.S_IWGRP and not allow_group_write else ""


def _owner_text(user: int) -> str:
    if user != _overflow_id():
        return f"user {user}"
    return f"user {user}, which may stand for an owner that this container or file server does not map to one here"


def _advice(place: Path) -> str:
    if place == place.parent:
        return (
            f"If you trust it: chown root {place} where the container's image is built, or map the owner to root or to "
            "this user where the container is started."
        )
    return f"If you trust it: chown root {place}; else move to a folder of your own."


def _overflow_id() -> int:
    """What owners are shown as that have no number here, in a user namespace or on NFS: see user_namespaces(7)."""
    try:
        return int(_OVERFLOW_ID_FILE.read_bytes())
    except (OSError, ValueError):  # no Linux, or no /proc: the number that all kernels ship with
        return 65534
