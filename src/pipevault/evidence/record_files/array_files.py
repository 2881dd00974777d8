"""NPY and NPZ, which keep every value of an array; they have no place for a record, which stands in the sidecar."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pipevault.errors import SettingsError

if TYPE_CHECKING:
    import numpy as np

SUFFIXES = (".npy", ".npz")


def encode(arrays: Mapping[str, np.ndarray[Any, Any]], suffix: str) -> bytes:
    """Return ``arrays`` by their names as one file; a ``.npy`` holds one. The same arrays make the same bytes.

    :class:`SettingsError` for several arrays in a ``.npy``, and for arrays of Python objects.
    """
    if suffix.lower() == ".npz":
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as archive:
            for name, array in arrays.items():  # numpy.savez takes some names for arguments of its own
                archive.writestr(zipfile.ZipInfo(f"{name}.npy"), _npy(name, array))
        return buffer.getvalue()
    if len(arrays) != 1:
        raise SettingsError(f"A .npy file holds one array, and this output has {', '.join(arrays)}: save it as .npz.")
    [(name, array)] = arrays.items()
    return _npy(name, array)


def _npy(name: str, array: np.ndarray[Any, Any]) -> bytes:
    import numpy as np

    if array.dtype.hasobject:
        raise SettingsError(f"{name} is an array of Python objects, which cannot be saved. Leave it out.")
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()
