"""The record of an output, for as long as the output lives, without a change to what the pipeline returned.

An object that takes attributes carries its record. For others, such as a bare list of frames or the tuple of
``return_dict=False``, the images, arrays and tensors in it are remembered.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any

from pipevault.determinism.outputs import is_media, leaves
from pipevault.determinism.record import RunRecord
from pipevault.errors import SettingsError

RECORD_ATTRIBUTE = "_pipevault_record"


class _ByIdentity:
    """Records by the identity of an object, which is forgotten with it."""

    def __init__(self) -> None:
        self._lock = threading.RLock()  # a collection inside the lock may call _forget
        self._records: dict[int, tuple[weakref.ref[Any], RunRecord]] = {}

    def remember(self, thing: Any, record: RunRecord) -> None:
        key = id(thing)
        reference = weakref.ref(thing, lambda gone: self._forget(key, gone))
        with self._lock:
            self._records[key] = (reference, record)

    def find(self, thing: Any) -> RunRecord | None:
        with self._lock:
            reference, record = self._records.get(id(thing), (None, None))
        return record if reference is not None and reference() is thing else None

    def _forget(self, key: int, gone: weakref.ref[Any]) -> None:
        with self._lock:
            if key in self._records and self._records[key][0] is gone:
                del self._records[key]

    def __len__(self) -> int:
        return len(self._records)


_OF_LEAVES = _ByIdentity()


def attach_record(output: Any, record: RunRecord, arguments: Mapping[str, Any]) -> Any:
    """Remember ``record`` for ``output``, which is returned; ``arguments`` are those of the call.

    What was handed in and comes out again belongs to no one generation.
    """
    given = {id(value) for value in _media(dict(arguments))}
    for value in _media(output):
        if id(value) not in given:
            _OF_LEAVES.remember(value, record)
    if not is_media(output):
        with suppress(AttributeError, TypeError):  # a list, a tuple, a slotted object: found by what is in it
            object.__setattr__(output, RECORD_ATTRIBUTE, record)
    return output


def record_of(output: Any) -> RunRecord:
    """Return the record of the generation that returned ``output``, or an image, array or tensor in it.

    :class:`SettingsError` if it has none.
    """
    own = getattr(output, "__dict__", {}).get(RECORD_ATTRIBUTE)
    if isinstance(own, RunRecord):
        return own
    for value in _media(output):
        if (found := _OF_LEAVES.find(value)) is not None:
            return found
    raise SettingsError(
        f"This {type(output).__name__} has no run record: give what a pipeline that pipevault loaded returned, with "
        "the images, arrays or tensors in it."
    )


def _media(output: Any) -> Iterator[Any]:
    found = leaves(output)
    while True:
        try:
            value = next(found)[1]
        except StopIteration:
            return
        except Exception:  # lists deeper than Python goes: the record says so, and the output is still returned
            return
        if is_media(value):
            yield value
