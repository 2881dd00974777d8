"""The calls to freeze, from what a person types: ``512x512``, ``512x512..1024x768``."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from pipevault.demo import DIGIT_WORDS
from pipevault.errors import SettingsError
from pipevault.opening import DEMO_MODEL

DEMO_SHAPE: Mapping[str, Any] = {"batch_size": len(DIGIT_WORDS), "guidance": True}
"""The one call of ``pipevault demo``: every digit once, at the model's own size."""

_SIZE = re.compile(r"([1-9]\d{0,5})[xX×]([1-9]\d{0,5})")  # noqa: RUF001 - people type the multiplication sign


class Size(NamedTuple):
    """Pixels of a picture, typed as ``WIDTHxHEIGHT``."""

    width: int
    height: int


def parse_size(text: str) -> Size:
    """Return the size of ``768x512``; raise :class:`SettingsError` for other text."""
    if match := _SIZE.fullmatch(text.strip()):
        return Size(int(match[1]), int(match[2]))
    raise SettingsError(f"Invalid size {text!r}: expected WIDTHxHEIGHT, for example 768x512.")


def parse_sizes(text: str) -> dict[str, int | tuple[int, int]]:
    """Return ``height`` and ``width`` of ``768x512``, or of a range of sizes, ``512x512..1024x768``."""
    least, dots, most = text.partition("..")
    if not dots:
        size = parse_size(text)
        return {"height": size.height, "width": size.width}
    first, last = parse_size(least), parse_size(most)
    ends = {"height": (first.height, last.height), "width": (first.width, last.width)}
    return {name: end if end[0] != end[1] else end[0] for name, end in ends.items()}


def shapes_of(
    model: str,
    sizes: Sequence[str],
    *,
    batch_size: int | tuple[int, int] | None = None,
    num_frames: int | tuple[int, int] | None = None,
    guidance: bool | None = None,
) -> list[dict[str, Any]]:
    """Return the calls to freeze, each as arguments of ``PipelineCache.load``; no size means the pipeline's own."""
    given = {"batch_size": batch_size, "num_frames": num_frames, "guidance": guidance}
    defaults = DEMO_SHAPE if model == DEMO_MODEL else {}
    call = {**defaults, **{name: value for name, value in given.items() if value is not None}}
    if not sizes:
        return [call]
    return [{**call, **parse_sizes(size)} for size in sizes]
