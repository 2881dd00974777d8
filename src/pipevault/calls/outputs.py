"""Outputs of any pipeline: their images, arrays and plain values, by their place in them.

Mappings, tuples, lists of any depth, dataclasses and plain objects are walked through. A *sample* is what has a digest
of its own: an image, or a slice of an array along its first axis. torch is never imported here.
"""

from __future__ import annotations

import sys
from collections.abc import Container, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from enum import Enum
from types import ModuleType
from typing import TYPE_CHECKING, Any

from pipevault.calls.describe import check_bytes, describe, digest_array, is_instance, pixels_sha256
from pipevault.digest import canonical_json, digest_json

if TYPE_CHECKING:
    import numpy as np

MOST_SLICES = 4096

_PLAIN = (str, bytes, bytearray, bool, int, float, Enum)
_LONGEST_REASON = 200


@dataclass(frozen=True)
class OutputPlace:
    """The place of something in an output: ``path`` is ``frames[1][3]``, ``field`` the names on the way (``frames``),
    ``numbers`` the places in lists (1, 3). The items of a tuple that a pipeline returned as a whole are fields.
    """

    path: str = ""
    field: str = ""
    numbers: tuple[int, ...] = ()

    def __str__(self) -> str:
        return self.path or "output"

    def named(self, name: Hashable) -> OutputPlace:
        step = f"[{name!r}]"
        if isinstance(name, str) and name.isidentifier():
            step = f".{name}" if self.path else name
        return OutputPlace(self.path + step, f"{self.field}.{name}" if self.field else str(name), self.numbers)

    def numbered(self, number: int) -> OutputPlace:
        return OutputPlace(f"{self.path}[{number}]", self.field, (*self.numbers, number))

    def in_tuple(self, number: int) -> OutputPlace:
        return self.numbered(number) if self.path else OutputPlace(f"[{number}]", str(number))


@dataclass(frozen=True)
class Position:
    """The place of a sample among the digests of its output (``None`` if it has none), and in its batch."""

    index: int | None
    number: int
    count: int


@dataclass(frozen=True)
class Sample:
    """An image, or slice ``part`` of the array ``leaf``; the whole array where ``part`` is ``None``."""

    place: OutputPlace
    leaf: Any
    part: int | None
    position: Position

    @property
    def value(self) -> Any:
        return self.leaf if self.part is None else self.leaf[self.part]

    @property
    def is_image(self) -> bool:
        return is_image(self.leaf)

    @property
    def content(self) -> Any:
        """The image itself, else the array as NumPy has it, with the ``TypeError`` of :func:`as_array`."""
        return self.leaf if self.is_image else as_array(self.value)


def leaves(output: Any) -> Iterator[tuple[str, Any]]:
    """Yield each image, array, tensor, plain value and unknown object of an output with its path: ``frames[0][3]``.
    ``None`` is left out, and what an object has under names that begin with an underscore, its modules and functions.
    """
    return ((place.path, value) for place, value in placed_leaves(output))


def placed_leaves(output: Any) -> Iterator[tuple[OutputPlace, Any]]:
    """Yield like :func:`leaves`, with a :class:`OutputPlace` for each path."""
    above: set[int] = set()
    open_containers: list[tuple[Any, Iterator[tuple[OutputPlace, Any]]]] = [(None, iter([(OutputPlace(), output)]))]
    while open_containers:
        container, items = open_containers[-1]
        found = next(items, None)
        if found is None:
            open_containers.pop()
            above.discard(id(container))
            continue
        place, value = found
        if value is None or id(value) in above:
            continue
        if (inside := _items(value, place)) is None:
            yield place, value
        else:
            above.add(id(value))
            open_containers.append((value, iter(inside)))


def samples(output: Any, undigested: Container[str] = ()) -> list[Sample]:
    """Return the samples of an output in the order of their digests; ``undigested`` is that of its record. An array of
    one dimension, or with over :data:`MOST_SLICES` slices, is a sound or a table: one sample.
    """
    found = [
        (place, leaf, part, place.numbers[0] if place.numbers else part or 0)
        for place, leaf in placed_leaves(output)
        if is_media(leaf)
        for part in _parts(leaf)
    ]
    counts: dict[str, int] = {}
    for place, _, _, number in found:
        counts[place.field] = max(counts.get(place.field, 0), number + 1)
    listed: list[Sample] = []
    digested = 0
    for place, leaf, part, number in found:
        has_digest = str(place) not in undigested
        position = Position(digested if has_digest else None, number, counts[place.field])
        digested += has_digest
        listed.append(Sample(place, leaf, part, position))
    return listed


def of_first_field(found: Sequence[Sample]) -> list[Sample]:
    """Return those of the samples that stand in the same field of an output as the first one."""
    return [one for one in found if one.place.field == found[0].place.field]


def digests(output: Any) -> dict[str, Any]:
    """Return what a record keeps of an output, as plain JSON; it never raises for what an output holds. ``pixels``:
    SHA-256 of each sample, in order. ``values``: SHA-256 over the text and numbers with their paths, ``None`` if there
    are none. ``undigested``: for each path without a digest the reason.
    """
    pixels: list[str] = []
    values: list[Any] = []
    undigested: dict[str, str] = {}
    for place, leaf in placed_leaves(output):
        try:
            if is_image(leaf):
                pixels.append(pixels_sha256(leaf))
            elif is_array(leaf):
                check_bytes(leaf)
                here = leaf.detach().cpu() if is_instance(leaf, "torch", "Tensor") else leaf
                pixels += [digest_array(here if part is None else here[part]) for part in _parts(leaf)]
            else:
                value = [place.path, plain_value(leaf)]
                canonical_json(value)  # not all text has UTF-8, and not all numbers have digits
                values.append(value)
        except Exception as error:  # torch, NumPy and Pillow raise anything for what has no bytes
            reason = str(error) or type(error).__name__
            undigested[str(place)] = reason.encode("utf-8", "backslashreplace").decode("utf-8")[:_LONGEST_REASON]
    return {"pixels": pixels, "values": digest_json(values).hex if values else None, "undigested": undigested}


def plain_value(leaf: Any) -> Any:
    """Return a leaf other than an image or an array as plain JSON; ``TypeError`` where that would not tell all."""
    described = describe(leaf)
    is_told = not isinstance(described, Mapping) or described["kind"] in ("float", "bytes") or isinstance(leaf, Enum)
    if not is_told or isinstance(leaf, (set, frozenset, Mapping, list, tuple)):
        raise TypeError(f"An object of class {type(leaf).__module__}.{type(leaf).__qualname__} has no digest.")
    return described


def is_media(value: Any) -> bool:
    """Return whether ``value`` is an image, an array or a tensor."""
    return is_image(value) or is_array(value)


def is_image(value: Any) -> bool:
    """Return whether ``value`` is a PIL image."""
    return is_instance(value, "PIL.Image", "Image")


def is_array(value: Any) -> bool:
    """Return whether ``value`` is a NumPy array or a tensor."""
    return is_instance(value, "numpy", "ndarray") or is_instance(value, "torch", "Tensor")


def kind_of(value: Any) -> str:
    """Return the class of a value, for messages; of an array with its shape."""
    shape = f" {list(value.shape)}" if is_array(value) else ""
    return type(value).__name__ + shape


def as_array(value: Any) -> np.ndarray[Any, Any]:
    """Return an image, array or tensor as NumPy has it: a palette as its RGBA colours, floats that NumPy lacks
    (bfloat16, float8) as float32. ``TypeError`` for a tensor that has no bytes (meta, sparse).
    """
    import numpy as np

    if is_image(value):
        return np.asarray(value.convert("RGBA") if value.mode in ("P", "PA") else value)
    if not is_instance(value, "torch", "Tensor"):
        return np.asarray(value)
    check_bytes(value)
    plain = value.detach().cpu().resolve_conj().resolve_neg()
    try:
        return np.asarray(plain.numpy())
    except TypeError:
        torch = sys.modules["torch"]
        return np.asarray(plain.to(torch.complex64 if plain.is_complex() else torch.float32).numpy())


def named_items(value: Any) -> dict[Any, Any] | None:
    """Return the items of a container whose items have names; ``None`` for any other value."""
    if is_dataclass(value) and not isinstance(value, type):  # diffusers' outputs are mappings too
        named = {one.name: getattr(value, one.name, None) for one in fields(value)}
        others = {**(value if isinstance(value, Mapping) else {}), **_attributes(value)}
        # A diffusers output that is given one dictionary has its items too.
        inside = {name for item in named.values() if isinstance(item, Mapping) for name in item}
        return {**named, **{name: item for name, item in others.items() if name not in inside}}
    if isinstance(value, Mapping):
        return dict(value.items())
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return dict(zip(value._fields, value, strict=True))
    is_other = isinstance(value, (list, tuple, set, frozenset, type, ModuleType, *_PLAIN))
    if is_other or callable(value) or is_media(value) or is_instance(value, "numpy", "generic"):
        return None
    return _attributes(value) or None


def held(value: Any) -> dict[str, Any]:
    """Return all that an object holds in its ``__dict__`` and its slots."""
    slots: list[str] = []
    for cls in type(value).__mro__:
        own = cls.__dict__.get("__slots__", ())
        slots += [own] if isinstance(own, str) else own
    in_slots = {name: getattr(value, name) for name in slots if not name.startswith("__") and hasattr(value, name)}
    return {**in_slots, **getattr(value, "__dict__", {})}


def key_text(name: Any, index: int) -> Hashable:
    """Return the name of item ``index``, or what has the same text in every process in its stead."""
    if isinstance(name, Enum):
        return name.name
    if isinstance(name, str):
        return str(name)
    return name if name is None or isinstance(name, (bool, int, float)) else f"{type(name).__name__} {index}"


def _items(value: Any, place: OutputPlace) -> list[tuple[OutputPlace, Any]] | None:
    """The items of a container, or ``None`` for what is none, and for one that cannot be looked into."""
    if is_media(value) or isinstance(value, _PLAIN):
        return None
    try:
        if (named := named_items(value)) is not None:
            return [(place.named(key_text(name, index)), item) for index, (name, item) in enumerate(named.items())]
        if isinstance(value, tuple):
            return [(place.in_tuple(index), item) for index, item in enumerate(value)]
        if isinstance(value, list):
            return [(place.numbered(index), item) for index, item in enumerate(value)]
    except Exception:  # a container of someone else may raise anything
        return None
    return None


def _attributes(value: Any) -> dict[str, Any]:
    """The public attributes of an object but for modules and functions."""
    return {
        name: item
        for name, item in held(value).items()
        if not name.startswith("_") and not isinstance(item, ModuleType) and (not callable(item) or is_media(item))
    }


def _parts(leaf: Any) -> Sequence[int | None]:
    if is_image(leaf) or leaf.ndim < 2 or leaf.shape[0] > MOST_SLICES:
        return (None,)
    return range(leaf.shape[0])
