"""MP4 with a run record and an A1111 text in its metadata, through PyAV (extra ``video``)."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipevault.compat.extras import import_extra
from pipevault.errors import NoRecordError, SettingsError
from pipevault.runtime.record import RECORD_MARK, RunRecord

if TYPE_CHECKING:
    import numpy as np

_RECORD_FIELD, _TEXT_FIELD = "comment", "description"  # MP4 has no field for names of one's own
_FASTEST_FPS = 1000


def frame_arrays(frames: Sequence[Any]) -> list[np.ndarray[Any, Any]]:
    """Return ``frames`` as uint8 arrays (height, width, 3) of one shape; :class:`SettingsError` if they cannot be."""
    import numpy as np

    arrays: list[np.ndarray[Any, Any]] = []
    for index, frame in enumerate(frames):
        if hasattr(frame, "convert") and frame.mode.startswith(("I", "F")):
            raise SettingsError(
                f"Frame {index} is an image of mode {frame.mode}, of which a video would lose bits. Save it as .png or "
                ".npz; of an output with several fields, give one: save(output.frames, ...)."
            )
        array = np.asarray(frame.convert("RGB") if hasattr(frame, "convert") else frame)
        if array.dtype != np.uint8 or array.ndim != 3 or array.shape[-1] != 3 or 0 in array.shape:
            raise SettingsError(
                f"Frame {index} is {array.dtype} {array.shape}; give images, or uint8 arrays (height, width, 3)."
            )
        arrays.append(array)
        if array.shape != arrays[0].shape:
            raise SettingsError(f"Frame {index} is {array.shape}, the first one {arrays[0].shape}; give one size.")
    if not arrays:
        raise SettingsError("A video needs at least one frame.")
    return arrays


def encode(frames: Sequence[np.ndarray[Any, Any]], path: Path, record: RunRecord, text: str, *, fps: float) -> None:
    """Write what :func:`frame_arrays` gave as H.264. :class:`SettingsError`, ``OSError`` for all that fails
    in writing.
    """
    # "not <" so that NaN is refused as well.
    if isinstance(fps, bool) or not isinstance(fps, (int, float, Fraction)) or not 0 < fps <= _FASTEST_FPS:
        raise SettingsError(f"fps is {fps!r}; give frames per second above 0, at most {_FASTEST_FPS}.")
    rate = Fraction(fps).limit_denominator(1001)  # 24000/1001 and the like exactly
    av = _pyav()
    height, width = frames[0].shape[:2]
    try:
        with av.open(str(path), "w", format="mp4") as container:
            container.metadata[_RECORD_FIELD] = record.to_json()
            container.metadata[_TEXT_FIELD] = text
            stream = container.add_stream("libx264", rate=rate)
            stream.width, stream.height = width, height
            # Players expect 4:2:0, which needs an even size.
            stream.pix_fmt = "yuv444p" if width % 2 or height % 2 else "yuv420p"
            # With its macroblock tree, x264's vector code gave other bytes about once in 500 files of the same frames.
            stream.options = {"crf": "16", "threads": "1", "x264-params": "mbtree=0"}
            for array in frames:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(array, format="rgb24")))
            container.mux(stream.encode())
    except (av.FFmpegError, av.codec.codec.UnknownCodecError) as error:
        if isinstance(error, OSError):
            raise
        raise OSError(f"FFmpeg failed: {error}") from error


def record_text(path: Path) -> str | None:
    """Return the text in the place of the record in the video ``path``, if any. :class:`NoRecordError` if it cannot be
    read.
    """
    av = _pyav()
    try:
        # A file object and a fixed format: FFmpeg would take a name or a playlist for the address of something else.
        # What is not UTF-8 was not written here, and must not keep the rest from being read.
        with path.open("rb") as file, av.open(file, format="mp4", metadata_errors="replace") as container:
            text = container.metadata.get(_RECORD_FIELD)
    except Exception as error:  # PyAV has no root for what it raises for a damaged file
        raise NoRecordError(
            f"{path} cannot be read as a video: {error}. Give the file as it was saved, or its sidecar (.json).",
            str(path),
        ) from error
    return str(text) if text is not None and RECORD_MARK in text else None


def _pyav() -> Any:
    return import_extra("av", "PyAV, which videos need,", "video")
