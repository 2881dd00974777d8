"""Run records inside image and video files, and in sidecars next to them.

==================  ==========================  ==========================
file                the record, as JSON         text that other tools read
==================  ==========================  ==========================
``.png``            iTXt ``pipevault``          tEXt or iTXt ``parameters``
``.jpg``, ``.jpeg`` EXIF ImageDescription       EXIF UserComment
``.webp``           EXIF ImageDescription       EXIF UserComment
``.mp4``            metadata ``comment``        metadata ``description``
``*.json``          the file itself             none
``.wav``, ``.npy``, the sidecar                 none
``.npz``
==================  ==========================  ==========================

PNG and WebP keep every pixel, NPY and NPZ every value; JPEG, MP4 and WAV are lossy. Every file appears whole or not at
all.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipevault.errors import MissingExtraError, NoRecordError, RecordDigestError, UnknownFormatError
from pipevault.evidence.files import replacing, write_data
from pipevault.evidence.record_files import array_files, audio_files, image_files, video_files
from pipevault.evidence.record_files.infotext import asked_samples, parameters_text
from pipevault.runtime.record import RECORD_LIMIT_BYTES, RunRecord

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

IMAGE_SUFFIXES = image_files.SUFFIXES
VIDEO_SUFFIXES = video_files.SUFFIXES
AUDIO_SUFFIXES = audio_files.SUFFIXES
ARRAY_SUFFIXES = array_files.SUFFIXES


def write_image(
    image: Image.Image,
    path: Path | str,
    record: RunRecord,
    *,
    index: int | None,
    batch: tuple[int, int] | None = None,
) -> Path:
    """Write ``image``, whose digest is number ``index`` of the record's, with it inside; the path that was written.

    ``batch`` tells which sample of how many it shows, where that is not the index: frames, or a depth map next to
    its picture. The format follows the suffix.

    :class:`UnknownFormatError`, :class:`SettingsError` (an index that the batch does not have, a mode or size that the
    format cannot hold), :class:`RecordTooLargeError` (JPEG), :class:`CannotSaveError`.
    """
    path = Path(path)
    _check_suffix(path, "an image", IMAGE_SUFFIXES)
    number, count = batch or (index or 0, len(record.results["pixels"]))
    text = parameters_text(record, index=number, count=max(asked_samples(record), count), size=image.size)
    return write_data(path, image_files.encode(image, path.suffix, record.of_sample(index), text))


def write_video(
    frames: Sequence[Any],
    path: Path | str,
    record: RunRecord,
    *,
    fps: float,
    index: int | None = 0,
    batch: tuple[int, int] | None = None,
) -> Path:
    """Write ``frames`` as H.264 with ``record`` inside; the path that was written.

    The digest of the first frame is number ``index`` of the record's. ``batch`` tells which sample of how many the
    video is, where that is not the index. A frame is an image or a uint8 array (height, width, 3), all of one size.

    :class:`UnknownFormatError`, :class:`SettingsError` (no frames, other types, unequal sizes, ``fps``, ``index``),
    :class:`MissingExtraError` without PyAV, :class:`CannotSaveError`.
    """
    path = Path(path)
    _check_suffix(path, "a video", VIDEO_SUFFIXES)
    arrays = video_files.frame_arrays(frames)
    height, width = arrays[0].shape[:2]
    # The digests of pixels are those of frames here, so they do not tell how many samples there are.
    number, count = batch or (index or 0, 1)
    text = parameters_text(record, index=number, count=max(asked_samples(record), count), size=(width, height))
    with replacing(path) as temporary:
        video_files.encode(arrays, temporary, record.of_sample(index), text, fps=fps)
    return path


def write_audio(clip: np.ndarray[Any, Any], path: Path | str, *, sampling_rate: Any) -> Path:
    """Write ``clip``, (channels, samples) or (samples,), with 16 bits for a sample; the path that was written.

    :class:`UnknownFormatError`, :class:`SettingsError` (other numbers or shapes, the sampling rate),
    :class:`CannotSaveError`.
    """
    path = Path(path)
    _check_suffix(path, "audio", AUDIO_SUFFIXES)
    return write_data(path, audio_files.encode(clip, sampling_rate))


def write_arrays(arrays: Mapping[str, np.ndarray[Any, Any]], path: Path | str) -> Path:
    """Write ``arrays`` by their names, or a single one as ``.npy``; the path that was written.

    :class:`UnknownFormatError`, :class:`SettingsError` (several arrays in a ``.npy``, Python objects),
    :class:`CannotSaveError`.
    """
    path = Path(path)
    _check_suffix(path, "an array", ARRAY_SUFFIXES)
    return write_data(path, array_files.encode(arrays, path.suffix))


def sidecar_path(path: Path | str) -> Path:
    """Return the path of the sidecar: ``out.png`` -> ``out.png.json``."""
    path = Path(path)
    return path.with_name(f"{path.name}.json")


def write_sidecar(path: Path | str, record: RunRecord) -> Path:
    """Write ``record`` next to the output ``path`` as ``PATH.json``, indented; return the sidecar's path.

    :class:`CannotSaveError`.
    """
    sidecar = sidecar_path(path)
    text = json.dumps(record.to_document(), sort_keys=True, indent=2, ensure_ascii=False) + "\n"
    return write_data(sidecar, text.encode("utf-8"))


def read_record(path: Path | str) -> RunRecord:
    """Return the record inside an image or a video, or in a ``.json`` file; if there is none inside, the sidecar's.

    :class:`NoRecordError`, :class:`NewerRecordError`, :class:`RecordDigestError`, :class:`BadRecordError`;
    :class:`MissingExtraError` for a video without PyAV and without a sidecar. A record inside that was changed is an
    error even where there is a sidecar.
    """
    path = Path(path)
    if not _is_file(path):
        raise NoRecordError(f"No file {path}. Give an image, a video or a record (.json).", str(path))
    if path.suffix.lower() == ".json":
        return _read_json(path)
    sidecar = sidecar_path(path)
    try:
        text = _embedded_text(path)
    except MissingExtraError:
        if not _is_file(sidecar):
            raise
        text = None
    if text is not None:
        return _parse_embedded(text, path)
    if _is_file(sidecar):
        return _read_json(sidecar)
    raise NoRecordError(
        f"{path} holds no run record, and {sidecar.name} is not next to it. pipevault did not save it, or another "
        "program saved it again and dropped the record. Give the file as it was saved, or its sidecar (.json).",
        str(path),
    )


def _embedded_text(path: Path) -> str | None:
    if _has_suffix(path, (*AUDIO_SUFFIXES, *ARRAY_SUFFIXES)):
        return None
    return video_files.record_text(path) if _has_suffix(path, VIDEO_SUFFIXES) else image_files.record_text(path)


def _parse_embedded(text: str, path: Path) -> RunRecord:
    try:
        return RunRecord.from_json(text, source=str(path))
    except NoRecordError as error:  # it stands where only a record can stand
        raise RecordDigestError(
            f"The run record of {path} was changed after it was written: it is not a record any more. Use the file as "
            "it was saved, or its sidecar (.json).",
            str(path),
        ) from error


def _read_json(path: Path) -> RunRecord:
    try:
        with path.open("rb") as file:
            data = file.read(RECORD_LIMIT_BYTES + 1)
    except OSError as error:
        raise NoRecordError(f"{path} cannot be read: {error.strerror}. Fix its permissions.", str(path)) from error
    return RunRecord.from_json(data, source=str(path))


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name that is too long, or a folder that may not be searched
        return False


def _has_suffix(path: Path, suffixes: tuple[str, ...]) -> bool:
    return path.suffix.lower() in suffixes


def _check_suffix(path: Path, what: str, suffixes: tuple[str, ...]) -> None:
    if not _has_suffix(path, suffixes):
        named = f"the suffix {path.suffix!r}" if path.suffix else "no suffix"
        raise UnknownFormatError(
            f"{path} has {named}; with its record inside, {what} can be saved as {', '.join(suffixes)}.",
            path.suffix,
            suffixes,
        )
