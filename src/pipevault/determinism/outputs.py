"""What a pipeline returned, whatever it is: its pictures, arrays and plain values, by their place in it.

diffusers' outputs, dictionaries, tuples, lists of any depth, dataclasses and plain objects are walked through; PIL
images of any mode, NumPy arrays, tensors, text and numbers are what is found. torch is never imported here: an object
can be a tensor only where torch already is.
"""

from __future__ import annotations

import hashlib
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import TYPE_CHECKING, Any

from pipevault.determinism.describe import digest_array, is_instance, pixels_sha256
from pipevault.digest import digest_json
from pipevault.errors import SettingsError

if TYPE_CHECKING:
    import numpy as np

MOST_SLICES = 4096

_PLAIN = (str, bool, int, float)


def leaves(output: Any) -> Iterator[tuple[str, Any]]:
    """Yield each image, array, tensor and plain value of an output with its place, such as ``frames[0][3]``.

    ``None`` is left out, and what an object has under names that begin with an underscore. Anything else that is none
    of them is yielded as it is.
    """
    yield from _leaves(output, "", ())


def _leaves(value: Any, place: str, above: tuple[int, ...]) -> Iterator[tuple[str, Any]]:
    if value is None or id(value) in above:
        return
    inside = (*above, id(value))
    if is_media(value) or isinstance(value, (*_PLAIN, bytes)):
        yield place, value
    elif (named := _named_items(value)) is not None:
        for name, item in named:
            yield from _leaves(item, f"{place}.{name}" if place else name, inside)
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from _leaves(item, f"{place}[{index}]", inside)
    else:
        yield place, value


def _named_items(value: Any) -> list[tuple[str, Any]] | None:
    """The items of a container whose items have names."""
    if is_dataclass(value) and not isinstance(value, type):  # diffusers' outputs are mappings too
        return [(field.name, getattr(value, field.name, None)) for field in fields(value)]
    if isinstance(value, Mapping):
        return [(str(name), item) for name, item in value.items()]
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return list(zip(value._fields, value, strict=True))
    if callable(value) or is_instance(value, "numpy", "generic") or not hasattr(value, "__dict__"):
        return None
    return [(name, item) for name, item in vars(value).items() if not name.startswith("_") and not callable(item)]


def samples(output: Any) -> Iterator[tuple[str, Any]]:
    """Yield each image and each slice of an array along its first axis, with the place of the whole.

    An array of one dimension, or with over :data:`MOST_SLICES` slices, is a sound or a table: one sample.
    """
    for place, value in leaves(output):
        if is_media(value):
            yield from ((place, one) for one in _slices(value))


def _slices(value: Any) -> Any:
    if not is_array(value):
        return [value]
    if value.ndim == 0:
        return [value.reshape(1)]
    return [value] if value.ndim == 1 or value.shape[0] > MOST_SLICES else value


def is_media(value: Any) -> bool:
    """Return whether ``value`` is an image, an array or a tensor."""
    return is_instance(value, "PIL.Image", "Image") or is_array(value)


def is_array(value: Any) -> bool:
    """Return whether ``value`` is a NumPy array or a tensor."""
    return is_instance(value, "numpy", "ndarray") or is_instance(value, "torch", "Tensor")


def as_array(value: Any) -> np.ndarray[Any, Any]:
    """Return an image, array or tensor as NumPy has it; bfloat16, which NumPy lacks, as float32."""
    import numpy as np

    if is_instance(value, "torch", "Tensor"):
        plain = value.detach().cpu()
        return np.asarray((plain.float() if str(plain.dtype) == "torch.bfloat16" else plain).contiguous().numpy())
    return np.asarray(value)


def digests(output: Any) -> dict[str, Any]:
    """Return what a record keeps of an output, as plain JSON; it never raises for what an output holds.

    ``pixels``: SHA-256 of each image, and of each slice of an array along its first axis, in the order of their places.
    ``values``: SHA-256 of the text and numbers by their places, ``None`` if there are none. ``undigested``: for each
    place of which there is no digest the reason.
    """
    pixels: list[str] = []
    values: dict[str, Any] = {}
    undigested: dict[str, str] = {}
    for place, value in _leaves_that_can_be_reached(output, undigested):
        try:
            if is_array(value):
                pixels += [digest_array(one) for one in _slices(value)]
            elif is_media(value):
                pixels.append(pixels_sha256(value))
            else:
                values[place or "output"] = _plain(value)
        except Exception as error:  # torch, NumPy and Pillow raise anything for what has no bytes
            undigested[place or "output"] = f"{type(error).__name__}: {error}"[:200]
    return {
        "pixels": pixels,
        "values": digest_json(values).hex if values else None,
        "undigested": undigested,
    }


def _leaves_that_can_be_reached(output: Any, undigested: dict[str, str]) -> Iterator[tuple[str, Any]]:
    try:
        yield from leaves(output)
    except Exception as error:  # lists deeper than Python goes, and whatever an attribute raises
        undigested["output"] = f"{type(error).__name__}: {error}"[:200]


def _plain(value: Any) -> Any:
    if is_instance(value, "numpy", "generic"):
        value = value.item()
    if isinstance(value, bytes):
        return hashlib.sha256(value).hexdigest()
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, _PLAIN):
        return value
    raise TypeError(f"a {type(value).__name__} has no digest")


def join(outputs: Sequence[Any], place: str = "") -> Any:
    """Return the outputs of single samples as one of their batch: arrays and lists one after the other.

    What is equal in all of them stays as it is. :class:`SettingsError` names the place of what can be neither.
    """
    first = outputs[0]
    if any(type(one) is not type(first) for one in outputs):
        raise _cannot_join(outputs, place)
    if is_array(first):
        return _join_arrays(outputs, place)
    if (named := _named_items(first)) is not None and not is_media(first):
        others = [dict(_named_items(one) or ()) for one in outputs]
        joined = {
            name: join([one.get(name) for one in others], f"{place}.{name}" if place else name) for name, _ in named
        }
        return _rebuilt(first, joined)
    if isinstance(first, tuple):
        if any(len(one) != len(first) for one in outputs):
            raise _cannot_join(outputs, place)
        return tuple(join([one[index] for one in outputs], f"{place}[{index}]") for index in range(len(first)))
    if isinstance(first, list):
        return [item for one in outputs for item in one]
    if all(one is first or bool(one == first) for one in outputs):
        return first
    raise _cannot_join(outputs, place)


def _join_arrays(arrays: Sequence[Any], place: str) -> Any:
    if any(one.ndim == 0 for one in arrays):
        raise _cannot_join(arrays, place)
    if is_instance(arrays[0], "torch", "Tensor"):
        return sys.modules["torch"].cat(list(arrays))
    return sys.modules["numpy"].concatenate(arrays)


def _rebuilt(first: Any, items: dict[str, Any]) -> Any:
    """An object like ``first`` that holds ``items``."""
    if is_dataclass(first) and not isinstance(first, type):
        settable = {field.name for field in fields(first) if field.init}
        made = replace(first, **{name: item for name, item in items.items() if name in settable})
        for name in items.keys() - settable:
            object.__setattr__(made, name, items[name])
        return made
    if isinstance(first, tuple):
        return type(first)(*items.values())
    if type(first) is dict:
        return items
    if isinstance(first, Mapping):
        return type(first)(items)  # type: ignore[call-arg]
    made = object.__new__(type(first))
    vars(made).update({**vars(first), **items})
    return made


def _cannot_join(values: Sequence[Any], place: str) -> SettingsError:
    kinds = ", ".join(dict.fromkeys(type(one).__name__ for one in values))
    return SettingsError(
        f"The samples of a batch returned what cannot be made one output: {place or 'the output'} differs ({kinds}). "
        "Call the pipeline for one sample at a time, or load it at another level than invariant."
    )
