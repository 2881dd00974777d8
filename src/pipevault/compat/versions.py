"""Versions of torch that the package was tried with, and the warning where it runs with another one."""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import logging
import re
import sys
from pathlib import Path

from pipevault.errors import UnusableBackendError

OLDEST_TORCH = (2, 9)
TRIED_TORCH = ("2.11.0", "2.13", "2.15.0")
"""Releases, or whole series of them. The test suite runs with 2.13; the demo was frozen and loaded with the others."""

logger = logging.getLogger("pipevault")


def torch_version() -> str | None:
    """Return the version of the imported torch, else of the installed one; ``None`` where there is none."""
    version = getattr(sys.modules.get("torch"), "__version__", None)
    return installed_torch_version() if version is None else str(version)


def installed_torch_version() -> str | None:
    """Return ``torch.__version__`` of the installed torch without importing it; ``None`` where there is none.

    The metadata of a wheel may lack the local part that names its build, such as ``+cu130``.
    """
    try:
        distribution = importlib.metadata.distribution("torch")
    except importlib.metadata.PackageNotFoundError:
        return None
    try:
        text = Path(str(distribution.locate_file("torch/version.py"))).read_text("utf-8")
    except (OSError, UnicodeDecodeError):
        return distribution.version  # no wheel: an editable build
    found = re.search(r"^__version__ = ['\"]([^'\"]+)['\"]", text, re.MULTILINE)
    return found[1] if found else distribution.version


def installed_version(*distributions: str) -> str | None:
    """Return the version of the first of ``distributions`` that is installed; ``None`` if none is."""
    for name in distributions:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(name)
    return None


def is_too_old(version: str) -> bool:
    """Return whether ``version`` of torch lacks what the package needs."""
    found = re.match(r"(\d+)\.(\d+)", version)
    return found is not None and (int(found[1]), int(found[2])) < OLDEST_TORCH


def require_inductor() -> None:
    """Raise :class:`UnusableBackendError` for a torch whose AOTInductor lacks what backend ``inductor`` needs."""
    version = torch_version()
    if version is not None and is_too_old(version):
        raise UnusableBackendError(
            f"backend 'inductor' needs torch {'.'.join(map(str, OLDEST_TORCH))} or newer, and this is torch {version}. "
            "Install a newer one; with this one, the vault's commands and backend 'nexfort' work.",
            "inductor",
        )


def untried_text(version: str) -> str | None:
    """Say that ``version`` of torch, whatever its build, is none of :data:`TRIED_TORCH`; ``None`` if it is one."""
    release = version.partition("+")[0]
    is_release = re.fullmatch(r"\d+(\.\d+)*", release) is not None
    if is_release and any(release == tried or release.startswith(f"{tried}.") for tried in TRIED_TORCH):
        return None
    return (
        f"torch {version} was not tried with this version of pipevault; tried were {', '.join(TRIED_TORCH)}. "
        "Every graph is checked against eager code before it is stored, whichever torch made it."
    )


def warn_untried() -> str | None:
    """Warn of a torch that was not tried, once in a process; return the text each time, ``None`` if there is none."""
    version = torch_version()
    text = None if version is None else untried_text(version)
    if text is not None:
        _warn_once(text)
    return text


@functools.cache
def _warn_once(text: str) -> None:
    logger.warning(text)
