"""Whether a file may be trusted before native code is loaded from it: who owns it, and who else could change
it.

Checked from the file up to the vault's root; folders above the root are the administrator's.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from pipevault.errors import UnsafeVaultError


def check_ownership(path: Path, *, root: Path, allow_group_write: bool = False) -> None:
    """Raise unless only this user or root can change the regular file ``path`` under the vault's ``root``.

    :class:`UnsafeVaultError` names what is unsafe and the command that mends it; ``OSError``
    (``FileNotFoundError`` and the like) if something cannot be looked at. Systems without POSIX owners are
    not checked.
    """
    if not hasattr(os, "geteuid"):
        return
    if not path.is_relative_to(root) or ".." in path.parts:
        raise UnsafeVaultError(f"{path} lies outside the vault {root}: load only files of the vault.", path)
    target = _check_chain(path, root, allow_group_write)
    if target != path:
        _check_chain(target, root, allow_group_write)
    if not stat.S_ISREG(os.lstat(target).st_mode):
        raise UnsafeVaultError(f"{path} is no regular file. Remove it: rm -r {path}", path)


def check_root(root: Path, *, allow_group_write: bool = False) -> None:
    """The same for the vault's folder alone: worth it before an entry is frozen that could not be loaded."""
    if hasattr(os, "geteuid"):
        _check_status(root, os.stat(root), allow_group_write)


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
    mode = stat.S_IMODE(status.st_mode)
    user = os.geteuid()
    if status.st_uid not in (user, 0):
        raise UnsafeVaultError(
            f"{place} belongs to user {status.st_uid}, neither to this user ({user}) nor to root, so its "
            f"code is not "
            f"loaded. If you trust it: chown {user} {place}",
            place,
        )
    forbidden = stat.S_IWOTH if allow_group_write else stat.S_IWOTH | stat.S_IWGRP
    if mode & forbidden:
        who = "others" if mode & stat.S_IWOTH else "its group"
        mend = "o-w" if allow_group_write else "go-w"
        raise UnsafeVaultError(
            f"{place} can be written by {who} (mode {mode:04o}), so its code is not loaded. If you trust "
            f"what is in "
            f"it: chmod {mend} {place}",
            place,
        )
