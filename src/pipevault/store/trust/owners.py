"""Ownership: who owns a file from which native code is to be loaded, and who else could change it.

From the file up to the vault's folder, everything must belong to this user, to root, or to whom the settings trust
(:class:`Trust`), and no one else may write it. For the folders above, up to ``/``, the same holds, but for those with
the sticky bit, such as ``/tmp``: the kernel lets only the owner of what is in it (and of the folder, and root) rename
or remove that (inode(7), ``S_ISVTX``), and that owner is checked in the same walk. Inside the vault the sticky bit
excuses nothing: there anyone could still add files.

The walk is that of OpenSSH's ``safe_path`` (misc.c); sticky folders are from Kupsch and Miller, "How to Open a File and
Not Get Hacked" (2008). Links on the way to the vault are followed first. A hard link is not looked for: whoever may not
write a file may not write it through another name either. Access control lists of POSIX show in the group's bits of the
mode.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from pipevault.errors import UnsafeVaultError
from pipevault.files.file_systems import is_local
from pipevault.settings import Settings
from pipevault.settings.ownership import ONLY_THIS_USER, Trust, check_parent, check_status, id_of


def trust_of(settings: Settings) -> Trust:
    """Return whom the settings trust. :class:`~pipevault.errors.SettingsError`: no user or group has a name."""
    return Trust(
        frozenset(id_of(name, "trusted_users") for name in settings.trusted_users),
        frozenset(id_of(name, "trusted_groups") for name in settings.trusted_groups),
        settings.allow_group_write,
    )


def check_ownership(path: Path, *, root: Path, trust: Trust = ONLY_THIS_USER) -> None:
    """Raise unless only those who count can change the regular file ``path`` under the vault's ``root``; the folders
    above are the business of :func:`check_root`.

    :class:`UnsafeVaultError` names what is unsafe and the command that fixes it; ``OSError``: it cannot be looked at.
    """
    if not path.is_relative_to(root) or ".." in path.parts:
        raise UnsafeVaultError(f"{path} lies outside the vault {root}: load only files of the vault.", path)
    target = check_chain(path, root, trust)
    if target != path:
        check_chain(target, Path(os.path.realpath(root)), trust)
    if not stat.S_ISREG(os.lstat(target).st_mode):
        raise UnsafeVaultError(f"{path} is not a regular file. Remove it: rm -r {path}", path)


def is_changeable(descriptor: int, status: os.stat_result) -> bool:
    """Return whether anybody but this user and root could write to an open file: by its owner, by its mode, or because
    other machines may write to its file system.
    """
    is_mine = status.st_uid in (os.geteuid(), 0)
    return not is_mine or bool(status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)) or not is_local(descriptor)


def check_root(root: Path, *, trust: Trust = ONLY_THIS_USER) -> None:
    """Do the same for the vault's folder and those above it, for which ``trust`` holds too."""
    resolved = Path(os.path.realpath(root))
    below, below_status = root, os.stat(resolved)
    check_status(root, below_status, trust)
    for place in resolved.parents:
        status = os.lstat(place)
        check_parent(place, resolved, status, trust)
        # A folder with set-group-ID gives its group to what anybody makes in it.
        if status.st_mode & stat.S_IWOTH and trust.is_of_a_group(below_status):
            raise UnsafeVaultError(
                f"{below} belongs to user {below_status.st_uid}, and everybody may make folders of its group in "
                f"{place}, so nothing tells whether that is a member. Name it in trusted_users, or move the vault.",
                below,
            )
        below, below_status = place, status


def check_chain(path: Path, root: Path, trust: Trust) -> Path:
    """Do the same for any place in the vault; return where it leads once links are followed."""
    has_link = False
    for place in (path, *path.parents):
        status = os.stat(place) if place == root else os.lstat(place)  # the root may be reached through a link
        if stat.S_ISLNK(status.st_mode):
            has_link = True
        else:
            check_status(place, status, trust)
        if place == root:
            break
    if not has_link:
        return path
    try:
        resolved = path.resolve(strict=True)
    except RuntimeError as error:  # a circle of links, before Python 3.13
        raise UnsafeVaultError(f"{path} is a link that leads nowhere. Remove it.", path) from error
    if not resolved.is_relative_to(root.resolve()):
        raise UnsafeVaultError(f"{path} is a link that leads outside the vault, to {resolved}. Remove it.", path)
    return resolved
