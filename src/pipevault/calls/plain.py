"""The walk from a Python value to plain JSON, for records and for keys; each says what its other objects become."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping
from enum import Enum
from typing import Any, TypeAlias

Inside: TypeAlias = "tuple[int, ...]"
"""The ids of the objects around a value."""


def _never(value: Any) -> bool:
    return False


def plain_json(
    value: Any,
    other: Callable[[Any, Inside], Any],
    *,
    text: Callable[[str], Any] = str,
    is_object: Callable[[Any], bool] = _never,
    inside: Inside = (),
) -> Any:
    """Return ``value`` as plain JSON.

    Plain values stand as they are, NumPy's numbers as Python's, sequences as lists, sets as sorted lists, mappings with
    their keys as text; a container inside itself is ``itself``. ``text`` makes what stands for a string, ``other`` for
    all else, enums, floats that are not finite and containers that ``is_object`` holds for objects included; it is
    given what is around them too. ``inside`` are the objects around ``value``.
    """
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, Enum):
        return other(value, inside)
    if isinstance(value, str):
        return text(value)
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else other(value, inside)
    if (numpy := sys.modules.get("numpy")) is not None and isinstance(value, numpy.generic):
        return plain_json(value.item(), other, text=text, is_object=is_object, inside=inside)
    if is_object(value) or not isinstance(value, (Mapping, list, tuple, set, frozenset)):
        return other(value, inside)
    if id(value) in inside:
        return "itself"

    def inner(item: Any) -> Any:
        return plain_json(item, other, text=text, is_object=is_object, inside=(*inside, id(value)))

    if isinstance(value, Mapping):
        return {str(name): inner(item) for name, item in value.items()}
    items = [inner(item) for item in value]
    return sorted(items, key=repr) if isinstance(value, (set, frozenset)) else items
