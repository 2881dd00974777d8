"""The pictures that a failed check leaves: expected, actual, difference."""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
from PIL import Image

from pipevault.errors import CannotSaveError, NotComparableError
from pipevault.evidence.files import Array, write_data
from pipevault.evidence.golden.draw import Drawn, Sample
from pipevault.evidence.golden.files import Golden, picture_file, write_picture
from pipevault.evidence.metrics import heat_map
from pipevault.report.page import png_bytes

KINDS = ("expected", "actual", "difference")
_OURS = re.compile(rf"({'|'.join(KINDS)})(-\d+)?\.png")


def clear_pictures(folder: Path) -> None:
    """Take away what an earlier failed check left in ``folder``, and nothing else."""
    for path in list(folder.iterdir()) if folder.is_dir() else []:
        if _OURS.fullmatch(path.name):
            path.unlink()
    with suppress(OSError):  # something else is in it
        folder.rmdir()


def write_failure(folder: Path, golden: Golden, drawn: Drawn, indexes: list[int]) -> None:
    """Write pictures of the samples ``indexes``: the golden's, what came out, and a heat map of the difference.

    They are ``expected.png``, ``actual.png`` and ``difference.png``, with several samples ``expected-3.png`` and so
    on. Arrays are shown in shades of grey, their channels side by side. A sample that only one side has, or that has
    another size, has no heat map. :class:`CannotSaveError`.
    """
    several = max(len(golden.drawn.samples), len(drawn.samples)) > 1
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for index in indexes:
            number = f"-{index}" if several else ""
            _write_sample([folder / f"{kind}{number}.png" for kind in KINDS], golden, drawn, index)
    except OSError as error:
        raise CannotSaveError(
            f"The pictures of a failed check could not be written to {folder}: {error.strerror or error}. Give "
            "another folder.",
            folder,
        ) from error


def _write_sample(files: Sequence[Path], golden: Golden, drawn: Drawn, index: int) -> None:
    expected = golden.drawn.samples[index] if index < len(golden.drawn.samples) else None
    actual = drawn.samples[index] if index < len(drawn.samples) else None
    expected_file, actual_file, difference_file = files
    if isinstance(expected, Image.Image):
        write_data(expected_file, picture_file(golden.path, index).read_bytes())
    elif expected is not None:
        write_data(expected_file, png_bytes(_in_grey(expected, like=expected)))
    if isinstance(actual, Image.Image):
        write_picture(actual, actual_file, drawn.record, index)
    elif actual is not None:
        like = expected if isinstance(expected, np.ndarray) else actual
        write_data(actual_file, png_bytes(_in_grey(actual, like=like)))
    if expected is not None and actual is not None:
        with suppress(NotComparableError):  # of another size or type, which the message says
            write_data(difference_file, png_bytes(heat_map(_plane(expected), _plane(actual))))


def _plane(sample: Sample) -> Array:
    """Return an array as rows and columns, one channel next to the other; a picture as it is."""
    array = np.asarray(sample)
    if isinstance(sample, Image.Image) or array.ndim == 2 or (array.ndim == 3 and array.shape[-1] in (1, 3, 4)):
        return array
    if array.ndim < 2:
        return array.reshape(1, -1)
    return np.concatenate(list(array.reshape(-1, *array.shape[-2:])), axis=1)


def _in_grey(array: Array, *, like: Array) -> Image.Image:
    plane, scale = np.nan_to_num(_plane(array).astype(np.float64)), np.nan_to_num(like.astype(np.float64))
    low, high = float(scale.min()), float(scale.max())
    shades = np.clip((plane - low) / ((high - low) or 1.0), 0.0, 1.0)
    return Image.fromarray(np.rint(shades * 255).astype(np.uint8).squeeze())
