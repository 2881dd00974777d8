"""Texts of the values that local code reads by name: globals, closure cells, defaults, class attributes.

Nothing that code reads goes without a trace: what cannot be read (a C object with hidden state, say) is named by its
class, together with the source of the module that holds it. Places on this machine count as places, whichever.
"""

from __future__ import annotations

import contextlib
import enum
import functools
import hashlib
import os
import re
import sys
import types
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from datetime import date, time, timedelta
from decimal import Decimal
from fractions import Fraction
from pathlib import PurePath
from typing import Any

import numpy as np
import torch

from pipevault.fingerprint.names import is_ours, is_released, qualified_name, source_of
from pipevault.fingerprint.tensors import tensor_digest

_MAX_DEPTH = 32
_MAX_VALUES = 20_000
_PLACE = "a place"
_CONSTANT_TYPES = frozenset({bool, int, float, complex, bytes, type(None), type(Ellipsis)})
_TYPES_WITH_STABLE_REPR = (range, slice, bytearray, Decimal, Fraction, re.Pattern, date, time, timedelta)
# State of the process and not of the model: such objects count by their class.
_PROCESS_STATE = frozenset({"logging", "threading", "_thread", "weakref", "_weakref", "_contextvars", "_abc", "typing"})
_COMPILER_PACKAGES = ("torch._dynamo", "torch._inductor", "torch.fx", "triton.")
_HEAP_TYPE_FLAG = 1 << 9

LiveText = Callable[[Any], "str | None"]


def constant_text(value: Any) -> str | None:
    """Return the text of a constant, or ``None`` if it is not a constant."""
    kind = type(value)
    if kind is str:
        return _PLACE if os.path.isabs(value) else repr(value)
    if kind in _CONSTANT_TYPES:
        return repr(value)
    if kind is tuple or kind is frozenset:
        texts = [text for item in value if (text := constant_text(item)) is not None]
        if len(texts) < len(value):
            return None
        return f"{kind.__name__}({','.join(sorted(texts) if kind is frozenset else texts)})"
    if kind.__module__ == "torch" and kind.__name__ == "dtype":
        return str(value)
    return None


class ValueText:
    """One pass over values. ``code`` gives the text of functions and classes, ``live`` that of modules and tensors."""

    def __init__(self, *, code: Callable[[Any], str], live: LiveText | None = None) -> None:
        self._code = code
        self._live = live
        self._known: dict[int, str] = {}
        self._kept_alive: list[Any] = []

    def text(self, value: Any, home: str, depth: int = 0) -> str:
        """Return the text of ``value``, read by code of the module ``home``. Never empty, the same in every process."""
        if (constant := constant_text(value)) is not None:
            return constant
        if (known := self._known.get(id(value))) is not None:
            return known
        if depth >= _MAX_DEPTH or len(self._known) >= _MAX_VALUES:
            return self._hidden(value, home)
        self._kept_alive.append(value)
        self._known[id(value)] = f"inside {type(value).__qualname__}"
        self._known[id(value)] = self._describe(value, home, depth + 1)
        return self._known[id(value)]

    def _describe(self, value: Any, home: str, depth: int) -> str:
        if isinstance(value, types.FunctionType | type):
            return self._code(value)
        if isinstance(value, types.ModuleType):
            return f"module {value.__name__}" if is_released(value.__name__) else "module"
        if is_ours(value):
            return "pipevault"
        cls = type(value)
        if isinstance(value, PurePath):
            return _PLACE
        if isinstance(value, enum.Enum):
            return f"{self._code(cls)}.{value.name}={self.text(value.value, home, depth)}"
        if isinstance(value, _TYPES_WITH_STABLE_REPR):
            return f"{qualified_name(cls)} {value!r}"
        text = self._wrapper(value, home, depth) or self._number(value) or self._torch(value, home, depth)
        if text is not None:
            return text
        root = cls.__module__.partition(".")[0]
        if root in _PROCESS_STATE or cls.__module__.startswith(_COMPILER_PACKAGES):
            return qualified_name(cls)
        if root == "numpy":
            return self._numpy(value, home, depth)
        return self._object(value, home, depth)

    def _items(self, values: Iterable[Any], home: str, depth: int) -> list[str]:
        return [self.text(value, home, depth) for value in values]

    def _contents(self, value: Any, home: str, depth: int) -> str | None:
        """Return the text of a container, or ``None``. A mapping's order counts: code loops over it."""
        if isinstance(value, dict | types.MappingProxyType):
            pairs = dict.items(value) if isinstance(value, dict) else value.items()
            inner = [f"{self.text(name, home, depth)}:{self.text(item, home, depth)}" for name, item in pairs]
            return f"{{{','.join(inner)}}}"
        if isinstance(value, list | tuple | deque):
            return f"[{','.join(self._items(value, home, depth))}]"
        if isinstance(value, set | frozenset):
            return f"{{{','.join(sorted(self._items(value, home, depth)))}}}"
        return None

    def _wrapper(self, value: Any, home: str, depth: int) -> str | None:
        """Callables of released packages by what they wrap and hold, without caches and counters."""
        if isinstance(value, functools.partial):
            return f"partial({','.join(self._items((value.func, value.args, value.keywords), home, depth))})"
        if isinstance(value, types.MethodType):
            return f"{self.text(value.__func__, home, depth)} of {self.text(value.__self__, home, depth)}"
        if isinstance(value, staticmethod | classmethod):
            return self.text(value.__func__, home, depth)
        if isinstance(value, types.BuiltinFunctionType | types.MethodWrapperType):
            owner = value.__self__
            is_free = owner is None or isinstance(owner, types.ModuleType | type)
            return qualified_name(value) if is_free else f"{value.__name__} of {self.text(owner, home, depth)}"
        cls = type(value)
        if not callable(value) or not is_released(cls.__module__):
            return None
        if cls.__module__ == "torch._ops":
            return f"{cls.__qualname__} {value}"
        state = state_of(value)
        for name in ("__wrapped__", "fn"):
            if isinstance(state.get(name), types.FunctionType):
                return f"{qualified_name(cls)} of {self.text(state[name], home, depth)}"
        if cls.__name__ == "ScriptFunction":
            return f"{qualified_name(cls)} {value.code}"
        return f"{qualified_name(cls)} {value.__name__}" if isinstance(getattr(value, "__name__", None), str) else None

    def _number(self, value: Any) -> str | None:
        for base in (int, float, complex, str, bytes):
            if isinstance(value, base):
                convert: Any = base if base is not str else str.__str__
                return f"{self._code(type(value))} {constant_text(convert(value))}"
        return None

    def _torch(self, value: Any, home: str, depth: int) -> str | None:
        if isinstance(value, torch.device | torch.Generator):
            return qualified_name(type(value))
        live = self._live if isinstance(value, torch.Tensor | torch.nn.Module) else None
        if live is not None and (text := live(value)) is not None:
            return text
        if not isinstance(value, torch.Tensor):
            return None
        head = f"{self._code(type(value))} {value.dtype} {list(value.shape)}"
        if hasattr(value, "__tensor_flatten__"):
            names, context = value.__tensor_flatten__()
            parts = [getattr(value, name) for name in names]
            return f"{head} {','.join(names)} {self._items([*parts, context], home, depth)}"
        if value.is_meta:
            return f"{head} meta"
        if value.layout is not torch.strided or value.is_quantized:
            return f"{head} {self._hidden(value, home)}"
        return f"{head} {value.stride()} {tensor_digest(value)}"

    def _numpy(self, value: Any, home: str, depth: int) -> str:
        if isinstance(value, np.ndarray):
            head = f"{value.dtype} {list(value.shape)}"
            if value.dtype.hasobject:
                return f"{head} {self.text(value.tolist(), home, depth)}"
            return f"{head} {hashlib.sha256(value.tobytes()).hexdigest()}"
        if isinstance(value, np.generic | np.dtype):
            return f"{qualified_name(type(value))} {value!r}"
        name = getattr(value, "__name__", None)
        return f"{qualified_name(type(value))} {name}" if name else self._hidden(value, home)

    def _object(self, value: Any, home: str, depth: int) -> str:
        cls, contents = type(value), self._contents(value, home, depth)
        text = self._code(cls)
        if contents is not None:
            text = f"{text} {contents}"
        is_pipeline = any(base.__name__ == "DiffusionPipeline" for base in cls.__mro__)
        if is_pipeline:  # its modules are the parts themselves, and each call leaves other values on it
            return f"{text} {self._hidden(value, home)}"
        if state := state_of(value):
            inner = [f"{name}={self.text(state[name], home, depth)}" for name in sorted(state)]
            text = f"{text}({','.join(inner)})"
        if contents is None and cls is not object and _has_hidden_state(value):
            text = f"{text} {self._hidden(value, home)}"
        return text

    def _hidden(self, value: Any, home: str) -> str:
        """For a value that cannot be read: what may have made it is the code of the module that holds it."""
        module = sys.modules.get(home)
        source = None if module is None or is_released(home) else source_of(module)
        digest = "none" if source is None else hashlib.sha256(source.encode("utf-8", "surrogatepass")).hexdigest()
        return f"hidden {qualified_name(type(value))} in {digest}"


def state_of(value: Any) -> Mapping[str, Any]:
    """Return the attributes of an object, in its ``__dict__`` and in its slots; private ones of pipevault left out."""
    own = getattr(value, "__dict__", None)
    state = {str(name): item for name, item in own.items()} if isinstance(own, dict) else {}
    for base in type(value).__mro__:
        for name, member in vars(base).items():
            if isinstance(member, types.MemberDescriptorType) and base.__flags__ & _HEAP_TYPE_FLAG:
                with contextlib.suppress(AttributeError):  # a slot that was never filled
                    state[name] = member.__get__(value)
    return {name: item for name, item in state.items() if not name.startswith("_pipevault")}


def _has_hidden_state(value: Any) -> bool:
    """Return True if a type written in C takes part, whose fields cannot be seen."""
    kinds = (base for base in type(value).__mro__ if base is not object)
    return any("__module__" not in vars(base) or not base.__flags__ & _HEAP_TYPE_FLAG for base in kinds)
