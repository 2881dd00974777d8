"""The walk from a Python value to plain JSON, for records and for keys; each says what its other objects become."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping
from enum import Enum
from typing import Any


def plain_json(
    value: Any, other: Callable[[Any], Any], *, text: Callable[[str], Any] = str, inside: tuple[int, ...] = ()
) -> Any:
    """Return ``value`` as plain JSON.

    Plain values stand as they are, NumPy's numbers as Python's, sequences as lists, sets as sorted lists, mappings with
    their keys as text; a container inside itself is ``itself``. ``text`` makes what stands for a string, ``other`` for
    all else, enums and floats that are not finite included. ``inside`` are the containers around ``value``.
    """
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, Enum):
        return other(value)
    if isinstance(value, str):
        return text(value)
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else other(value)
    if (numpy := sys.modules.get("numpy")) is not None and isinstance(value, numpy.generic):
        return plain_json(value.item(), other, text=text, inside=inside)
    if not isinstance(value, (Mapping, list, tuple, set, frozenset)):
        return other(value)
    if id(value) in inside:
        return "itself"

    def inner(item: Any) -> Any:
        return plain_json(item, other, text=text, inside=(*inside, id(value)))

    if isinstance(value, Mapping):
        return {str(name): inner(item) for name, item in value.items()}
    items = [inner(item) for item in value]
    return sorted(items, key=repr) if isinstance(value, (set, frozenset)) else items
