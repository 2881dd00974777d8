"""Noticing before a pixel is made that a frozen pipeline is no longer what was frozen.

A graph holds what the modules were when it was made: FreeU's scalars, attention processors, hooks, LoRA layers. The
guard keeps shallow copies of the attributes of every module and compares them before each generation, which takes
microseconds for a module. Only when something differs is the architecture computed again; if that is the frozen one
(a LoRA was fused and unloaded, say), the new attributes become the ones to compare with.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from pipevault.errors import ChangedPartError
from pipevault.fingerprint.model import architecture, describe_difference, snapshot
from pipevault.graphs import parts as graph_parts
from pipevault.graphs.part import FrozenPart, unfrozen

_CONTAINERS = (dict, list, set, OrderedDict)
# Tensors are watched by the graphs that are bound to them, and no inference runs the other hooks.
_UNWATCHED = frozenset(
    {
        *("_parameters", "_buffers", "_non_persistent_buffers_set", "_backward_hooks", "_backward_pre_hooks"),
        *("_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks_with_kwargs"),
        *("_state_dict_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks"),
    }
)


class Guard:
    """Watches the frozen parts of a pipeline and the modules that own them, such as a VAE with its tiling.

    Making it takes tens of milliseconds, so a pipeline makes its own at the first generation and not when it is loaded.
    """

    def __init__(self, pipe: Any, digests: Mapping[str, str]) -> None:
        """``digests`` has the architecture digest of each frozen part from when it was frozen."""
        self._parts = {name: graph_parts.get_part(pipe, name) for name in digests}
        for name, digest in digests.items():
            part = self._parts[name]
            if not isinstance(part, FrozenPart):
                self._fail(name, f"it was replaced by another {type(part).__name__}")
            if architecture(part)["digest"] != digest:
                self._fail(name, "its architecture is not the one that was loaded")
        owners = {name.partition(".")[0] for name in digests}
        self._watched = {name: graph_parts.get_part(pipe, name) for name in sorted(owners)}
        self._digests = {name: architecture(module)["digest"] for name, module in self._watched.items()}
        self._readable = {name: snapshot(module) for name, module in self._watched.items()}
        self._attributes = {name: _attributes(module) for name, module in self._watched.items()}

    def check(self, pipe: Any) -> None:
        """Raises :class:`ChangedPartError` that names what changed and what to do."""
        for name, part in self._parts.items():
            now = graph_parts.get_part(pipe, name)
            if now is not part:
                self._fail(name, f"it was replaced by another {type(now).__name__}")
        for name, module in self._watched.items():
            if _unchanged(self._attributes[name]):
                continue
            if architecture(module)["digest"] == self._digests[name]:
                self._attributes[name] = _attributes(module)
                continue
            self._fail(name, describe_difference(self._readable[name], snapshot(module)) or "its structure changed")

    def _fail(self, name: str, what: str) -> None:
        raise ChangedPartError(
            f"{name} was changed after it was frozen: {what}. Undo the change, or freeze the new state: call "
            "PipelineCache.load(pipe) again.",
            name,
        )


Attributes = list[tuple[dict[str, Any], dict[str, Any], list[tuple[Any, Any]]]]


def _attributes(module: nn.Module) -> Attributes:
    """For each module its ``__dict__``, a copy of it, and copies of the containers in it."""
    return [
        (own, dict(own), [(value, type(value)(value)) for value in _containers(own)])
        for own in (unfrozen(child).__dict__ for child in module.modules())
    ]


def _containers(attributes: Mapping[str, Any]) -> Iterator[Any]:
    for name, value in attributes.items():
        if type(value) in _CONTAINERS and name not in _UNWATCHED:
            yield value


def _unchanged(attributes: Attributes) -> bool:
    try:
        return all(
            own == before and all(value == copy for value, copy in containers) for own, before, containers in attributes
        )
    except (RuntimeError, ValueError):
        return False  # tensors or arrays that are other objects have no single truth value
