"""The signature of one call of a part: what decides which frozen graph may serve it.

A signature is a nested tuple of plain values (:data:`Shape`), so that it can be a dictionary key at run time and
JSON on disk. Tensors count by dtype, shape and device type; containers by type and structure; other leaves by
type and value, because ``torch.export`` compiles those values in. The order of the tensors is that of
``torch.utils._pytree``, which AOTInductor uses.
"""

from __future__ import annotations

import json
from collections import namedtuple
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch.utils import _pytree as pytree

from pipevault.digest import Digest, canonical_json, digest_bytes

Shape: TypeAlias = "tuple[Any, ...]"


class UnsupportedArgumentError(TypeError):
    """An argument is of a kind that a graph cannot be keyed by. ``path`` names it."""

    def __init__(self, path: str, value: Any) -> None:
        super().__init__(f"argument {path} is a {type(value).__module__}.{type(value).__qualname__}")
        self.path = path


@dataclass(frozen=True)
class Signature:
    """Identity of a call. ``autocast`` names the dtype of an active autocast, which changes the arithmetic."""

    arguments: Shape
    autocast: str | None = None

    def to_json(self) -> dict[str, Any]:
        return {"arguments": self.arguments, "autocast": self.autocast}

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Signature:
        return cls(_tuples(document["arguments"]), document["autocast"])

    @property
    def digest(self) -> Digest:
        return digest_bytes(canonical_json(self.to_json()))

    def __str__(self) -> str:
        args, kwargs = self.arguments[2]
        positional = [_readable(child) for child in args[2]]
        named = [f"{name}={_readable(child)}" for name, child in zip(json.loads(kwargs[1]), kwargs[2], strict=True)]
        return ", ".join(positional + named) + (f" under autocast {self.autocast}" if self.autocast else "")


def describe_call(args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Signature, list[torch.Tensor]]:
    """The signature of a call and its tensors in the order in which a graph takes them.

    ``kwargs`` must be sorted by name (see :func:`sorted_kwargs`). Raises :class:`UnsupportedArgumentError`.
    """
    tensors: list[torch.Tensor] = []
    shape = _describe((tuple(args), dict(kwargs)), "", tensors)
    return Signature(shape, _autocast(tensors)), tensors


def sorted_kwargs(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    return {name: kwargs[name] for name in sorted(kwargs)}


def _describe(value: Any, path: str, tensors: list[torch.Tensor]) -> Shape:
    if isinstance(value, torch.Tensor):
        tensors.append(value)
        return ("tensor", str(value.dtype)[6:], tuple(value.shape), value.device.type)
    if value is None or isinstance(value, (bool, int, str)):
        return ("value", type(value).__name__, value)
    if isinstance(value, (float, torch.dtype)):
        return ("value", type(value).__name__, repr(value))
    node = pytree.SUPPORTED_NODES.get(_node_type(value))
    if node is None:
        raise UnsupportedArgumentError(path or "()", value)
    children, context = node.flatten_fn(value)
    try:
        names = json.dumps(list(context) if isinstance(context, (list, tuple)) else context)
    except TypeError:
        if not isinstance(context, type):
            raise UnsupportedArgumentError(path, value) from None
        names = json.dumps(f"{context.__module__}.{context.__qualname__}")
    labels = context if isinstance(context, list) and len(context) == len(children) else range(len(children))
    return (
        _node_type(value).__name__,
        names,
        tuple(
            _describe(child, f"{path}.{label}" if path else f"{label}", tensors)
            for label, child in zip(labels, children, strict=True)
        ),
    )


def _node_type(value: Any) -> Any:
    cls = type(value)
    return namedtuple if cls not in pytree.SUPPORTED_NODES and pytree.is_namedtuple(value) else cls


def _autocast(tensors: Sequence[torch.Tensor]) -> str | None:
    device_type = tensors[0].device.type if tensors else "cpu"
    if not torch.is_autocast_enabled(device_type):
        return None
    return str(torch.get_autocast_dtype(device_type))[6:]


def _tuples(value: Any) -> Any:
    return tuple(_tuples(item) for item in value) if isinstance(value, (list, tuple)) else value


def _readable(shape: Shape) -> str:
    kind, detail, content = shape[:3]
    if kind == "tensor":
        return f"{detail}[{','.join(map(str, content))}]"
    if kind == "value":
        return repr(content) if detail == "str" else str(content)
    return f"{kind}({', '.join(_readable(child) for child in content)})"
