"""Optional dependencies: imported, or an error that names the extra to install."""

from __future__ import annotations

import sys
from typing import Any

from pipevault.errors import MissingExtraError


def import_extra(module: str, package: str, extra: str) -> Any:
    """Return ``module`` of ``package``, which comes with ``extra``. :class:`MissingExtraError` if it is not there."""
    try:
        __import__(module)
    except ImportError as error:
        raise MissingExtraError(
            f'{package} is not installed. Install the extra "{extra}": pip install "pipevault[{extra}]".', extra
        ) from error
    return sys.modules[module]
