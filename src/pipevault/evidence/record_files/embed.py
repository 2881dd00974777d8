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
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipevault.errors import MissingExtraError, NoRecordError, RecordDigestError
from pipevault.evidence.files import replacing, write_data
from pipevault.evidence.record_files import image_files, video_files
from pipevault.evidence.record_files.infotext import asked_samples, parameters_text
from pipevault.runtime.record import RECORD_LIMIT_BYTES, RunRecord

if TYPE_CHECKING:
    from PIL import Image

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
VIDEO_SUFFIXES = (".mp4",)
AUDIO_SUFFIXES = (".wav",)
ARRAY_SUFFIXES = (".npy", ".npz")


def write_image(
    image: Image.Image, path: Path, record: RunRecord, *, index: int | None, batch: tuple[int, int] | None = None
) -> Path:
    """Write ``image``, whose digest is number ``index`` of the record's, with it inside; return ``path``.

    ``batch`` tells which sample of how many it shows, where that is not the index: frames, or a depth map next to its
    picture. The format follows the suffix. :class:`SettingsError`, :class:`RecordTooLargeError`,
    :class:`CannotSaveError`.
    """
    number, count = batch or (index or 0, len(record.results["pixels"]))
    text = parameters_text(record, index=number, count=max(asked_samples(record), count), size=image.size)
    return write_data(path, image_files.encode(image, path.suffix, record.of_sample(index), text))


def write_video(
    frames: Sequence[Any],
    path: Path,
    record: RunRecord,
    *,
    fps: float,
    index: int | None = 0,
    batch: tuple[int, int] | None = None,
) -> Path:
    """Write ``frames`` (images or uint8 arrays (height, width, 3), of one size) as H.264 with ``record`` inside.

    The digest of the first frame is number ``index`` of the record's; ``batch`` as for :func:`write_image`.
    :class:`SettingsError`, :class:`MissingExtraError` without PyAV, :class:`CannotSaveError`.
    """
    arrays = video_files.frame_arrays(frames)
    height, width = arrays[0].shape[:2]
    # The digests of pixels are those of frames here, so they do not tell how many samples there are.
    number, count = batch or (index or 0, 1)
    text = parameters_text(record, index=number, count=max(asked_samples(record), count), size=(width, height))
    with replacing(path) as temporary:
        video_files.encode(arrays, temporary, record.of_sample(index), text, fps=fps)
    return path


def sidecar_path(path: Path) -> Path:
    """Return the path of the sidecar: ``out.png`` -> ``out.png.json``."""
    return path.with_name(f"{path.name}.json")


def write_sidecar(path: Path, record: RunRecord) -> Path:
    """Write ``record`` next to the output ``path``, indented; return the sidecar's path. :class:`CannotSaveError`."""
    text = json.dumps(record.to_document(), sort_keys=True, indent=2, ensure_ascii=False) + "\n"
    return write_data(sidecar_path(path), text.encode("utf-8"))


def read_record(path: Path | str) -> RunRecord:
    """Return the record inside an image or a video, or in a ``.json`` file; if there is none inside, the sidecar's.

    :class:`NoRecordError`, :class:`NewerRecordError`, :class:`RecordDigestError`, :class:`BadRecordError`;
    :class:`MissingExtraError` for a video without PyAV and without a sidecar. A record inside that was changed is an
    error even where there is a sidecar.
    """
    path = Path(path)
    if not os.path.isfile(path):
        raise NoRecordError(f"No file {path}. Give an image, a video or a record (.json).", str(path))
    suffix, sidecar = path.suffix.lower(), sidecar_path(path)
    if suffix == ".json":
        return _read_json(path)
    text: str | None = None
    try:
        if suffix in VIDEO_SUFFIXES:
            text = video_files.record_text(path)
        elif suffix not in (*AUDIO_SUFFIXES, *ARRAY_SUFFIXES):
            text = image_files.record_text(path)
    except MissingExtraError:
        if not os.path.isfile(sidecar):
            raise
    if text is not None:
        try:
            return RunRecord.from_json(text, source=str(path))
        except NoRecordError as error:  # it stands where only a record can stand
            raise RecordDigestError(
                f"The run record of {path} was changed after it was written: it is not a record any more. Use the file "
                "as it was saved, or its sidecar (.json).",
                str(path),
            ) from error
    if os.path.isfile(sidecar):
        return _read_json(sidecar)
    raise NoRecordError(
        f"{path} holds no run record, and {sidecar.name} is not next to it. pipevault did not save it, or another "
        "program saved it again and dropped the record. Give the file as it was saved, or its sidecar (.json).",
        str(path),
    )


def _read_json(path: Path) -> RunRecord:
    try:
        with path.open("rb") as file:
            data = file.read(RECORD_LIMIT_BYTES + 1)
    except OSError as error:
        raise NoRecordError(f"{path} cannot be read: {error.strerror}. Fix its permissions.", str(path)) from error
    return RunRecord.from_json(data, source=str(path))
