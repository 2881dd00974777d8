"""The rule for one place: who may change a file or folder, and whether all of them count like this user.

:mod:`pipevault.store.trust.owners` walks a vault with it, where the cases are explained.
"""

from __future__ import annotations

import io
import os
import stat
from dataclasses import dataclass
from pathlib import Path

from pipevault.errors import SettingsError, UnsafeVaultError
from pipevault.reading import open_regular

_OVERFLOW_ID_FILE = Path("/proc/sys/kernel/overflowuid")


@dataclass(frozen=True)
class Trust:
    """The people who count like this user: ``users`` and ``groups`` by number, and with ``allow_group_write`` the group
    of whatever its group may write. Everybody in a trusted group counts, also as the owner of a file of that group.
    """

    users: frozenset[int] = frozenset()
    groups: frozenset[int] = frozenset()
    allow_group_write: bool = False

    def owner_problem(self, status: os.stat_result) -> str:
        is_trusted = status.st_uid in (os.geteuid(), 0) or status.st_uid in self.users or status.st_gid in self.groups
        return "" if is_trusted else _owner_text(status.st_uid)

    def is_of_a_group(self, status: os.stat_result) -> bool:
        """Return whether the owner counts for the file's group alone, as a member: who else may give it that group?"""
        return status.st_uid not in (os.geteuid(), 0) and status.st_uid not in self.users

    def other_writers(self, status: os.stat_result) -> str:
        if status.st_mode & stat.S_IWOTH:
            return "others"
        is_open = status.st_mode & stat.S_IWGRP and not self.allow_group_write and status.st_gid not in self.groups
        return "its group" if is_open else ""


ONLY_THIS_USER = Trust()


def id_of(name: str, setting: str) -> int:
    """Return the number of a user of ``trusted_users`` or a group of ``trusted_groups``, which may be given as such.
    :class:`SettingsError`: no user or group has this name.
    """
    if name.isdecimal():
        return int(name)
    try:
        if setting == "trusted_users":
            import pwd

            return pwd.getpwnam(name).pw_uid
        import grp

        return grp.getgrnam(name).gr_gid
    except (KeyError, ImportError, ValueError) as error:
        kind = "user" if setting == "trusted_users" else "group"
        raise SettingsError(
            f"{setting} names {name!r}, but this machine has no such {kind}. Give its number."
        ) from error


def open_owned(path: Path) -> io.FileIO:
    """Open a regular file outside any vault, such as one with a trusted key, that only this user and root can change or
    put another in the place of: :class:`UnsafeVaultError` unless that holds for the open file, and for every folder and
    link on the way to it. ``OSError`` if it cannot be read.
    """
    file = open_regular(path)
    try:
        check_status(path, os.fstat(file.fileno()), ONLY_THIS_USER)
        place = Path(os.path.abspath(path))
        while place.is_symlink():
            if owner := ONLY_THIS_USER.owner_problem(os.lstat(place)):
                raise UnsafeVaultError(f"{place} is a link that belongs to {owner}. Name the file itself.", place)
            check_way(place)
            place = Path(os.path.abspath(place.parent / os.readlink(place)))
        check_way(place)
        check_way(Path(os.path.realpath(place)))
    except BaseException:  # whatever it was goes on
        file.close()
        raise
    return file


def check_way(place: Path) -> None:
    """Raise :class:`UnsafeVaultError` unless only this user and root can put another in the place of ``place``."""
    for folder in place.parents:
        check_parent(folder, place, os.stat(folder), ONLY_THIS_USER)


def check_status(place: Path, status: os.stat_result, trust: Trust) -> None:
    """Raise :class:`UnsafeVaultError` unless only those who count can change ``place``."""
    user = os.geteuid()
    if owner := trust.owner_problem(status):
        raise UnsafeVaultError(
            f"{place} belongs to {owner}, neither to this user ({user}) nor to root, so it is not trusted and no code "
            "is loaded. If you trust it: name the owner in trusted_users, have the entries signed by a key of yours "
            f"(trusted_keys), or chown {user} {place}",
            place,
        )
    if who := trust.other_writers(status):
        change = "o-w" if who == "others" and trust.allow_group_write else "go-w"
        group = f"name the group in trusted_groups ({status.st_gid}), " if who == "its group" else ""
        raise UnsafeVaultError(
            f"{place} can be written by {who} (mode {stat.S_IMODE(status.st_mode):04o}), so it is not trusted and no "
            'code is loaded. If its group shares the vault, set shared = "group". If you trust what is in it: '
            f"{group}have the entries signed by a key of yours (trusted_keys), or run: chmod {change} {place}",
            place,
        )


def check_parent(place: Path, child: Path, status: os.stat_result, trust: Trust) -> None:
    """Do the same for ``place``, above ``child``: it may let others replace what is below, hence the sticky bit."""
    user = os.geteuid()
    if owner := trust.owner_problem(status):
        advice = f"If you trust it: chown root {place}; else move to a folder of your own."
        if place == place.parent:
            advice = (
                f"If you trust it: chown root {place} where the container's image is built, or map the owner to root "
                "or to this user where the container is started."
            )
        raise UnsafeVaultError(
            f"{place}, above {child}, belongs to {owner}, neither to this user ({user}) nor to "
            f"root. Its owner could put another folder in place of this one, so no code is loaded. {advice}",
            place,
        )
    if status.st_mode & stat.S_ISVTX:
        return
    if who := trust.other_writers(status):
        change = "chmod o-w" if trust.allow_group_write else "chmod go-w"
        condition = (
            "If you trust what is there now" if who == "others" else "Set allow_group_write if you trust it, or run"
        )
        raise UnsafeVaultError(
            f"{place}, above {child}, can be written by {who} (mode {stat.S_IMODE(status.st_mode):04o}), who could put "
            f"another folder in place of this one, so no code is loaded. {condition}: {change} {place}",
            place,
        )


def _owner_text(user: int) -> str:
    if user != _overflow_id():
        return f"user {user}"
    return f"user {user}, which may stand for an owner that this container or file server does not map to one here"


def _overflow_id() -> int:
    """The number that owners without one here are shown as, in a user namespace or on NFS: see user_namespaces(7)."""
    try:
        return int(_OVERFLOW_ID_FILE.read_bytes())
    except (OSError, ValueError):  # no Linux, or no /proc: the number that all kernels ship with
        return 65534
