"""Saving what a pipeline returned, with its run record inside the file, where the format can hold it, and beside it."""

from __future__ import annotations

import io
import re
import wave
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pipevault.determinism.embed import (
    IMAGE_SUFFIXES,
    VIDEO_SUFFIXES,
    write_data,
    write_image,
    write_sidecar,
    write_video,
)
from pipevault.determinism.outputs import as_array, is_array, leaves, samples
from pipevault.determinism.record import RunRecord
from pipevault.errors import SettingsError, UnknownFormatError
from pipevault.runtime.records import record_of

AUDIO_SUFFIXES = (".wav",)
ARRAY_SUFFIXES = (".npy", ".npz")
_SUFFIXES = (*IMAGE_SUFFIXES, *VIDEO_SUFFIXES, *AUDIO_SUFFIXES, *ARRAY_SUFFIXES)
_LARGEST_SAMPLE = 2**15 - 1

Array = np.ndarray[Any, Any]


def save(output: Any, path: str | Path, *, fps: float = 8.0, sampling_rate: int | None = None) -> list[Path]:
    """Write ``output`` to ``path``, with the record in each file or beside it as ``PATH.json``; what was written.

    The suffix decides: PNG, JPEG or WebP for PIL images (a 16-bit depth map needs PNG), MP4 for videos (frames as PIL
    images, or a float array of (samples, frames, height, width, channels)), WAV for audio of ``sampling_rate`` Hz
    (16 bits; rounded), NPY for a single array or tensor, NPZ for all that there is by its place. One goes to ``path``
    itself, several to ``name-0.png``, ``name-1.png``, …; where an output has several fields of them, to
    ``name-rgb-0.png``, ``name-depth-0.png``.

    Raises :class:`SettingsError` for an output that holds nothing of the kind, :class:`UnknownFormatError`, and the
    errors of :mod:`pipevault.determinism.embed`.
    """
    record, path = record_of(output), Path(path)
    suffix = path.suffix.lower()
    if suffix in IMAGE_SUFFIXES:
        return _save_images(output, path, record)
    if suffix in VIDEO_SUFFIXES:
        return _save_each(_videos(output), path, record, lambda video, to: write_video(video, to, record, fps=fps))
    if suffix in AUDIO_SUFFIXES:
        rate = sampling_rate or getattr(output, "sampling_rate", None)
        if not isinstance(rate, int) or rate < 1:
            raise SettingsError("A WAV file needs the sampling rate of the audio: save(..., sampling_rate=44100).")
        return _save_each(_audio(output), path, record, lambda one, to: write_data(to, _wav(one, rate)))
    if suffix in ARRAY_SUFFIXES:
        return [write_data(path, _arrays_file(output, suffix)), write_sidecar(path, record)]
    named = f"the suffix {path.suffix!r}" if path.suffix else "no suffix"
    raise UnknownFormatError(
        f"{path} has {named}; an output can be saved as {', '.join(_SUFFIXES)}.", path.suffix, _SUFFIXES
    )


def images_of(output: Any) -> list[Image.Image]:
    """Return the images of ``output``, frames of videos one after the other. :class:`SettingsError` if it has none."""
    return [image for _, _, image in _images(output)]


def _images(output: Any) -> list[tuple[str, int, Image.Image]]:
    """Place, index among the digests of the record, and image."""
    found = [(place, i, one) for i, (place, one) in enumerate(samples(output)) if isinstance(one, Image.Image)]
    if not found:
        raise SettingsError(
            f"This output holds no PIL images to save{_holds(output)}: call the pipeline with output_type='pil', or "
            "save it as .npz."
        )
    return found


def _save_images(output: Any, path: Path, record: RunRecord) -> list[Path]:
    images = _images(output)
    written: list[Path] = []
    for name, (_, index, image) in zip(_names([place for place, _, _ in images]), images, strict=True):
        target = path.with_stem(f"{path.stem}{name}")
        written += [
            write_image(image, target, record, index=index),
            write_sidecar(target, record.of_sample(index)),
        ]
    return written


def _save_each(
    items: list[tuple[str, Any]], path: Path, record: RunRecord, write: Callable[[Any, Path], Path]
) -> list[Path]:
    written: list[Path] = []
    for name, (_, item) in zip(_names([place for place, _ in items]), items, strict=True):
        target = path.with_stem(f"{path.stem}{name}")
        written += [write(item, target), write_sidecar(target, record)]
    return written


def _names(places: list[str]) -> list[str]:
    """What is put behind the stem of each file: nothing for a single one, the field only where there are several."""
    if len(places) == 1:
        return [""]
    fields = {re.split(r"[.\[]", place)[0] for place in places}
    short = places if len(fields) > 1 else [place.removeprefix(next(iter(fields))) for place in places]
    return ["-" + re.sub(r"[^\w]+", "-", place).strip("-") for place in short]


def _videos(output: Any) -> list[tuple[str, list[Any]]]:
    videos: dict[str, list[Any]] = {}
    for place, _, image in _images(output) if _has_images(output) else ():
        videos.setdefault(place.rpartition("[")[0], []).append(image)
    if videos:
        return list(videos.items())
    for place, value in leaves(output):
        if isinstance(value, np.ndarray) and value.ndim in (4, 5) and np.issubdtype(value.dtype, np.floating):
            batch = value if value.ndim == 5 else value[None]
            frames = np.round(np.clip(batch, 0.0, 1.0) * 255.0).astype(np.uint8)
            found = [(f"{place}[{index}]", list(video)) for index, video in enumerate(frames)]
            return [(place, found[0][1])] if len(found) == 1 else found
    raise SettingsError(
        f"This output holds no video to save{_holds(output)}: call the pipeline with output_type='pil' or 'np'."
    )


def _has_images(output: Any) -> bool:
    return any(isinstance(value, Image.Image) for _, value in leaves(output))


def _audio(output: Any) -> list[tuple[str, Array]]:
    """Each clip as (channels, samples) or (samples,)."""
    for place, value in leaves(output):
        if is_array(value) and value.ndim in (1, 2, 3):
            array = as_array(value)
            clips = [array] if array.ndim == 1 else list(array)
            return [(place, clips[0])] if len(clips) == 1 else [(f"{place}[{i}]", one) for i, one in enumerate(clips)]
    raise SettingsError(f"This output holds no audio to save{_holds(output)}.")


def _wav(clip: Array, rate: int) -> bytes:
    channels = clip[None] if clip.ndim == 1 else clip
    whole = np.clip(channels, -1.0, 1.0) if np.issubdtype(channels.dtype, np.floating) else None
    data = channels.astype("<i2") if whole is None else np.round(whole * _LARGEST_SAMPLE).astype("<i2")
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(len(data))
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(data.T.tobytes())
    return buffer.getvalue()


def _arrays_file(output: Any, suffix: str) -> bytes:
    arrays = dict(_arrays(output))
    buffer = io.BytesIO()
    if not arrays:
        raise SettingsError(f"This output holds no arrays, tensors or images to save{_holds(output)}.")
    if suffix == ".npz":
        np.savez(buffer, allow_pickle=False, **arrays)
        return buffer.getvalue()
    if len(arrays) > 1:
        raise SettingsError(f"A .npy file holds one array, and this output has {', '.join(arrays)}: save it as .npz.")
    np.save(buffer, next(iter(arrays.values())), allow_pickle=False)
    return buffer.getvalue()


def _arrays(output: Any) -> Iterator[tuple[str, Array]]:
    for place, value in leaves(output):
        if is_array(value) or isinstance(value, Image.Image):
            yield place or "output", as_array(value)


def _holds(output: Any) -> str:
    kinds = dict.fromkeys(f"{place or 'output'}: {type(value).__name__}" for place, value in leaves(output))
    listed = list(kinds)[:4]
    return f" (it has {', '.join(listed)}{', …' if len(kinds) > 4 else ''})" if listed else " (it is empty)"
