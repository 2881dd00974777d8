"""The record of an output, for as long as the output lives, without a change to what the pipeline returned.

An object that takes attributes carries its record. For others, such as a bare list of frames, the images, arrays and
tensors in it are remembered, and which of the record's digests are theirs: each of them has its record, too.
"""

from __future__ import annotations

import weakref
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from pipevault.calls.outputs import Position, is_media, placed_leaves, samples
from pipevault.errors import SettingsError
from pipevault.runtime.record import RunRecord

RECORD_ATTRIBUTE = "_pipevault_record"


@dataclass(frozen=True)
class Origin:
    """The generation that an image, array or tensor came from; ``positions`` has one for each of its samples."""

    record: RunRecord
    positions: tuple[Position, ...]


_OF_LEAVES: dict[int, tuple[weakref.ref[Any], Origin]] = {}
"""Origins by the identity of an image, array or tensor, which are forgotten with it.

No lock: an identity is given to no other object before the callbacks of the old one have returned.
"""


def _remember(leaf: Any, origin: Origin) -> None:
    key, origins = id(leaf), _OF_LEAVES  # a module's names may be gone when the interpreter ends
    origins[key] = weakref.ref(leaf, lambda _: origins.pop(key, None)), origin


def attach_record(output: Any, record: RunRecord, inputs: Any) -> Any:
    """Remember ``record`` for ``output``, which is returned. What came in with ``inputs``, the arguments of the call,
    and comes out again belongs to no one generation.
    """
    given = {id(leaf) for leaf in _media(inputs)}
    positions: dict[int, tuple[Any, list[Position]]] = {}
    for sample in samples(output, record.results["undigested"]):
        positions.setdefault(id(sample.leaf), (sample.leaf, []))[1].append(sample.position)
    for leaf, own in positions.values():
        if id(leaf) not in given:
            with suppress(TypeError):  # a subclass without weak references
                _remember(leaf, Origin(record, tuple(own)))
    if not is_media(output) and not callable(output):  # a pipeline may return itself, which is not an output
        with suppress(AttributeError, TypeError):  # a list, a tuple, a slotted object: found by what is in it
            object.__setattr__(output, RECORD_ATTRIBUTE, record)
    return output


def record_of(output: Any) -> RunRecord:
    """Return the record of the generation that returned ``output``, or an image, array or tensor in it.

    :class:`SettingsError` if it has none, or if it was put together from what several generations returned.
    """
    own = getattr(output, "__dict__", {}).get(RECORD_ATTRIBUTE)
    if isinstance(own, RunRecord):
        return own
    media = _media(output)
    found = {id(origin.record): origin.record for leaf in media if (origin := origin_of(leaf)) is not None}
    if len(found) == 1:
        return next(iter(found.values()))
    kind = type(output).__name__
    if found:
        raise SettingsError(
            f"This {kind} was put together from what {len(found)} generations returned, each of which has a record of "
            "its own. Give what one call returned."
        )
    reason = "" if media else f", and this one holds no image, array or tensor that tells it from any other {kind}"
    raise SettingsError(
        f"This {kind} has no run record: the call of a pipeline that pipevault loaded remembers what it returned"
        f"{reason}. Give what the pipeline returned, not a copy."
    )


def origin_of(leaf: Any) -> Origin | None:
    """Return what generation an image, array or tensor came from, if one returned this very object."""
    reference, origin = _OF_LEAVES.get(id(leaf), (None, None))
    return origin if reference is not None and reference() is leaf else None


def _media(output: Any) -> list[Any]:
    return [leaf for _, leaf in placed_leaves(output) if is_media(leaf)]
