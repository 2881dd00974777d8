"""Seeds as a person types them: ``0..31``, ``0,5,9`` or ``0..3,10``; both ends of a range belong to it."""

from __future__ import annotations

import re

from pipevault.errors import BadSeedError, SettingsError

_RANGE = re.compile(r"(-?\d+)(?:\s*\.\.\s*(-?\d+))?")
_DIGITS = 20
"""Of the largest seed, 2**64 - 1."""


def parse_seeds(text: str, *, most: int) -> tuple[int, ...]:
    """In the order typed. :class:`BadSeedError` for what is no seed or comes twice; :class:`SettingsError` for none
    and for more than ``most``.
    """
    if not text.strip():
        raise SettingsError("--seeds is empty. Give seeds such as 0..31, 0,5,9 or 0..3,10.")
    seeds: dict[int, None] = {}
    for item in text.split(","):
        first, last = _ends(item.strip(), text)
        if len(seeds) + last - first + 1 > most:
            raise SettingsError(f"--seeds {text} are more than {most} seeds, which is the most that a sweep takes.")
        for seed in range(first, last + 1):
            if seed in seeds:
                raise BadSeedError(f"--seeds {text} has the seed {seed} twice. Give each once.", seed)
            seeds[seed] = None
    return tuple(seeds)


def _ends(item: str, text: str) -> tuple[int, int]:
    match = _RANGE.fullmatch(item)
    if not match:
        raise BadSeedError(f"--seeds {text}: {item!r} is no seed. Give seeds such as 0..31, 0,5,9 or 0..3,10.", item)
    first, last = match[1], match[2] or match[1]
    for number in (first, last):
        if number.startswith("-"):
            raise BadSeedError(f"--seeds {text}: {number} is negative. Give seeds from 0 to 2**64 - 1.", number)
        if len(number) > _DIGITS or int(number) >= 2**64:
            raise BadSeedError(f"--seeds {text}: {number} is too large. Give seeds from 0 to 2**64 - 1.", number)
    if int(last) < int(first):
        raise BadSeedError(f"--seeds {text}: {item} runs downwards. Write {last}..{first}.", item)
    return int(first), int(last)
