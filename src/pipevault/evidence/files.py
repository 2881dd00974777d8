"""Files of evidence, written whole or not at all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from pipevault.errors import CannotSaveError
from pipevault.files import atomic

if TYPE_CHECKING:
    import numpy as np

Array: TypeAlias = "np.ndarray[Any, Any]"


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary name; what the block writes there takes the place of ``path``, durably.
    :class:`CannotSaveError`.
    """
    try:
        with atomic.replacing(path) as temporary:
            yield temporary
    except OSError as error:
        reason = error.strerror or str(error)
        raise CannotSaveError(
            f"{path} could not be written: {reason}. Give the path of a file in a folder that exists and has room, and "
            "in which this user may write.",
            path,
        ) from error


def write_data(path: Path, data: bytes) -> Path:
    """Write ``data`` to ``path``, which is returned. :class:`CannotSaveError`."""
    with replacing(path) as temporary:
        temporary.write_bytes(data)
    return path
