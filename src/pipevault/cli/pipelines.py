"""Sizes, seeds, calls and requests from what a person types: ``512x512``, ``512x512..1024x768``, ``0..31``."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pipevault.demo import DIGIT_WORDS
from pipevault.demo import prompt as digit_prompt
from pipevault.errors import BadSeedError, SettingsError
from pipevault.opening import DEMO_MODEL

if TYPE_CHECKING:
    from pipevault.evidence.request import Request

DEMO_SHAPE: Mapping[str, Any] = {"batch_size": len(DIGIT_WORDS), "guidance": True}
"""The one call of ``pipevault demo``: every digit once, at the model's own size."""

_SIZE = re.compile(r"([1-9]\d{0,5})[xX×]([1-9]\d{0,5})")  # noqa: RUF001 - people type the multiplication sign
_SEEDS = re.compile(r"(-?\d{1,20})(?:\s*\.\.\s*(-?\d{1,20}))?")


def parse_size(text: str) -> dict[str, int]:
    """Return ``height`` and ``width`` of ``768x512`` in pixels; raise :class:`SettingsError` for other text."""
    if match := _SIZE.fullmatch(text.strip()):
        return {"height": int(match[2]), "width": int(match[1])}
    raise SettingsError(f"Invalid size {text!r}: expected WIDTHxHEIGHT, for example 768x512.")


def shape_of(model: str, size: str | None = None, **given: Any) -> dict[str, Any]:
    """Return the call to freeze, as arguments of ``PipelineCache.load``; what is ``None`` is the pipeline's own."""
    defaults = DEMO_SHAPE if model == DEMO_MODEL else {}
    shape = {**defaults, **{name: value for name, value in given.items() if value is not None}}
    if size is not None:
        ends = [parse_size(end) for end in size.split("..", 1)]
        for name, first in ends[0].items():
            last = ends[-1][name]
            shape[name] = first if first == last else (first, last)
    return shape


def parse_seeds(text: str, *, most: int) -> tuple[int, ...]:
    """Return the seeds of ``0..31``, ``0,5,9`` or ``0..3,10`` in this order. :class:`BadSeedError`,
    :class:`SettingsError`.
    """
    seeds: list[int] = []
    for item in map(str.strip, text.split(",")):
        if (match := _SEEDS.fullmatch(item)) is None:
            raise BadSeedError(f"Invalid seeds {text!r}: expected seeds such as 0..31, 0,5,9 or 0..3,10.", item)
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise BadSeedError(f"Invalid seeds {text!r}: {item} runs downwards. Write {last}..{first}.", item)
        if len(seeds) + last - first + 1 > most:
            raise SettingsError(f"Invalid seeds {text!r}: more than {most} seeds. Give up to {most}.")
        seeds += range(first, last + 1)
    return tuple(seeds)


def request_from(model: str, *, prompts: Sequence[str], seed: int, size: str | None, **asked: Any) -> Request:
    """Return what to generate, with the demo's own defaults and a seed that is known. :class:`SettingsError`."""
    sides: dict[str, Any] = {} if size is None else {**parse_size(size)}
    from pipevault.determinism.seeds import effective_seed
    from pipevault.evidence.request import Request

    if model == DEMO_MODEL and not prompts:
        prompts = [digit_prompt(digit) for digit in range(len(DIGIT_WORDS))]
    request = Request(prompts=tuple(prompts), seed=effective_seed(seed), **sides, **asked)
    return request.with_defaults_of(model)
