"""Files of evidence: written whole or not at all, and the samples of a generation as pictures or arrays."""

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
    """Yield a temporary name next to ``path``; what the block writes there takes the place of ``path``, durably.

    After an error nothing of it is left. An ``OSError`` leaves as a :class:`CannotSaveError`.
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


def is_picture(sample: Array) -> bool:
    """Return whether an array is a picture of 8 bits: grey, RGB or RGBA."""
    return sample.dtype == "uint8" and (sample.ndim == 2 or (sample.ndim == 3 and sample.shape[-1] in (3, 4)))


def write_sample(sample: Array, path: Path) -> Path:
    """Write a sample to ``path`` with the suffix ``.png`` if it is a picture, else ``.npy``; return that path."""
    import numpy as np
    from PIL import Image

    if is_picture(sample):
        Image.fromarray(sample).save(file := path.with_suffix(".png"))
    else:
        np.save(file := path.with_suffix(".npy"), sample)
    return file


def read_sample(path: Path) -> Array:
    """Return the sample that :func:`write_sample` wrote."""
    import numpy as np
    from PIL import Image

    if path.suffix == ".npy":
        array: Array = np.load(path)
        return array
    with Image.open(path) as image:
        return np.asarray(image)
