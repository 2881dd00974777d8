"""WAV with 16 bits for a sample, by the standard library; it has no place for a record, which stands in the sidecar."""

from __future__ import annotations

import io
import wave
from typing import TYPE_CHECKING, Any

from pipevault.errors import SettingsError

if TYPE_CHECKING:
    import numpy as np

SUFFIXES = (".wav",)

_LARGEST_SAMPLE = 2**15 - 1
_MOST_CHANNELS = 64
_FASTEST_HZ = 2**32 - 1


def encode(clip: np.ndarray[Any, Any], sampling_rate: Any) -> bytes:
    """Return ``clip``, (channels, samples) or (samples,), as a file: floats from -1 to 1, or 16-bit integers.

    :class:`SettingsError` for other numbers, for values that are not finite, and for a sampling rate that is none.
    """
    import numpy as np

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
        data = np.round(np.clip(channels.astype(np.float64), -1.0, 1.0) * _LARGEST_SAMPLE).astype("<i2")
    elif channels.dtype == np.int16:
        data = channels.astype("<i2")
    else:
        raise SettingsError(f"Audio is floats or 16-bit integers, not {channels.dtype}. Convert it, or save as .npy.")
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(len(data))
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(data.T.tobytes())
    return buffer.getvalue()


def _whole_hertz(rate: Any) -> int:
    try:
        whole = int(rate)
    except (TypeError, ValueError, OverflowError):
        whole = 0
    if isinstance(rate, (bool, str)) or whole != rate or not 0 < whole <= _FASTEST_HZ:
        raise SettingsError(f"The sampling rate is {rate!r}; give whole samples per second: sampling_rate=44100.")
    return whole
