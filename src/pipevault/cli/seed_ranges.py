"""Seeds as a person types them: ``0..31``, ``0,5,9`` or ``0..3,10``; both ends of a range belong to it."""

from __future__ import annotations

import re

from pipevault.errors import BadSeedError, SettingsError

_RANGE = re.compile(r"(-?\d{1,20})(?:\s*\.\.\s*(-?\d{1,20}))?")


def parse_seeds(text: str, *, most: int) -> tuple[int, ...]:
    """Return the seeds in the order typed. :class:`BadSeedError` for other text, :class:`SettingsError` for more than
    ``most``.
    """
    seeds: list[int] = []
    for item in map(str.strip, text.split(",")):
        if (match := _RANGE.fullmatch(item)) is None:
            raise BadSeedError(f"Invalid seeds {text!r}: expected seeds such as 0..31, 0,5,9 or 0..3,10.", item)
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise BadSeedError(f"Invalid seeds {text!r}: {item} runs downwards. Write {last}..{first}.", item)
        if len(seeds) + last - first + 1 > most:
            raise SettingsError(f"Invalid seeds {text!r}: more than {most} seeds. Give up to {most}.")
        seeds += range(first, last + 1)
    return tuple(seeds)
