"""The folders of this user's files, and what happens in a container whose user has no home."""

from __future__ import annotations

import os
from pathlib import Path

from pipevault.errors import NoHomeError


def user_folder(kind: str) -> Path:
    """Return this user's ``cache``, ``config`` or ``state`` folder of pipevault; it need not exist.
    :class:`NoHomeError`.
    """
    import platformdirs

    try:
        path: Path = getattr(platformdirs, f"user_{kind}_path")("pipevault", appauthor=False)
    except RuntimeError:  # what platformdirs raises where there is no home
        path = Path()
    if not path.is_absolute():  # what its older versions return there: a folder "~" in the current one
        raise NoHomeError(
            f"HOME is not set and the user {os.getuid()} has no home folder, and so no {kind} folder. Set HOME, or "
            f"XDG_{kind.upper()}_HOME; the vault's folder is set by PIPEVAULT_DIR, the config file by PIPEVAULT_CONFIG."
        )
    return path


def expand_user(path: str | os.PathLike[str]) -> Path:
    """Replace a ``~`` at the beginning; :class:`NoHomeError` where it stands for no home."""
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise NoHomeError(f"{os.fspath(path)!r} begins with ~, and {error} Give a path without ~.") from error
