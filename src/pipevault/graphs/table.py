"""The graphs of one part in one state of its weights: which of them serves a call, opened when first used."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias
from weakref import WeakSet

import torch
from torch import nn

from pipevault.errors import VaultError, WrongMachineError
from pipevault.graphs.freezing import CallTimes, FrozenCall
from pipevault.graphs.frozen import FrozenGraph, GraphDocument, constant_sha256
from pipevault.graphs.library import GraphFiles
from pipevault.graphs.observe import follow, read_state
from pipevault.graphs.signature import UNREAD, CallSignature, DescribedCall, Leaf, describe_call

logger = logging.getLogger("pipevault")

_MAX_COVERED = 256
"""The number of sizes of which a table remembers by which ranges they are covered."""


@dataclass(frozen=True)
class ShelfItem:
    """A graph on a shelf, or the reason why there can be none for ``signature``.

    ``files`` opens the files of the graph and verifies them; it raises what is :data:`UNUSABLE`. ``key`` names the
    entry. ``opened`` are the graphs in use that came from the files.
    """

    signature: CallSignature
    key: str
    document: GraphDocument | None = None
    files: Callable[[], GraphFiles] | None = None
    refusal: str = ""
    times: CallTimes | None = None
    opened: WeakSet[FrozenGraph] = field(default_factory=WeakSet, compare=False)


class Shelf(Protocol):
    """The place of the graphs of one part identity, which parts such as equal blocks share."""

    identity: str

    def news(self, known: Collection[str]) -> Iterable[ShelfItem]:
        """Return everything on the shelf whose key is not ``known``."""

    def forget(self, key: str) -> None:
        """Look at an entry again when the shelf is asked next: its graph cannot be used."""

    def freezing(self, signature: CallSignature) -> AbstractContextManager[None]:
        """Hold the signature while a graph is made, so that one process makes it for all."""

    def keep(self, frozen: FrozenCall, seconds: float) -> ShelfItem:
        """Store a graph; what is returned is loaded like every other."""

    def refuse(self, signature: CallSignature, reason: str) -> ShelfItem:
        """Store that a call cannot be frozen."""


@dataclass
class Slot:
    """A graph at its place in a table. ``casts`` are the dtypes of inputs for which it was compared with eager code.

    ``_origins`` has the constants that were compared with those of the graph, their versions, and the results. They are
    held, because what is made after one is freed may have its identity. Inference tensors count no versions: they are
    compared each time.
    """

    kept: ShelfItem
    graph: FrozenGraph | None = None
    casts: set[tuple[str, ...]] = field(default_factory=set)
    _origins: list[tuple[torch.Tensor | None, int | None, bool]] = field(default_factory=list)

    @property
    def refusal(self) -> str:
        return self.kept.refusal

    def constants_fit(self, module: nn.Module) -> bool:
        """Return whether the attributes that the graph has as constants still hold the same numbers."""
        document = self.kept.document
        if document is None or not document.origins:
            return True
        stamps: list[tuple[torch.Tensor | None, int | None, bool]] = []
        for place, (_, steps, sha256) in enumerate(document.origins):
            tensor = follow(module, steps)
            if tensor is None:  # not filled yet: the part would make the very constant that the graph has
                stamps.append((None, None, True))
                continue
            version = None if tensor.is_inference() else tensor._version
            known = self._origins[place] if place < len(self._origins) else None
            if known is None or known[0] is not tensor or version is None or known[1] != version:
                known = (tensor, version, constant_sha256(tensor) == sha256)
            stamps.append(known)
        self._origins = stamps
        return all(fits for _, _, fits in stamps)


Found: TypeAlias = "tuple[Slot, DescribedCall, tuple[str, ...]]"
"""A slot for a call, the call as its graph takes it, and the dtypes of its inputs where they were cast for that."""


class Table:
    """The slots of a part by signature. ``shelf`` is asked for what is new when a call finds none."""

    def __init__(self, shelf: Shelf | None) -> None:
        self.shelf = shelf
        self.slots: list[Slot] = []
        self._lock = threading.Lock()
        self._by_signature: dict[CallSignature, list[Slot]] = {}
        self._loose: dict[CallSignature, list[Slot]] = {}
        self._ranges: dict[CallSignature, list[Slot]] = {}
        self._covered: dict[CallSignature, tuple[Slot, ...]] = {}
        self._states: tuple[tuple[tuple[str, ...], frozenset[str]], ...] = (((), frozenset()),)
        """The paths of state that a signature has, and which of them its calls set whatever they were."""

    @property
    def state_paths(self) -> tuple[str, ...]:
        return tuple(sorted({path for paths, _ in self._states for path in paths}))

    def add(self, kept: ShelfItem) -> Slot:
        with self._lock:
            for slot in self._by_signature.get(kept.signature.without_fixed, ()):
                same = slot.kept.signature == kept.signature and slot.kept.key == kept.key
                if same and (slot.kept.document is None) == (kept.document is None):
                    return slot
            slot = Slot(kept)
            self.slots.append(slot)
            self._covered.clear()
            self._by_signature.setdefault(kept.signature.without_fixed, []).append(slot)
            if kept.signature.is_range:
                ranges = self._ranges.setdefault(kept.signature.sizeless, [])
                ranges.append(slot)
                ranges.sort(key=lambda one: one.kept.signature.width)
            elif kept.document is not None:
                self._loose.setdefault(kept.signature.loose, []).append(slot)
            paths = kept.signature.state_paths, kept.signature.unread
            if paths not in self._states:
                self._states = (*self._states, paths)
            return slot

    def remove(self, slot: Slot) -> None:
        if self.shelf is not None:
            self.shelf.forget(slot.kept.key)
        with self._lock:
            self.slots = [other for other in self.slots if other is not slot]
            self._covered.clear()
            for listed in (*self._by_signature.values(), *self._loose.values(), *self._ranges.values()):
                if slot in listed:
                    listed.remove(slot)

    def read_shelf(self) -> None:
        if self.shelf is not None:
            for kept in self.shelf.news({slot.kept.key for slot in self.slots}):
                self.add(kept)

    def find(
        self, module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> tuple[Slot | None, DescribedCall]:
        """Return the slot for a call, one for its very sizes before ranges, and the call as its graph takes it."""
        call: DescribedCall | None = None
        for paths in reversed(self._states):  # state first: a graph without it is older knowledge
            call = describe_call(args, kwargs, _state(module, *paths))
            if call.opaque:
                continue
            for slot in self._candidates(call.signature):
                if slot.kept.signature.admits(call.leaves) and slot.constants_fit(module):
                    return slot, call
        assert call is not None
        return None, call

    def _candidates(self, signature: CallSignature) -> Iterator[Slot]:
        """The slots of the very signature, then those of the ranges that it is in, the tightest first."""
        yield from self._by_signature.get(signature, ())
        if not self._ranges:
            return
        covering = self._covered.get(signature)
        if covering is None:
            with self._lock:  # what another thread adds meanwhile must not be missing from what is remembered
                ranges = self._ranges.get(signature.sizeless, ())
                covering = tuple(slot for slot in ranges if slot.kept.signature.covers(signature))
                if len(self._covered) >= _MAX_COVERED:
                    self._covered.clear()
                self._covered[signature] = covering
        yield from covering

    def find_cast(self, module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Found | None:
        """Return a slot for the call with scalars and vectors cast to other dtypes that hold the same values."""
        for paths in reversed(self._states):
            call = describe_call(args, kwargs, _state(module, *paths))
            if call.opaque:
                continue
            for slot in self._loose.get(call.signature.loose, ()):
                if not slot.kept.signature.admits(call.leaves) or not slot.constants_fit(module):
                    continue
                cast = cast_leaves(call.leaves, [tensor[1] for _, tensor in slot.kept.signature.tensors])
                if cast is not None:
                    dtypes = tuple(str(leaf.dtype) for leaf in call.leaves if isinstance(leaf, torch.Tensor))
                    return slot, DescribedCall(call.signature, cast), dtypes
        return None

    def __iter__(self) -> Iterator[Slot]:
        return iter(tuple(self.slots))


def _state(module: nn.Module, paths: Sequence[str], unread: frozenset[str]) -> dict[str, Any]:
    read = read_state(module, [path for path in paths if path not in unread])
    return {path: read.get(path, UNREAD) for path in paths}


def cast_leaves(leaves: Sequence[Leaf], dtypes: Sequence[str]) -> tuple[Leaf, ...] | None:
    """Return ``leaves`` with their tensors in ``dtypes``; ``None`` if a value does not survive the cast."""
    wanted = iter(dtypes)
    result: list[Leaf] = []
    for leaf in leaves:
        if not isinstance(leaf, torch.Tensor):
            result.append(leaf)
            continue
        cast = leaf.to(getattr(torch, next(wanted)))
        if cast is not leaf and not bool((cast.to(leaf.dtype) == leaf).all()):
            return None
        result.append(cast)
    return tuple(result)


UNUSABLE = (VaultError, WrongMachineError)
"""The errors of a slot whose graph cannot be opened: it counts as absent."""
