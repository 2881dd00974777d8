"""The calls that a pipeline makes of its parts, seen while it runs eagerly: what has to be frozen, before it is.

Parts of one identity, such as the blocks of a transformer, share their graphs, so one call of each signature is kept
for them all. Calls that differ in nothing but sizes may share a graph for a range of sizes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from pipevault.graphs.freezing import SizedCall
from pipevault.graphs.observe import PlainCall, copied, observe_plain
from pipevault.graphs.signature import CallSignature, DescribedCall, describe_call
from pipevault.graphs.state import PartState

MAX_SIZES = 4
"""The number of graphs of a part that may differ in sizes alone, in one run of a pipeline, before a range is tried."""
MAX_HELD = 4
"""The number of calls of one run, alike but for sizes, whose arguments are held: the largest, the smallest, and others
to compare a graph with. A long video has a hundred such calls, and each may take hundreds of megabytes.
"""


@dataclass(frozen=True)
class CapturedCall:
    """One call of a part, with copies of its arguments. ``causes`` are the arguments of the pipeline, such as
    ``height``, that differed from those of the first run. ``seen`` is the call as it was made, where it was plain.
    """

    state: PartState
    identity: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    described: DescribedCall
    causes: frozenset[str]
    placement: tuple[Any, ...]
    seen: PlainCall | None

    @property
    def still_seen(self) -> PlainCall | None:
        return self.seen if self.seen is not None and self.seen.is_as_then else None

    @property
    def is_as_then(self) -> bool:
        """True if the call would be the same one now: weights are where they were, under the same autocast."""
        same = describe_call(self.args, self.kwargs).signature == self.described.signature
        return same and _placement(self.state) == self.placement


@dataclass(frozen=True)
class Task:
    """A call to freeze; with ``others`` for the whole range of their sizes."""

    call: CapturedCall
    others: tuple[CapturedCall, ...] = ()

    @property
    def order(self) -> tuple[Any, ...]:
        """The key to sort by: longest to compile first; a property of the graph alone."""
        modules = sum(1 for _ in self.call.state.module.modules())
        return -modules, self.call.identity, self.call.described.signature.digest, len(self.others)

    @property
    def is_as_then(self) -> bool:
        return all(one.is_as_then for one in (self.call, *self.others))

    def sized(self) -> tuple[SizedCall, ...]:
        return tuple(
            SizedCall(describe_call(one.args, one.kwargs), one.causes - self.call.causes, one.still_seen)
            for one in self.others
        )


class Capture:
    """The calls of eager runs of a pipeline."""

    def __init__(self) -> None:
        self._calls: dict[tuple[str, CallSignature], CapturedCall | None] = {}
        """By identity and signature; ``None`` stands for a call that was let go."""
        self._causes: frozenset[str] = frozenset()

    def __call__(self, state: PartState, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Make the call, note it if it is the first of its signature, and return what it returns."""
        with torch._C.DisableTorchFunction():
            described = describe_call(args, kwargs)
            shelf = None if described.opaque else state.table_on(described.device).shelf
            identity = shelf.identity if shelf else state.name
            is_new = not described.opaque and (identity, described.signature) not in self._calls
            held_args, held_kwargs = copied((tuple(args), dict(kwargs))) if is_new else ((), {})
        if not is_new:
            return state.eager(*args, **kwargs)
        output, seen = observe_plain(state.module, state.eager, args, kwargs)
        call = CapturedCall(state, identity, held_args, held_kwargs, described, self._causes, _placement(state), seen)
        self._calls[identity, described.signature] = call
        self._let_one_go(identity, call)
        return output

    def _let_one_go(self, identity: str, new: CapturedCall) -> None:
        """Keep :data:`MAX_HELD` calls of the run that are like ``new``: not the one nearest to the smallest."""
        sizeless, ones = new.described.signature.sizeless, _ones(new.described.signature)
        alike = [
            (_elements(call), place)
            for place, call in self._calls.items()
            if call is not None
            and place[0] == identity
            and call.causes == new.causes
            and place[1].sizeless == sizeless
            and _ones(place[1]) == ones
        ]
        if len(alike) > MAX_HELD:
            alike.sort(key=lambda one: one[0])
            self._calls[alike[1][1]] = None

    @contextmanager
    def run(self, states: Mapping[str, PartState], causes: Iterable[str] = ()) -> Iterator[None]:
        """Note the calls of ``states`` inside, and how the run differs from the first one; forget one that fails."""
        before, self._causes = dict(self._calls), frozenset(causes)
        for state in states.values():
            state.capture = self
        try:
            yield
        except BaseException:  # whatever it was goes on
            self._calls = before
            raise
        finally:
            for state in states.values():
                state.capture = None

    def tasks(self, *, ranges: bool) -> list[Task]:
        """Return what to freeze: the calls one by one, but for those of many sizes. With ``ranges``, two are many."""
        groups: dict[tuple[str, CallSignature], list[CapturedCall | None]] = {}
        for (identity, signature), call in self._calls.items():
            groups.setdefault((identity, signature.sizeless), []).append(call)
        tasks = []
        for group in groups.values():
            let_go = group.count(None)
            for calls in _apart([call for call in group if call is not None]):
                if len(calls) == 1 or (not ranges and len(calls) + let_go <= MAX_SIZES):
                    tasks += [Task(call) for call in calls]
                    continue
                # The first run's largest call has the sizes that code is tuned for.
                calls.sort(key=lambda call: (len(call.causes), -_elements(call)))
                tasks.append(Task(calls[0], tuple(calls[1:])))
        return tasks


def _apart(calls: Sequence[CapturedCall]) -> list[list[CapturedCall]]:
    """The calls by which of their sizes are 1: torch compiles a size of 1 as a constant, also where it varies."""
    columns = list(zip(*(call.described.signature.sizes for call in calls), strict=True))
    varying = [index for index, sizes in enumerate(columns) if len(set(sizes)) > 1]
    parts: dict[tuple[int, ...], list[CapturedCall]] = {}
    for call in calls:
        sizes = call.described.signature.sizes
        parts.setdefault(tuple(index for index in varying if sizes[index] == 1), []).append(call)
    return list(parts.values())


def _ones(signature: CallSignature) -> tuple[int, ...]:
    return tuple(index for index, size in enumerate(signature.sizes) if size == 1)


def _placement(state: PartState) -> tuple[Any, ...]:
    return tuple((p.device, p.dtype) for p in state.module.parameters())


def _elements(call: CapturedCall) -> int:
    return sum(math.prod(tensor.shape) for tensor in call.described.tensors)
