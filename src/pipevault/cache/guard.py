"""The guard, which notices before a pixel is made that a frozen pipeline is no longer what was frozen.

A graph holds what the modules were when it was made: FreeU's scalars, attention processors, hooks, LoRA layers. The
guard keeps shallow copies of the attributes of every module and compares them before each generation, which takes
microseconds for a module. Only when something differs is the architecture computed again; if that is the frozen one
(a LoRA was fused and unloaded, a model filled a cache), the new attributes become the ones to compare with.

What surely changes the code (a module or a class that is another, a processor, a hook, FreeU's scalars, tiling) is an
error. What cannot be judged is put to the test: the part's next call runs eagerly too, and the change is accepted if
the output is the same.
"""

from __future__ import annotations

import logging
import weakref
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

from pipevault.errors import ChangedPartError
from pipevault.fingerprint.difference import changed_names
from pipevault.fingerprint.model import architecture, describe_difference, digest_and_snapshot, snapshot
from pipevault.graphs import parts as graph_parts
from pipevault.graphs.part import FrozenPart, part_state, unfrozen
from pipevault.pipeline import Pipeline

logger = logging.getLogger("pipevault")

_PREPARE = "PipelineCache.load(pipe)"
_CONTAINERS = (dict, list, set, OrderedDict)
# Tensors are watched by the graphs that are bound to them, and no inference runs the other hooks.
_UNWATCHED = frozenset(
    {
        *("_parameters", "_buffers", "_non_persistent_buffers_set", "_backward_hooks", "_backward_pre_hooks"),
        *("_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks_with_kwargs"),
        *("_state_dict_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks"),
    }
)
_SURE_NAMES = frozenset({"b1", "b2", "s1", "s2", "use_tiling", "use_slicing", "_chunk_size", "fused_projections"})
"""Scalars that change what a module computes: FreeU's, and the switches of diffusers' models."""


@dataclass(frozen=True)
class Change:
    """A difference between a module and what it was. ``is_sure``: it surely changes what the module computes."""

    text: str
    is_sure: bool
    digest: str


class WatchedModule:
    """A module as it is now, to be told later what changed about it."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self.digest, self._readable = digest_and_snapshot(module)
        self._accepted: set[str] = set()
        self._attributes = _attributes(module)

    def change(self) -> Change | None:
        """Return what is not as it was; ``None`` if nothing is, or if it was accepted."""
        if _unchanged(self._attributes):
            return None
        digest = architecture(self._module).digest
        if digest == self.digest or digest in self._accepted:
            self._attributes = _attributes(self._module)
            return None
        now = snapshot(self._module)
        text = describe_difference(self._readable, now) or "its structure changed"
        return Change(text, _is_sure(changed_names(self._readable, now)), digest)

    def settle(self, name: str, change: Change, difference: str, *, freeze_again: str = _PREPARE) -> None:
        """Take the module for unchanged after ``change`` if eager code, which ran too, shows no ``difference``."""
        if difference:
            raise changed_error(name, f"{change.text}; {difference}", freeze_again)
        logger.info("%s was changed (%s), which does not change what it computes", name, change.text)
        self._accepted.add(change.digest)


class Guard:
    """The guard of the frozen parts of a pipeline and the modules that own them, such as a VAE with its tiling. Making
    it takes tens of milliseconds, so it is made at the first generation and not at the load.
    """

    def __init__(self, pipe: Pipeline, digests: Mapping[str, str]) -> None:
        """``digests`` has the architecture digest of each frozen part from when it was frozen."""
        self._parts = {name: graph_parts.get_part(pipe, name) for name in digests}
        for name, part in self._parts.items():
            if not isinstance(part, FrozenPart):
                raise replaced_error(name, part)
        self._owners = {name: _owner_name(pipe, name) for name in digests}
        owners = {name: graph_parts.get_part(pipe, name) for name in sorted(set(self._owners.values()))}
        self._watched = {name: WatchedModule(module) for name, module in owners.items()}
        for name, digest in digests.items():
            watched = self._watched.get(name)
            if (watched.digest if watched else architecture(self._parts[name]).digest) != digest:
                raise changed_error(name, "its architecture is not the one that was loaded")

    def check(self, pipe: Pipeline, name: str | None = None) -> None:
        """Raise :class:`ChangedPartError` if a part changed; with ``name``, look at the owner of that part alone."""
        if name is not None:
            if name in self._owners:
                self._check_owner(self._owners[name])
            return
        for part_name, part in self._parts.items():
            now = graph_parts.get_part(pipe, part_name)
            if now is not part:
                raise replaced_error(part_name, now)
        for owner in self._watched:
            self._check_owner(owner)

    def _check_owner(self, owner: str) -> None:
        """Where it cannot be judged whether a change matters, have the next call of each frozen part of ``owner`` run
        eagerly too; equal outputs accept the change.
        """
        change = self._watched[owner].change()
        if change is None:
            return
        if change.is_sure:
            raise changed_error(owner, change.text)
        guard = weakref.ref(self)
        names = [name for name, its_owner in self._owners.items() if its_owner == owner]
        waiting = set(names)

        def judge(name: str, difference: str) -> None:
            if not difference:
                waiting.discard(name)
            mine = guard()
            if mine is not None and (difference or not waiting):
                mine._watched[owner].settle(owner, change, difference)

        for name in names:
            part_state(self._parts[name]).trial = partial(judge, name)


def changed_error(name: str, what: str, freeze_again: str = _PREPARE) -> ChangedPartError:
    """Return the error for a frozen part that was changed; ``freeze_again`` is the call that freezes its new state."""
    fuse = "Fuse the LoRA (pipe.fuse_lora()) and unload its layers, or undo" if "lora" in what.lower() else "Undo"
    return ChangedPartError(
        f"{name} was changed after it was frozen: {what}. {fuse} the change, or freeze the new state: call "
        f"{freeze_again} again.",
        name,
    )


def replaced_error(name: str, now: Any) -> ChangedPartError:
    return changed_error(name, f"it was replaced by another {type(now).__name__}")


def _owner_name(pipe: Pipeline, name: str) -> str:
    """The outermost module on the way to a part."""
    steps = name.split(".")
    for count in range(1, len(steps)):
        path = ".".join(steps[:count])
        if isinstance(graph_parts.get_part(pipe, path), nn.Module):
            return path
    return name


def _is_sure(names: set[str]) -> bool:
    """Return True if one of the changed names of two snapshots surely changes the code."""
    for name in names:
        _, colon, attribute = name.partition(":")
        if not colon or attribute in _SURE_NAMES or "processor" in attribute or "hook" in attribute:
            return True
    return False


Attributes = list[tuple[dict[str, Any], dict[str, Any], list[tuple[Any, Any]]]]


def _attributes(module: nn.Module) -> Attributes:
    """For each module its ``__dict__``, a copy of it, and copies of the containers in it."""
    found: Attributes = []
    for child in module.modules():
        own = unfrozen(child).__dict__
        watched = [value for name, value in own.items() if type(value) in _CONTAINERS and name not in _UNWATCHED]
        found.append((own, dict(own), [(value, type(value)(value)) for value in watched]))
    return found


def _unchanged(attributes: Attributes) -> bool:
    try:
        for own, before, containers in attributes:
            if own != before:
                return False
            for value, copy in containers:
                if value != copy:
                    return False
        return True
    except (RuntimeError, ValueError):
        return False  # tensors or arrays that are other objects have no single truth value
