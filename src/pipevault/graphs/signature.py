"""The signature of one call of a part: what decides which frozen graph may serve it.

A signature is a nested tuple of plain values (:data:`Shape`), so that it can be a dictionary key at run time and
JSON on disk. Tensors count by dtype, shape and device type; containers by type and structure; Python numbers by their
type, because a graph takes most of them as inputs; other leaves by type and value, because ``torch.export`` compiles
those in. A number that steers the code is *fixed*: its value is part of the signature too. A part that keeps state on
its modules has that state described next to its arguments.
"""

from __future__ import annotations

import itertools
import json
import math
from collections import namedtuple
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any, TypeAlias

import numpy as np
import torch
from torch.utils import _pytree as pytree

from pipevault.digest import Digest, canonical_json, digest_bytes
from pipevault.graphs.ranges import Size, Symbol, expression, solve

Shape: TypeAlias = tuple[Any, ...]
Leaf: TypeAlias = "torch.Tensor | int | float"


class _Mark(Enum):
    """A value that stands for an attribute's own."""

    ABSENT = "absent"
    UNREAD = "unread"

    def __repr__(self) -> str:
        return self.value


ABSENT = _Mark.ABSENT
"""The value of an attribute that is not there."""
UNREAD = _Mark.UNREAD
"""The value of an attribute that a call sets without a look at what it was."""

_REAL_DTYPES = frozenset({"int32", "int64", "float32", "float64"})
_LARGEST_CAST_DIM = 1
_CHILDLESS = frozenset({"value", "number", "opaque", "absent", "unread"})
"""Kinds of shapes, other than ``tensor``, that have no children."""


@dataclass(frozen=True)
class CallSignature:
    """The signature of a call, which is its identity.

    ``autocast`` names the dtype of an active autocast, which changes the arithmetic. ``state`` has path and shape of
    each piece of state on the modules. ``fixed`` has the index, among the leaves of the call, and the text of each
    number whose value is compiled in. A signature of a range of sizes has ``symbols``, expressions in them among the
    sizes of its tensors, and ``conditions``: see :mod:`pipevault.graphs.ranges`. ``counted`` has for each number that
    is the size of a tensor, and steers the code as such, its index and those of the tensor and of the dimension.
    """

    arguments: Shape
    autocast: str | None = None
    state: tuple[tuple[str, Shape], ...] = ()
    fixed: tuple[tuple[int, str], ...] = ()
    symbols: tuple[Symbol, ...] = ()
    conditions: tuple[str, ...] = ()
    counted: tuple[tuple[int, int, int], ...] = ()

    def to_json(self) -> dict[str, Any]:
        symbols = [(one.name, one.least, one.most) for one in self.symbols]
        return {
            "arguments": self.arguments,
            "autocast": self.autocast,
            "state": self.state,
            "fixed": self.fixed,
            **({"symbols": symbols, "conditions": self.conditions} if symbols else {}),
            **({"counted": self.counted} if self.counted else {}),
        }

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> CallSignature:
        """Read a signature. Raises ``KeyError``, ``TypeError`` or ``ValueError`` for a document of another form."""
        fixed = tuple((int(index), str(text)) for index, text in document["fixed"])
        symbols = tuple(Symbol(str(name), int(a), int(b)) for name, a, b in document.get("symbols", ()))
        conditions = tuple(str(text) for text in document.get("conditions", ()))
        for text in conditions:
            expression(text)
        counted = tuple((int(index), int(leaf), int(dim)) for index, leaf, dim in document.get("counted", ()))
        arguments, state = _tuples(document["arguments"]), _tuples(document["state"])
        signature = cls(arguments, document["autocast"], state, fixed, symbols, conditions, counted)
        for size in signature.sizes:
            if isinstance(size, str):
                expression(size)
        return signature

    @property
    def is_range(self) -> bool:
        """True if calls of several sizes have the signature."""
        return bool(self.symbols)

    @property
    def tensors(self) -> Iterator[tuple[int, Shape]]:
        """The shape of each of its tensors, with its index among the leaves of a call, in their order."""
        shapes = (self.arguments, *(shape for _, shape in self.state))
        leaves = enumerate(leaf for shape in shapes for leaf in _leaf_shapes(shape))
        return ((index, leaf) for index, leaf in leaves if leaf[0] == "tensor")

    @property
    def sizes(self) -> tuple[Size, ...]:
        """The sizes of all its tensors, in the order of the leaves."""
        return tuple(size for _, tensor in self.tensors for size in tensor[2])

    @property
    def places(self) -> tuple[tuple[int, int], ...]:
        """The places of :attr:`sizes`, for each the index of the leaf and that of its dimension."""
        return tuple((index, dim) for index, tensor in self.tensors for dim in range(len(tensor[2])))

    def _mapped(self, change: Callable[[Shape], Shape]) -> CallSignature:
        """Return the signature with what ``change`` makes of the shapes of its tensors, in their order."""
        arguments = _map_tensors(self.arguments, change)
        return replace(
            self, arguments=arguments, state=tuple((path, _map_tensors(shape, change)) for path, shape in self.state)
        )

    @property
    def sizeless(self) -> CallSignature:
        """The signature with all sizes left open: what the signatures of a part at several sizes have in common."""
        plain = CallSignature(self.arguments, self.autocast, self.state)
        return plain._mapped(lambda tensor: ("tensor", tensor[1], len(tensor[2]), *tensor[3:]))

    def with_sizes(self, sizes: Sequence[Size], symbols: Sequence[Symbol], conditions: Sequence[str]) -> CallSignature:
        """Return the signature with other ``sizes``, in the order of :attr:`sizes`."""
        remaining = iter(sizes)
        resized = self._mapped(
            lambda tensor: ("tensor", tensor[1], tuple(next(remaining) for _ in tensor[2]), *tensor[3:])
        )
        return replace(resized, symbols=tuple(symbols), conditions=tuple(conditions))

    def covers(self, call: CallSignature) -> bool:
        """Return whether a call of the signature ``call`` is in the range of this one."""
        if self.sizeless != call.sizeless:
            return False
        pairs = []
        for ours, size in zip(self.sizes, call.sizes, strict=True):
            if isinstance(ours, str):
                pairs.append((ours, int(size)))
            elif ours != size:
                return False
        return solve(pairs, self.symbols, self.conditions) is not None

    @property
    def width(self) -> float:
        """The number of sizes that the range has: the tighter of two is the better match."""
        return math.prod(one.most - one.least + 1 for one in self.symbols)

    @property
    def digest(self) -> Digest:
        return digest_bytes(canonical_json(self.to_json()))

    @property
    def without_fixed(self) -> CallSignature:
        """The signature under which calls are looked up: whatever the values of its numbers."""
        return replace(self, fixed=(), counted=()) if self.fixed or self.counted else self

    @property
    def state_paths(self) -> tuple[str, ...]:
        return tuple(path for path, _ in self.state)

    @property
    def unread(self) -> frozenset[str]:
        """The paths of state that the call sets whatever it was."""
        return frozenset(path for path, shape in self.state if shape[0] == "unread")

    @property
    def loose(self) -> CallSignature:
        """The signature with the dtypes of scalars and vectors of real numbers left open, such as time steps."""
        return replace(self, fixed=())._mapped(_with_loose_dtype)

    def count(self, counted: Mapping[int, tuple[int, int]]) -> CallSignature:
        """The signature with the numbers in ``counted`` as sizes of tensors, by leaf and dimension, and not fixed."""
        fixed = tuple((index, text) for index, text in self.fixed if index not in counted)
        places = tuple((index, *place) for index, place in sorted(counted.items()))
        return replace(self, fixed=fixed, counted=places)

    def fix(self, indices: Sequence[int], leaves: Sequence[Leaf]) -> CallSignature:
        """The signature with the values of the numbers at ``indices`` as part of it."""
        return replace(self, fixed=tuple((index, repr(leaves[index])) for index in sorted(indices)))

    def admits(self, leaves: Sequence[Leaf]) -> bool:
        """Return whether the fixed and counted numbers of the signature are those of a call with ``leaves``."""
        if not all(repr(leaves[index]) == text for index, text in self.fixed):
            return False
        return all(_size(leaves, leaf, dim) == leaves[index] for index, leaf, dim in self.counted)

    def __str__(self) -> str:
        values = dict(self.fixed)
        counter = itertools.count()
        args, kwargs = self.arguments[2]
        texts = [_readable(child, counter, values) for child in args[2]]
        names = json.loads(kwargs[1])
        texts += [f"{n}={_readable(child, counter, values)}" for n, child in zip(names, kwargs[2], strict=True)]
        texts += [f"state {path}={_readable(shape, counter, values)}" for path, shape in self.state]
        where = f" where {', '.join(map(str, self.symbols))}" if self.symbols else ""
        return ", ".join(texts) + (f" under autocast {self.autocast}" if self.autocast else "") + where


@dataclass(frozen=True)
class DescribedCall:
    """One call as a graph sees it: its tensors and numbers in the order in which graphs refer to them. ``opaque`` names
    the first argument of a kind that no graph can be keyed by, or is empty.
    """

    signature: CallSignature
    leaves: tuple[Leaf, ...]
    opaque: str = ""

    @property
    def numbers(self) -> tuple[int, ...]:
        """The indices of the leaves that are Python numbers."""
        return tuple(i for i, leaf in enumerate(self.leaves) if not isinstance(leaf, torch.Tensor))

    @property
    def tensors(self) -> list[torch.Tensor]:
        return [leaf for leaf in self.leaves if isinstance(leaf, torch.Tensor)]

    @property
    def device(self) -> torch.device | None:
        """The device of the first tensor with a dimension, else of the first tensor."""
        tensors = self.tensors
        sized = next((tensor for tensor in tensors if tensor.dim()), None)
        return sized.device if sized is not None else tensors[0].device if tensors else None


def describe_call(
    args: Sequence[Any], kwargs: Mapping[str, Any], state: Mapping[str, Any] | None = None
) -> DescribedCall:
    """Describe a call and the state, by path, on which it depends; the order of keyword arguments does not count."""
    description = _Description()
    arguments = description.describe((tuple(args), {name: kwargs[name] for name in sorted(kwargs)}), "")
    kept = tuple((path, description.describe(value, path)) for path, value in sorted((state or {}).items()))
    device_type = next((leaf.device.type for leaf in description.leaves if isinstance(leaf, torch.Tensor)), "cpu")
    signature = CallSignature(arguments, autocast_dtype(device_type), kept)
    return DescribedCall(signature, tuple(description.leaves), description.opaque)


def rebuild(shape: Shape, leaves: Iterator[Any]) -> Any:
    """Return a value of the structure of ``shape``, which has nothing opaque, with new containers and these leaves."""
    kind = shape[0]
    if kind in ("tensor", "number"):
        return next(leaves)
    if kind == "value":
        if shape[1] == "dtype":
            return getattr(torch, shape[2].removeprefix("torch."))
        return torch.device(shape[2]) if shape[1] == "device" else shape[2]
    if kind in ("absent", "unread"):
        return ABSENT if kind == "absent" else UNREAD
    node, context = _NODES[kind, shape[1]]
    return node.unflatten_fn([rebuild(child, leaves) for child in shape[2]], context)


def is_number(value: Any) -> bool:
    """Return whether ``value`` is a Python number that may be an input of a graph: no truth value."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


class _Description:
    def __init__(self) -> None:
        self.leaves: list[Leaf] = []
        self.opaque = ""

    def describe(self, value: Any, path: str) -> Shape:
        if isinstance(value, torch.Tensor):
            self.leaves.append(value)
            return ("tensor", str(value.dtype)[6:], tuple(value.shape), value.device.type)
        if isinstance(value, np.generic):
            value = value.item()
        if is_number(value):
            number = float(value) if isinstance(value, float) else int(value)
            self.leaves.append(number)
            return ("number", type(number).__name__, None)
        if value is ABSENT or value is UNREAD:
            return (value.value, "", None)
        if value is None or isinstance(value, (bool, str)):
            return ("value", type(value).__name__, value)
        if isinstance(value, (torch.dtype, torch.device)):
            return ("value", type(value).__name__, str(value))
        node = pytree.SUPPORTED_NODES.get(_node_type(value))
        if node is None:
            return self._opaque(value, path)
        children, context = node.flatten_fn(value)
        try:
            names = json.dumps(list(context) if isinstance(context, (list, tuple)) else context)
        except TypeError:
            if not isinstance(context, type):
                return self._opaque(value, path)
            names = json.dumps(f"{context.__module__}.{context.__qualname__}")
        kind = _node_name(_node_type(value))
        _NODES.setdefault((kind, names), (node, context))
        labels = context if isinstance(context, list) and len(context) == len(children) else range(len(children))
        described = tuple(
            self.describe(child, f"{path}.{label}" if path else f"{label}")
            for label, child in zip(labels, children, strict=True)
        )
        return (kind, names, described)

    def _opaque(self, value: Any, path: str) -> Shape:
        name = f"{type(value).__module__}.{type(value).__qualname__}"
        self.opaque = self.opaque or f"argument {path or '()'} is a {name}"
        return ("opaque", name, None)


# What :func:`rebuild` needs to make a container that was described in this process.
_NODES: dict[tuple[str, str], tuple[Any, Any]] = {}


def _node_type(value: Any) -> Any:
    cls = type(value)
    return namedtuple if cls not in pytree.SUPPORTED_NODES and pytree.is_namedtuple(value) else cls


def _node_name(node_type: Any) -> str:
    """Two classes may share a name; those of Python itself are known by it alone."""
    home, name = str(node_type.__module__), str(node_type.__qualname__)
    return name if home in ("builtins", "collections") else f"{home}.{name}"


def autocast_dtype(device_type: str) -> str | None:
    """Return the dtype of an autocast in force."""
    if not torch.amp.is_autocast_available(device_type) or not torch.is_autocast_enabled(device_type):
        return None
    return str(torch.get_autocast_dtype(device_type))[6:]


def _with_loose_dtype(tensor: Shape) -> Shape:
    is_open = tensor[1] in _REAL_DTYPES and len(tensor[2]) <= _LARGEST_CAST_DIM
    return ("tensor", "real" if is_open else tensor[1], *tensor[2:])


def _size(leaves: Sequence[Leaf], index: int, dim: int) -> int | None:
    leaf = leaves[index] if index < len(leaves) else None
    return leaf.shape[dim] if isinstance(leaf, torch.Tensor) and dim < leaf.dim() else None


def _leaf_shapes(shape: Shape) -> Iterator[Shape]:
    """The shapes of the leaves of a call, tensors and numbers, in their order."""
    if shape[0] in ("tensor", "number"):
        yield shape
    elif shape[0] not in _CHILDLESS:
        for child in shape[2]:
            yield from _leaf_shapes(child)


def _map_tensors(shape: Shape, change: Callable[[Shape], Shape]) -> Shape:
    if shape[0] == "tensor":
        return change(shape)
    if shape[0] in _CHILDLESS:
        return shape
    return (shape[0], shape[1], tuple(_map_tensors(child, change) for child in shape[2]))


def _tuples(value: Any) -> Any:
    return tuple(_tuples(item) for item in value) if isinstance(value, (list, tuple)) else value


def _readable(shape: Shape, counter: Iterator[int], values: Mapping[int, str]) -> str:
    kind, detail, content = shape[:3]
    if kind == "tensor":
        next(counter)
        return f"{detail}[{','.join(map(str, content))}]"
    if kind == "number":
        return values.get(next(counter), str(detail))
    if kind == "value":
        return repr(content) if detail == "str" else str(content)
    if kind == "opaque":
        return str(detail)
    if kind in ("absent", "unread"):
        return str(kind)
    return f"{kind.rpartition('.')[2]}({', '.join(_readable(child, counter, values) for child in content)})"
