"""Saving what a pipeline returned, with its run record inside the file and beside it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from pipevault.determinism.embed import VIDEO_SUFFIXES, write_image, write_sidecar, write_video
from pipevault.errors import SettingsError
from pipevault.runtime.generation import record_of


def save(output: Any, path: str | Path, *, fps: float = 8.0) -> list[Path]:
    """Write the images or the video of ``output`` to ``path`` with the record in each file and as ``PATH.json``.

    One image goes to ``path`` itself, several to ``name-0.png``, ``name-1.png``, … The suffix decides the format: PNG,
    JPEG, WebP, or MP4 for frames. Raises :class:`SettingsError` if the output holds no PIL images, and the errors of
    :mod:`pipevault.determinism.embed`.
    """
    record, path = record_of(output), Path(path)
    images = images_of(output)
    if path.suffix.lower() in VIDEO_SUFFIXES:
        return [write_video(images, path, record, fps=fps), write_sidecar(path, record)]
    written: list[Path] = []
    for index, image in enumerate(images):
        target = path if len(images) == 1 else path.with_stem(f"{path.stem}-{index}")
        written += [
            write_image(image, target, record, index=index),
            write_sidecar(target, record.of_sample(index)),
        ]
    return written


def images_of(output: Any) -> list[Image.Image]:
    """The images of ``output``, or the frames of its first video. :class:`SettingsError` if it holds none."""
    for value in output.values() if isinstance(output, Mapping) else ():
        items = value if isinstance(value, list) else []
        if items and isinstance(items[0], list):
            items = items[0]  # the frames of the first video
        if items and all(isinstance(item, Image.Image) for item in items):
            return items
    raise SettingsError("This output holds no PIL images to save: call the pipeline with output_type='pil'.")
