"""Files of what a pipeline returned, with its run record inside, where the format can hold it, and next to them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from pipevault.calls.outputs import OutputPlace, Position, Sample, as_array, is_array, kind_of, leaves, samples
from pipevault.calls.samples import recorded_samples
from pipevault.errors import SettingsError, UnknownFormatError
from pipevault.evidence.files import Array, write_data
from pipevault.evidence.record_files.data_files import encode_arrays, encode_audio
from pipevault.evidence.record_files.embed import (
    ARRAY_SUFFIXES,
    AUDIO_SUFFIXES,
    IMAGE_SUFFIXES,
    VIDEO_SUFFIXES,
    write_image,
    write_sidecar,
    write_video,
)
from pipevault.runtime.record import RunRecord
from pipevault.runtime.records import origin_of, record_of

_SUFFIXES = (*IMAGE_SUFFIXES, *VIDEO_SUFFIXES, *AUDIO_SUFFIXES, *ARRAY_SUFFIXES)
_AUDIO_NAMES = ("audio", "sound", "speech", "wave", "music")
_RATE_NAMES = ("sampling_rate", "sample_rate")
_LISTED = 4


def save(output: Any, path: str | Path, *, fps: float = 8.0, sampling_rate: int | None = None) -> list[Path]:
    """Write ``output`` to ``path``, with the record in each file or next to it as ``PATH.json``; return the paths.

    The suffix decides:

    ==================  ==============================================================================================
    ``.png``, ``.jpg``  PIL images; only PNG holds a depth map of 16 bits, and it keeps every bit
    ``.webp``
    ``.mp4``            lists of frames as PIL images, one for each video or one for all; arrays of (frames, height,
                        width, 3), one or several of them, with floats from 0 to 1 (rounded as diffusers does) or
                        bytes; ``fps`` frames per second
    ``.wav``            audio: (samples,) or (channels, samples) in a list, (clips, samples) or (clips, channels,
                        samples) as one array, with floats from -1 to 1 (rounded to 16 bits) or 16-bit integers;
                        ``sampling_rate`` in Hz, unless the output has one
    ``.npy``            a single array, tensor or image
    ``.npz``            every array, tensor and image by its place in the output
    ==================  ==============================================================================================

    One goes to ``path`` itself, several to ``name-0.png``, ``name-1.png``, …; where an output has several fields of
    them, to ``name-rgb-0.png``, ``name-depth-0.png``. ``output`` may also be a part of what was returned, such as
    ``output.images[1]``. The digests of a record are of what was returned: a saved PNG can be checked against them, and
    a lossy file, or a video of floats, cannot.

    Raises :class:`SettingsError` for an output that holds nothing of the kind, :class:`UnknownFormatError`, and the
    errors of :mod:`pipevault.evidence.record_files.embed`.
    """
    record, path = record_of(output), Path(path)
    suffix = path.suffix.lower()
    found = _placed(output, record)
    if suffix in IMAGE_SUFFIXES:
        items = [one for one in found if one.is_image]
        kind, advice = "PIL images", "Call the pipeline with output_type='pil', or save it as .npz."
    elif suffix in VIDEO_SUFFIXES:
        items = _videos(found, recorded_samples(record.call, pipeline=record.pipeline["class"]).count)
        kind, advice = "video", "Call the pipeline with output_type='pil' or 'np', or save it as .npz."
    elif suffix in AUDIO_SUFFIXES:
        if sampling_rate is None:
            rates = [value for path, value in leaves(output) if path.rpartition(".")[2] in _RATE_NAMES]
            if not rates:
                raise SettingsError("A WAV file needs the sampling rate of the audio: save(..., sampling_rate=44100).")
            sampling_rate = rates[0]
        items = _clips(found)
        kind, advice = "audio", "Save it as .npz."
    elif suffix in ARRAY_SUFFIXES:
        return _save_arrays(output, found, path, record)
    else:
        named = f"the suffix {path.suffix!r}" if path.suffix else "no suffix"
        raise UnknownFormatError(
            f"{path} has {named}; an output can be saved as {', '.join(_SUFFIXES)}.", path.suffix, _SUFFIXES
        )
    if not items:
        raise SettingsError(f"This output holds no {kind} to save{_holds(output)}. {advice}")
    written: list[Path] = []
    for name, item in zip(_names([item.place for item in items]), items, strict=True):
        to, index = path.with_stem(f"{path.stem}{name}"), item.position.index
        batch = (item.position.number, item.position.count)
        if suffix in IMAGE_SUFFIXES:
            write_image(item.leaf, to, record, index=index, batch=batch)
        elif suffix in VIDEO_SUFFIXES:
            write_video(item.leaf, to, record, fps=fps, index=index, batch=batch)
        else:
            write_data(to, encode_audio(item.leaf, sampling_rate))
        written += [to, write_sidecar(to, record.of_sample(index))]
    return written


def _placed(output: Any, record: RunRecord) -> list[Sample]:
    """Return the samples of ``output``, with their positions in what was returned: it may be a part of that."""
    placed: list[Sample] = []
    seen: Counter[int] = Counter()
    for sample in samples(output, record.results["undigested"]):
        origin = origin_of(sample.leaf)
        if origin is not None and origin.record is record:
            own = origin.positions[min(seen[id(sample.leaf)], len(origin.positions) - 1)]
            sample = replace(sample, position=own)
        seen[id(sample.leaf)] += 1
        placed.append(sample)
    return placed


def _videos(found: Sequence[Sample], count: int) -> list[Sample]:
    videos: dict[tuple[str, tuple[int, ...]], list[Sample]] = {}
    for one in found:
        if one.is_image and one.place.numbers:
            videos.setdefault((one.place.field, one.place.numbers[:-1]), []).append(one)
    if videos:
        return [
            item for key, frames in videos.items() for item in _videos_of_images(OutputPlace("", *key), frames, count)
        ]
    return [item for of_leaf in _by_leaf(found) for item in _videos_of_array(of_leaf)]


def _videos_of_images(place: OutputPlace, frames: Sequence[Sample], count: int) -> list[Sample]:
    """Return the videos of a list of frames; one list may hold those of all ``count`` samples, one after the other."""
    if place.numbers:
        return [replace(frames[0], place=place, leaf=[one.leaf for one in frames])]
    several = len(frames) > count and len(frames) % count == 0
    length = len(frames) // count if several else len(frames)
    videos = [frames[start : start + length] for start in range(0, len(frames), length)]
    # In a list that is not one of several, a frame's number is not that of a sample.
    return [
        replace(
            video[0],
            place=place.numbered(number) if len(videos) > 1 else place,
            leaf=[one.leaf for one in video],
            position=Position(video[0].position.index, number, len(videos)),
        )
        for number, video in enumerate(videos)
    ]


def _videos_of_array(of_leaf: Sequence[Sample]) -> list[Sample]:
    first = of_leaf[0]
    if first.is_image or first.leaf.ndim not in (4, 5) or first.leaf.shape[-1] != 3:
        return []
    array = _array(first)
    if array.dtype != np.uint8 and not np.issubdtype(array.dtype, np.floating):
        return []
    if array.ndim == 5:
        return [replace(one, leaf=_frames(first.place, one.leaf)) for one in _slices(of_leaf, array)]
    position = first.position if first.place.numbers else Position(first.position.index, 0, 1)
    return [replace(first, leaf=_frames(first.place, array), position=position)]


def _frames(place: OutputPlace, array: Array) -> list[Array]:
    if array.dtype == np.uint8:
        return list(array)
    if not np.isfinite(array).all():
        raise SettingsError(f"{place} has values that are not finite. Save it as .npz, which keeps them.")
    return list(np.round(np.clip(array, 0.0, 1.0) * 255.0).astype(np.uint8))


def _clips(found: Sequence[Sample]) -> list[Sample]:
    arrays = [of_leaf for of_leaf in _by_leaf(found) if is_array(of_leaf[0].leaf) and 1 <= of_leaf[0].leaf.ndim <= 3]
    named = [own for own in arrays if any(name in own[0].place.field.lower() for name in _AUDIO_NAMES)]
    arrays = named or arrays
    if len(fields := dict.fromkeys(own[0].place.field for own in arrays)) > 1:
        raise SettingsError(
            f"This output has several fields that may be audio: {', '.join(fields)}. Give the one that is: "
            f"save(output.{next(iter(fields))}, ...)."
        )
    return [item for own in arrays for item in _clips_of_array(own)]


def _clips_of_array(of_leaf: Sequence[Sample]) -> list[Sample]:
    first, array = of_leaf[0], _array(of_leaf[0])
    if array.ndim == 1 or (array.ndim == 2 and first.place.numbers):
        return [replace(first, leaf=array)]
    if array.ndim == 2 and len(array) > array.shape[1]:
        raise SettingsError(
            f"{first.place} is {list(array.shape)}, which would be {len(array)} clips of {array.shape[1]} samples. "
            "Save its transpose in a list, or save it as .npy."
        )
    return _slices(of_leaf, array)


def _slices(of_leaf: Sequence[Sample], array: Array) -> list[Sample]:
    place, is_one = of_leaf[0].place, of_leaf[0].part is None
    if is_one and len(array) > 1:  # of so many slices that they are one sample: the first alone would be written
        raise SettingsError(f"{place} has {len(array)} slices, too many to tell apart. Save it as .npz.")
    return [replace(one, place=place.numbered(one.part or 0), leaf=array[one.part or 0]) for one in of_leaf]


def _save_arrays(output: Any, found: Sequence[Sample], path: Path, record: RunRecord) -> list[Path]:
    arrays = {str(own[0].place): _array(own[0]) for own in _by_leaf(found)}
    if not arrays:
        raise SettingsError(f"This output holds no arrays, tensors or images to save{_holds(output)}.")
    index = found[0].position.index if len(found) == 1 else None
    data = encode_arrays(arrays, path.suffix.lower())
    return [write_data(path, data), write_sidecar(path, record.of_sample(index))]


def _names(places: Sequence[OutputPlace]) -> list[str]:
    """Return what is put behind the stem of each file: nothing for a single one, the field if there are several."""
    if len(places) == 1:
        return [""]
    if len({place.field for place in places}) > 1:
        parts = [[place.field, *map(str, place.numbers)] for place in places]
    else:
        depth = min(len(place.numbers) for place in places)
        told = [at for at in range(depth) if len({place.numbers[at] for place in places}) > 1]
        parts = [[str(place.numbers[at]) for at in told] + list(map(str, place.numbers[depth:])) for place in places]
    names = ["-" + re.sub(r"\W+", "-", "-".join(one)).strip("-") for one in parts]
    if len({name.casefold() for name in names}) < len(names):  # or a file would take the place of another one
        return [f"{name}-{index}" for index, name in enumerate(names)]
    return names


def _by_leaf(found: Sequence[Sample]) -> list[list[Sample]]:
    of_leaves: dict[str, list[Sample]] = {}
    for one in found:
        of_leaves.setdefault(one.place.path, []).append(one)
    return list(of_leaves.values())


def _array(sample: Sample) -> Array:
    try:
        return as_array(sample.leaf)
    except TypeError as error:
        raise SettingsError(f"{sample.place} cannot be saved: {error}") from error


def _holds(output: Any) -> str:
    kinds = [f"{path or 'output'}: {kind_of(value)}" for path, value in leaves(output)]
    listed = ", ".join(kinds[:_LISTED]) + (", …" if len(kinds) > _LISTED else "")
    return f" (it has {listed})" if listed else " (it is empty)"
