"""Making the outputs of single samples one output of their batch, of the kind that the pipeline returns."""

from __future__ import annotations

import copy
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

from pipevault.calls.describe import is_instance
from pipevault.calls.outputs import OutputPlace, digests, held, is_array, is_image, key_text, kind_of, named_items
from pipevault.errors import SettingsError

_WAYS_OUT = "Call the pipeline for one sample at a time, or load it at another level than invariant."


def join(outputs: Sequence[Any]) -> Any:
    """Return the outputs of single samples as one of their batch: arrays and lists one after the other.

    What is equal in all of them stays as it is. :class:`SettingsError` names the place of what can be neither.
    """
    return _join(outputs, OutputPlace())


def _join(outputs: Sequence[Any], place: OutputPlace) -> Any:
    first = outputs[0]
    if any(type(one) is not type(first) for one in outputs):
        raise _cannot_join(outputs, place)
    if is_array(first):
        return _join_arrays(outputs, place)
    if isinstance(first, list):
        return _rebuilt(first, [item for one in outputs for item in one], place)
    if named_items(first) is not None:
        return _rebuilt(first, _join_named(outputs, place), place)
    if isinstance(first, tuple) and (not place.path or any(_is_joinable(item) for item in first)):
        if any(len(one) != len(first) for one in outputs):
            raise _cannot_join(outputs, place)
        return tuple(_join([one[index] for one in outputs], place.in_tuple(index)) for index in range(len(first)))
    if all(_same(one, first) for one in outputs):
        return first
    if isinstance(first, tuple):  # a list by another name
        return tuple(item for one in outputs for item in one)
    raise _cannot_join(outputs, place)


def _join_named(outputs: Sequence[Any], place: OutputPlace) -> dict[Any, Any]:
    named = [named_items(one) or {} for one in outputs]
    if any(one.keys() != named[0].keys() for one in named):
        raise _cannot_join(outputs, place)
    return {
        name: _join([one[name] for one in named], place.named(key_text(name, index)))
        for index, name in enumerate(named[0])
    }


def _join_arrays(arrays: Sequence[Any], place: OutputPlace) -> Any:
    if any(one.ndim == 0 for one in arrays):
        if all(_same(one, arrays[0]) for one in arrays):
            return arrays[0]
        raise _cannot_join(arrays, place)
    try:
        if is_instance(arrays[0], "torch", "Tensor"):
            return sys.modules["torch"].cat(list(arrays))
        return sys.modules["numpy"].concatenate(arrays)
    except (RuntimeError, TypeError, ValueError) as error:
        raise _cannot_join(arrays, place) from error


def _is_joinable(value: Any) -> bool:
    return isinstance(value, (list, tuple)) or is_array(value) or named_items(value) is not None


def _same(one: Any, other: Any) -> bool:
    if one is other:
        return True
    try:
        if is_image(one) or (found := digests(one))["undigested"]:
            return bool(one == other)
        return found == digests(other)
    except Exception:  # what cannot be compared is not known to be equal
        return False


def _rebuilt(first: Any, items: Any, place: OutputPlace) -> Any:
    """A container like ``first`` that holds ``items``."""
    kind: Any = type(first)
    if kind in (list, dict):
        return items
    try:
        if isinstance(first, tuple):
            return kind(*items.values())
        if isinstance(first, list):
            made = copy.copy(first)
            made[:] = items
            return made
        if isinstance(first, defaultdict):
            return kind(first.default_factory, items)
        is_mapping = isinstance(first, Mapping)
        if is_mapping and not is_dataclass(first):
            return kind(items)
        if is_dataclass(first) and not is_mapping:
            made_of_others = [one.name for one in fields(first) if not one.init]
            if hasattr(kind, "__post_init__"):
                made_of_others += held(first).keys() - {one.name for one in fields(first)}
            if made_of_others:
                raise TypeError(f"it makes {', '.join(made_of_others)} of its other fields")
        made = copy.copy(first) if is_mapping else object.__new__(kind)
        for name, item in (items if is_mapping else {**held(first), **items}).items():
            if is_mapping and name in first:  # diffusers' outputs keep their items next to their attributes
                made[name] = item
            else:
                object.__setattr__(made, name, item)  # frozen ones too
        return made
    except Exception as error:  # a class of someone else may raise anything
        raise SettingsError(
            f"The samples of a batch cannot be made one output: {place} is a {type(first).__name__}, and making "
            f"another one failed ({type(error).__name__}: {error}). {_WAYS_OUT}"
        ) from error


def _cannot_join(values: Sequence[Any], place: OutputPlace) -> SettingsError:
    kinds = ", ".join(dict.fromkeys(kind_of(one) for one in values))
    return SettingsError(
        f"The samples of a batch returned what cannot be made one output: {place if place.path else 'the output'} "
        f"differs ({kinds}). {_WAYS_OUT}"
    )
