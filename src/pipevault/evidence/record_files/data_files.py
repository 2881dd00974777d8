"""NPY and NPZ, which keep every value of an array, and WAV with 16 bits for a sample.

None has a place for a record, which stands in the sidecar.
"""

from __future__ import annotations

import io
import wave
import zipfile
from collections.abc import Mapping
from typing import Any

import numpy as np

from pipevault.errors import SettingsError
from pipevault.evidence.files import Array

_LARGEST_SAMPLE = 2**15 - 1
_MOST_CHANNELS = 64
_FASTEST_HZ = 2**32 - 1


def encode_arrays(arrays: Mapping[str, Array], suffix: str) -> bytes:
    """Return ``arrays`` by their names as one file; a ``.npy`` holds one. The same arrays make the same bytes.
    :class:`SettingsError`.
    """
    if suffix == ".npz":
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as archive:
            for name, array in arrays.items():  # numpy.savez takes some names for arguments of its own
                archive.writestr(zipfile.ZipInfo(f"{name}.npy"), _npy(name, array))
        return buffer.getvalue()
    if len(arrays) != 1:
        raise SettingsError(f"A .npy file holds one array, and this output has {', '.join(arrays)}: save it as .npz.")
    [(name, array)] = arrays.items()
    return _npy(name, array)


def _npy(name: str, array: Array) -> bytes:
    if array.dtype.hasobject:
        raise SettingsError(f"{name} is an array of Python objects, which cannot be saved. Leave it out.")
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def encode_audio(clip: Array, sampling_rate: Any) -> bytes:
    """Return ``clip``, (channels, samples) or (samples,), as a file: floats from -1 to 1, or 16-bit integers.
    :class:`SettingsError`.
    """
    rate = _whole_hertz(sampling_rate)
    channels = clip[None] if clip.ndim == 1 else clip
    if channels.ndim != 2 or not 0 < len(channels) <= _MOST_CHANNELS:
        raise SettingsError(
            f"Audio is (samples,), (channels, samples) or several of them, with up to {_MOST_CHANNELS} channels; this "
            f"is {list(clip.shape)}. Turn the array, or save it as .npy."
        )
    if np.issubdtype(channels.dtype, np.floating):
        if not np.isfinite(channels).all():
            raise SettingsError("The audio has values that are not finite. Save it as .npy, which keeps them.")
        # In float64: 32767 has no float16.
        channels = np.round(np.clip(channels.astype(np.float64), -1.0, 1.0) * _LARGEST_SAMPLE)
    elif channels.dtype != np.int16:
        raise SettingsError(f"Audio is floats or 16-bit integers, not {channels.dtype}. Convert it, or save as .npy.")
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(len(channels))
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(channels.T.astype("<i2").tobytes())
    return buffer.getvalue()


def _whole_hertz(rate: Any) -> int:
    try:
        whole = int(rate)
    except (TypeError, ValueError, OverflowError):
        whole = 0
    if isinstance(rate, (bool, str)) or whole != rate or not 0 < whole <= _FASTEST_HZ:
        raise SettingsError(f"The sampling rate is {rate!r}; give whole samples per second: sampling_rate=44100.")
    return whole
