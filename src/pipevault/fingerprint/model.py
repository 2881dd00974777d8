"""Fingerprint of a module: everything that decides its graph, except the values of its weights.

The configuration does not show FreeU, attention processors, tiling, LoRA layers, hooks or ``channels_last``. So the
digest walks the module tree. Paths, devices, addresses and ``requires_grad`` do not count.

A module has the same fingerprint before and after it was called. So its attributes that hold tensors which are no
parameters or buffers do not count, nor do containers with nothing in them: models keep caches there, and fill them when
they run. Where a graph holds such a tensor as a constant, its values are compared for the graph.
"""

from __future__ import annotations

import enum
import functools
import hashlib
import os
import types
import weakref
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter
from torch.utils.hooks import RemovableHandle

from pipevault.compat import accelerate, diffusers, transformers
from pipevault.fingerprint.classes import class_identity, function_identity, state_of
from pipevault.fingerprint.difference import describe_difference
from pipevault.fingerprint.names import is_ours, original_class, qualified_name
from pipevault.fingerprint.tensors import tensor_digest
from pipevault.fingerprint.volatile import (
    BOOKKEEPING_NAMES,
    SKIPPED_NAMES,
    SKIPPED_PREFIXES,
    computing_module,
    is_bookkeeping,
    is_training_hook,
)

__all__ = ["Architecture", "architecture", "describe_difference", "digest_and_snapshot", "snapshot"]

_MAX_DEPTH = 10
_CONTAINERS = (list, tuple, dict, deque, set, frozenset)
_NUMBERS = frozenset({int, bool, float})


@dataclass(frozen=True)
class Architecture:
    """The summary of a module tree, and the hex SHA-256 of all that its code depends on. ``parameters`` counts
    elements, ``tensors`` parameters and buffers, ``dtypes`` tensors by dtype; tied ones once.
    """

    class_name: str
    parameters: int
    tensors: int
    dtypes: Mapping[str, int]
    digest: str

    def to_json(self) -> dict[str, Any]:
        return {
            "class": self.class_name,
            "parameters": self.parameters,
            "tensors": self.tensors,
            "dtypes": dict(self.dtypes),
            "digest": self.digest,
        }


def architecture(module: nn.Module) -> Architecture:
    """Return the architecture of ``module``."""
    walk = _Walk(module)
    digest = _digest(walk.modules())
    tensors = walk.tensors.values()
    counted = (t for t in tensors if isinstance(t, nn.Parameter) and not isinstance(t, UninitializedParameter))
    return Architecture(
        class_name=qualified_name(original_class(computing_module(module))),
        parameters=sum(parameter.numel() for parameter in counted),
        tensors=len(tensors),
        dtypes=dict(sorted(Counter(str(tensor.dtype).removeprefix("torch.") for tensor in tensors).items())),
        digest=digest,
    )


def snapshot(module: nn.Module) -> dict[str, str]:
    """Return what :func:`architecture` digests, in readable form: ``path`` -> class, ``path:name`` -> value."""
    return _readable(_Walk(module).modules())


def digest_and_snapshot(module: nn.Module) -> tuple[str, dict[str, str]]:
    """Return the digest of :func:`architecture` and the :func:`snapshot` of ``module``, in one pass over it."""
    walked = list(_Walk(module).modules())
    return _digest(walked), _readable(walked)


class _Walk:
    """One pass over a module tree. Texts of shared objects, such as configurations, are written once."""

    def __init__(self, root: nn.Module, *, inside: frozenset[int] = frozenset()) -> None:
        self.root = root
        self._inside = inside | {id(root)}  # modules whose description led here, so that it ends
        self.tensors: dict[int, torch.Tensor] = {}
        self._first_names: dict[int, str] = {}
        self._paths: dict[int, str] = {}
        self._classes: dict[type, tuple[str, dict[str, Any]]] = {}
        self._layouts: dict[tuple[Any, ...], str] = {}
        self._objects: dict[int, str] = {}
        self._kept_alive: list[Any] = []
        self._registered: set[int] | None = None

    def modules(self) -> Iterator[tuple[str, str, list[str]]]:
        """Yield path, class and sorted ``name=value`` lines of every module, parents first."""
        stack: list[tuple[str, nn.Module]] = [("", self.root)]
        while stack:
            path, named = stack.pop()
            module = computing_module(named)
            if (first := self._paths.get(id(module))) is not None:
                yield path, f"same as {first!r}", []
                continue
            self._paths[id(named)] = self._paths[id(module)] = path
            cls = original_class(module)
            prefix = f"{path}." if path else ""
            yield path, self._class(cls)[0], self._lines(module, cls, prefix)
            if children := module._modules:
                stack.extend(
                    (prefix + name, child)
                    for name, child in reversed(children.items())
                    if child is not None and not name.startswith(SKIPPED_PREFIXES)
                )

    def _class(self, cls: type) -> tuple[str, dict[str, Any]]:
        if cls not in self._classes:
            self._classes[cls] = (qualified_name(cls), {})  # for code that reads an object of its own class
            self._classes[cls] = (class_identity(cls, live=self._live), _scalar_defaults(cls))
        return self._classes[cls]

    def _live(self, value: Any) -> str | None:
        """A module or a tensor that code reads by name: weights of the tree stay out of it."""
        return self._module(value, 1) if isinstance(value, nn.Module) else self._tensor_attribute(value, 1)

    def _lines(self, module: nn.Module, cls: type, prefix: str) -> list[str]:
        values = module.__dict__
        lines = self._attribute_lines(values, cls, 0)
        for name, parameter in values["_parameters"].items():
            lines.append(f"{name}={self._weight(parameter, prefix + name)} parameter")
        if buffers := values["_buffers"]:
            transient = values["_non_persistent_buffers_set"]
            for name, buffer in buffers.items():
                kind = "transient buffer" if name in transient else "buffer"
                lines.append(f"{name}={self._weight(buffer, prefix + name)} {kind}")
        lines.sort()
        if values["_forward_hooks"] or values["_forward_pre_hooks"]:
            lines.extend(self._hook_lines(values))
        return lines

    def _attribute_lines(self, values: Mapping[str, Any], cls: type, depth: int) -> list[str]:
        defaults = self._class(cls)[1]
        values, hooks = accelerate.without_placement(values)
        values = diffusers.without_placement(values)
        # Class names only: the attributes of hooks are devices and weight maps.
        identities = [class_identity(type(hook)) for hook in hooks]
        lines = [f"{accelerate.HOOK_ATTRIBUTE}[{place}]={hook}" for place, hook in enumerate(identities)]
        for name, value in values.items():
            if SKIPPED_NAMES[name] or (name == "lora_scale" and "_safe_fusing" in values):
                continue
            if name in BOOKKEEPING_NAMES and is_bookkeeping(name, value, values, cls):
                continue
            kind = type(value)
            # An attribute that repeats its class counts like none at all, so that undoing a change restores
            # the digest: FreeU, for one, is switched off by setting its scalars to None.
            if name in defaults:
                if type(defaults[name]) is kind and defaults[name] == value:
                    continue
            elif value is None or (kind is types.MethodType and value.__func__ is getattr(cls, name, None)):
                continue
            if kind is int or kind is bool or kind is float:
                lines.append(f"{name}={value!r}")
            elif (kind is tuple or kind is list) and value and _NUMBERS.issuperset(map(type, value)):
                lines.append(f"{name}=[{', '.join(map(repr, value))}]")
            elif kind is not str and self._is_cache(name, value):
                continue
            elif (text := self._text(value, depth)) is not None:
                lines.append(f"{name}={text}")
        return lines

    def _hook_lines(self, values: Mapping[str, Any]) -> Iterator[str]:
        for kind in ("_forward_pre_hooks", "_forward_hooks"):
            with_kwargs = values.get(f"{kind}_with_kwargs", {})
            always = values.get(f"{kind}_always_called", {})
            theirs = [
                (handle, hook)
                for handle, hook in values[kind].items()
                if not (is_ours(hook) or is_training_hook(hook) or transformers.is_output_capturing_hook(hook))
            ]
            for place, (handle, hook) in enumerate(theirs):
                flags = f"{' kwargs' if handle in with_kwargs else ''}{' always' if handle in always else ''}"
                yield f"{kind}[{place}]={self._text(hook, 0)}{flags}"

    def _weight(self, tensor: torch.Tensor | None, name: str) -> str:
        """A registered tensor. Ties count: a graph of a tied model reads one of the names only."""
        if tensor is None:
            return "no"
        self.tensors[id(tensor)] = tensor
        first = self._first_names.setdefault(id(tensor), name)
        tie = "" if first == name or not isinstance(tensor, nn.Parameter) else f" tied to {first}"
        return self._tensor(tensor) + tie

    def _tensor(self, tensor: torch.Tensor) -> str:
        if type(tensor) is not nn.Parameter and type(tensor) is not torch.Tensor:
            return self._unusual_tensor(tensor)
        if tensor.layout is not torch.strided:
            return f"{list(tensor.shape)} {tensor.dtype} {tensor.layout}"
        key = (tensor.shape, tensor.dtype, tensor.stride())
        if key not in self._layouts:
            self._layouts[key] = _layout(*key)
        return self._layouts[key]

    def _unusual_tensor(self, tensor: torch.Tensor) -> str:
        name = self._class(type(tensor))[0]
        if isinstance(tensor, UninitializedParameter | UninitializedBuffer):
            return name
        if hasattr(tensor, "__tensor_flatten__"):
            names, context = tensor.__tensor_flatten__()
            inner = [f"{n}:{self._tensor(getattr(tensor, n))}" for n in sorted(names)]
            return f"{name}({', '.join(inner)}; {self._text(context, 1)})"
        return f"{name} {_layout(tensor.shape, tensor.dtype, tensor.stride())}"

    def _text(self, value: Any, depth: int) -> str | None:
        """Text of any attribute value; ``None`` if it must not count."""
        kind = type(value)
        if kind is int or kind is bool or kind is float or value is None:
            return repr(value)
        writer = _WRITERS.get(kind)
        if writer is None:
            writer = next((w for base, w in _WRITERS_BY_BASE if isinstance(value, base)), _Walk._object)
        return writer(self, value, depth)

    def _sequence(self, value: Any, depth: int) -> str:
        """Lists and tuples read the same: a configuration has tuples when built, and lists when loaded."""
        if depth >= _MAX_DEPTH:
            return f"{type(value).__name__}[{len(value)}]"
        inner = [self._text(item, depth + 1) or "-" for item in value]
        if isinstance(value, set | frozenset):
            inner.sort()
            return f"{{{', '.join(inner)}}}"
        return f"[{', '.join(inner)}]"

    def _mapping(self, value: Mapping[Any, Any], depth: int) -> str:
        if depth >= _MAX_DEPTH:
            return f"{type(value).__name__}[{len(value)}]"
        inner = []
        for name, item in value.items():
            if isinstance(name, str) and SKIPPED_NAMES[name]:
                continue
            if (text := self._text(item, depth + 1)) is not None:
                inner.append(f"{self._text(name, depth + 1)}: {text}")
        return f"{{{', '.join(sorted(inner))}}}"

    def _callable(self, value: Any, depth: int) -> str | None:
        if is_ours(value):
            return None
        if isinstance(value, functools.partial):
            parts = (value.func, value.args, value.keywords)
            return f"partial({', '.join(self._text(part, depth + 1) or '-' for part in parts)})"
        owner = getattr(value, "__self__", None)
        if owner is None or isinstance(owner, types.ModuleType):
            return function_identity(value, live=self._live)
        method = function_identity(getattr(value, "__func__", value), live=self._live)
        return f"{method} of {self._text(owner, depth + 1)}"

    def _is_registered(self, tensor: torch.Tensor) -> bool:
        if self._registered is None:
            self._registered = {id(registered) for registered in (*self.root.parameters(), *self.root.buffers())}
        return id(tensor) in self._registered

    def _is_cache(self, name: str, value: Any) -> bool:
        """Return True if a module's attribute is of the kind that its calls fill: see the top of this file."""
        if isinstance(value, _CONTAINERS):
            leaves = list(self._leaves(value, set(), 0))
            return not leaves or any(map(self._is_free_tensor, leaves))
        if name == diffusers.REGISTRY_ATTRIBUTE:
            return diffusers.is_empty_registry(value)
        return self._is_free_tensor(value)

    def _leaves(self, container: Any, seen: set[int], depth: int) -> Iterator[Any]:
        """Yield what a container holds, however deep, but ``None``; a shape counts as one value."""
        if isinstance(container, torch.Size) or depth >= _MAX_DEPTH:
            yield container
            return
        seen.add(id(container))
        for item in container.values() if isinstance(container, dict) else container:
            if isinstance(item, _CONTAINERS) and id(item) not in seen:
                yield from self._leaves(item, seen, depth + 1)
            elif item is not None and id(item) not in seen:
                yield item

    def _is_free_tensor(self, value: Any) -> bool:
        return isinstance(value, torch.Tensor) and not self._is_registered(value)

    def _tensor_attribute(self, tensor: torch.Tensor, depth: int) -> str:
        """A tensor of an object counts with its values, as the objects that a module holds are not filled by calls."""
        text = self._tensor(tensor)
        is_plain = tensor.layout is torch.strided and not tensor.is_meta and not tensor.is_quantized
        if self._is_registered(tensor) or not is_plain or hasattr(tensor, "__tensor_flatten__"):
            return text
        return f"{text} values:{tensor_digest(tensor)}"

    def _module(self, module: nn.Module, depth: int) -> str:
        """A reference into the tree, or a module outside it, whose weights the graph holds as constants."""
        module = computing_module(module)
        if (path := self._paths.get(id(module))) is not None:
            return f"module {path!r}"
        if id(module) in self._inside:
            return f"module around this one, {qualified_name(original_class(module))}"
        if (known := self._objects.get(id(module))) is not None:
            return known
        self._objects[id(module)] = qualified_name(original_class(module))
        self._kept_alive.append(module)
        identity = self._class(original_class(module))[0]
        if depth >= _MAX_DEPTH:
            return identity
        self._objects[id(module)] = identity
        if any(module is inner for inner in self.root.modules()):
            return f"module of the tree, {identity}"
        values = [self._tensor_attribute(tensor, depth) for tensor in (*module.parameters(), *module.buffers())]
        inner_digest = _digest(_Walk(module, inside=self._inside).modules())
        text = f"{identity} {inner_digest} {hashlib.sha256(repr(values).encode()).hexdigest()}"
        self._objects[id(module)] = text
        return text

    def _object(self, value: Any, depth: int) -> str | None:
        if is_ours(value):
            return None
        if (known := self._objects.get(id(value))) is not None:
            return known
        text = self._objects[id(value)] = self._class(type(value))[0]
        self._kept_alive.append(value)
        if depth < _MAX_DEPTH and (lines := self._attribute_lines(state_of(value), type(value), depth + 1)):
            text = self._objects[id(value)] = f"{text}({', '.join(sorted(lines))})"
        return text

    def _array(self, value: Any, depth: int) -> str:
        return f"{value.dtype}{list(value.shape)} values:{hashlib.sha256(value.tobytes()).hexdigest()}"


def _readable(modules: Iterable[tuple[str, str, list[str]]]) -> dict[str, str]:
    items: dict[str, str] = {}
    for path, identity, lines in modules:
        items[path] = identity
        for line in lines:
            name, _, value = line.partition("=")
            items[f"{path}:{name}"] = value
    return items


def _digest(modules: Iterable[tuple[str, str, list[str]]]) -> str:
    hasher = hashlib.sha256()
    for path, identity, lines in modules:
        hasher.update("\n".join((f"{path!r} {identity}", *lines, "")).encode("utf-8", "surrogatepass"))
    return hasher.hexdigest()


def _layout(shape: torch.Size, dtype: torch.dtype, stride: tuple[int, ...]) -> str:
    """The stride of a dimension of size one addresses nothing, and ``channels_last`` and back changes it."""
    steps = ",".join("-" if size == 1 else str(step) for size, step in zip(shape, stride, strict=True))
    return f"[{','.join(map(str, shape))}] {str(dtype).removeprefix('torch.')} stride [{steps}]"


def _scalar_defaults(cls: type) -> dict[str, Any]:
    """Class attributes that an equal instance attribute does not change."""
    defaults: dict[str, Any] = {}
    for base in reversed(cls.__mro__):
        if base is nn.Module or base is object:
            continue
        for name, value in vars(base).items():
            if type(value) in (bool, int, float, str):
                defaults[name] = value
            else:
                defaults.pop(name, None)
    defaults.pop("training", None)
    return defaults


def _string(walk: _Walk, value: str, depth: int) -> str | None:
    """An absolute path says where a model lies on this machine, so it does not count."""
    is_path = ("/" in value or "\\" in value) and os.path.isabs(value)
    return None if is_path else repr(str(value))


_Writer = Callable[[Any, Any, int], "str | None"]
_CALLABLES = (types.FunctionType, types.BuiltinFunctionType, types.MethodType, functools.partial)
_WRITERS: dict[type, _Writer] = {
    str: _string,
    dict: _Walk._mapping,
    torch.dtype: lambda walk, value, depth: str(value),
    torch.device: lambda walk, value, depth: None,
    **dict.fromkeys((tuple, list, set, frozenset, torch.Size, deque), _Walk._sequence),
    **dict.fromkeys((bytes, bytearray, complex, range, slice), lambda walk, value, depth: repr(value)),
    **dict.fromkeys(_CALLABLES, _Walk._callable),
}
_WRITERS_BY_BASE: tuple[tuple[type | tuple[type, ...], _Writer], ...] = (
    (nn.Module, _Walk._module),
    (torch.Tensor, _Walk._tensor_attribute),
    (enum.Enum, lambda walk, value, depth: f"{qualified_name(type(value))}.{value.name}"),
    (type, lambda walk, value, depth: None if is_ours(value) else walk._class(value)[0]),
    (types.ModuleType, lambda walk, value, depth: f"module {value.__name__}"),
    ((RemovableHandle, PurePath), lambda walk, value, depth: None),
    (weakref.ref, lambda walk, value, depth: "weakref"),
    (np.generic, lambda walk, value, depth: f"{value.dtype} {value.item()!r}"),
    (np.ndarray, _Walk._array),
    (Mapping, _Walk._mapping),
    ((tuple, list, set), _Walk._sequence),
    (int, lambda walk, value, depth: repr(int(value))),
    (float, lambda walk, value, depth: repr(float(value))),
    (str, _string),
)
