"""Identities of classes and functions that are the same in every process, and change when their code does.

A class of a released package is named by module and qualified name; the toolchain's versions cover its code. Of all
others (``__main__``, a local file, code that came with a checkpoint) the source counts, and the local functions,
classes and values that ``forward`` reaches; the module does not: it depends on how the file was started.

Nothing that code reads goes without a trace: a value that cannot be read (a C object with hidden state, say) is named
by its class, together with the source of the module that holds it. Places on this machine count as places, whichever.
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
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import date, time, timedelta
from decimal import Decimal
from fractions import Fraction
from pathlib import PurePath
from typing import Any, TypeAlias

import numpy as np
import torch

from pipevault.fingerprint.names import (
    is_ours,
    is_released,
    is_released_function,
    original_class,
    place_in_package,
    qualified_name,
    source_of,
)
from pipevault.fingerprint.tensors import tensor_digest

__all__ = ["class_identity", "function_identity", "is_released", "original_class", "qualified_name", "state_of"]

LiveText: TypeAlias = "Callable[[Any], str | None]"
"""Gives the text of modules and tensors that code reads; ``None`` where their values count."""

_ENTRY_METHODS = ("forward", "__call__")
# Bases that a class has for its package's sake: what it overrides of them is not a step of the computation.
_NEUTRAL_BASES = frozenset({"builtins", "abc", "typing", "enum", "torch.nn.modules.module"})
_MAX_DEPTH = 32
_MAX_VALUES = 20_000
_PLACE = "a place"
_CONSTANT_TYPES = frozenset({bool, int, float, complex, bytes, type(None), type(Ellipsis)})
_TYPES_WITH_STABLE_REPR = (range, slice, bytearray, Decimal, Fraction, re.Pattern, date, time, timedelta)
# State of the process and not of the model: such objects count by their class.
_PROCESS_STATE = frozenset({"logging", "threading", "_thread", "weakref", "_weakref", "_contextvars", "_abc", "typing"})
_COMPILER_PACKAGES = ("torch._dynamo", "torch._inductor", "torch.fx", "triton.")
_HEAP_TYPE_FLAG = 1 << 9

# Only what cannot change while the process runs is remembered: a value that local code reads can.
_released_identities: weakref.WeakKeyDictionary[type, tuple[tuple[Any, ...], str]] = weakref.WeakKeyDictionary()


def class_identity(cls: type, *, live: LiveText | None = None) -> str:
    """Return the name of ``cls``, with a digest of its code if it is not released or its entry method was replaced.

    ``live`` gives the text of modules and tensors that the code reads; without it their values count.
    """
    entries = tuple(getattr(getattr(cls, name, None), "__code__", None) for name in _ENTRY_METHODS)
    known = _released_identities.get(cls)
    if known is not None and known[0] == entries:
        return known[1]
    local = [base for base in cls.__mro__ if not is_released(base.__module__)]
    code = _CodeDigest(live=live)
    reached = _reached(cls, local)
    for base in local:
        code.add_class(base, reached=reached)
    for method in _foreign_entry_methods(cls):
        code.add_function(method)
    text = code.identity(qualified_name(cls))
    if not local:
        _released_identities[cls] = (entries, text)
    return text


def function_identity(function: Any, *, live: LiveText | None = None) -> str:
    """Return the name of a function, with a digest of its code if it is a lambda or not released."""
    text = qualified_name(function)
    if not isinstance(function, types.FunctionType) or is_released_function(function):
        return text
    code = _CodeDigest(live=live)
    code.add_function(function)
    return code.identity(text)


def _reached(cls: type, local: list[type]) -> frozenset[str] | None:
    """Names that a call of a module uses, its overrides of released code included; ``None``, all, for other classes."""
    if not local or not hasattr(cls, "forward"):
        return None
    released = [base for base in cls.__mro__ if base not in local and base.__module__ not in _NEUTRAL_BASES]
    own = {name for base in local for name in vars(base) if not name.startswith("__")}
    waiting = [*_ENTRY_METHODS, *(name for name in own if any(name in vars(base) for base in released))]
    methods = [dict(_methods(base)) for base in local]
    reached: set[str] = set()
    while waiting:
        name = waiting.pop()
        if name not in reached:
            reached.add(name)
            waiting.extend(used for own in methods if name in own for used in _names_in(own[name].__code__))
    return frozenset(reached)


def _foreign_entry_methods(cls: type) -> Iterator[types.FunctionType]:
    """Entry methods of released classes with code from another file: decorated, or replaced at run time."""
    for name in _ENTRY_METHODS:
        owner = next((base for base in cls.__mro__ if name in vars(base)), object)
        method = vars(owner).get(name)
        if not isinstance(method, types.FunctionType) or is_ours(method) or not is_released(owner.__module__):
            continue
        if method.__code__.co_filename != getattr(sys.modules.get(owner.__module__), "__file__", None):
            yield method


class _CodeDigest:
    """A hash of classes and functions, one after the other; each one once."""

    def __init__(self, *, live: LiveText | None = None) -> None:
        self._hasher = hashlib.sha256()
        self._places: dict[int, int] = {}
        self._known: dict[int, str] = {}
        self._kept_alive: list[Any] = []
        self._live = live

    def identity(self, name: str) -> str:
        """Return ``name``, with the digest of what was added if there is any."""
        return f"{name} code:{self._hasher.hexdigest()}" if self._places else name

    def add_class(self, cls: type, *, reached: frozenset[str] | None = None) -> None:
        """Add source, class attributes, and what the methods reach: all of them, or those named in ``reached``."""
        if not self._is_new(cls):
            return
        methods = dict(sorted(_methods(cls)))
        source = source_of(cls)
        if source is not None:
            self._write("source", cls.__qualname__, source)
        else:
            self._write("no source", cls.__qualname__)
            for name, method in methods.items():
                self._write(name)
                self._write_code(method.__code__)
        for name, value in sorted(vars(cls).items()):
            if _is_class_value(cls, name, value):
                self._add_value(name, value, cls.__module__)
        for name, method in methods.items():
            if reached is None or name in reached:
                self._follow(method)

    def add_function(self, function: types.FunctionType) -> None:
        if not self._is_new(function):
            return
        self._write("function", function.__qualname__)
        has_name = function.__name__ != "<lambda>"
        if has_name and (place := place_in_package(function)) is not None:
            self._write("released", place)
        elif has_name and (source := source_of(function)) is not None:
            self._write("source", source)
        else:
            self._write_code(function.__code__)
        for default in (*(function.__defaults__ or ()), *sorted((function.__kwdefaults__ or {}).items())):
            self._add_value("default", default, function.__module__ or "")
        self._follow(function)

    def _is_new(self, value: object) -> bool:
        if id(value) in self._places:
            return False
        self._places[id(value)] = len(self._places)
        self._kept_alive.append(value)
        return True

    def _write(self, *parts: str) -> None:
        for part in parts:
            data = part.encode("utf-8", "surrogatepass")
            self._hasher.update(b"%d:" % len(data) + data)

    def _write_code(self, code: types.CodeType) -> None:
        self._write("code", code.co_code.hex(), *code.co_names, *code.co_varnames)
        for constant in code.co_consts:
            if isinstance(constant, types.CodeType):
                self._write_code(constant)
            else:
                self._write(_constant_text(constant) or type(constant).__qualname__)

    def _follow(self, function: types.FunctionType) -> None:
        home = function.__globals__.get("__name__") or ""
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
            with contextlib.suppress(ValueError):  # an empty cell: a name that was never bound
                if name != "__class__":
                    self._add_value(name, cell.cell_contents, home)
        # A decorator of a released package gives its wrapper the module of what it wraps, but not its globals.
        if not is_released(function.__module__ or "") and not is_released(home):
            names = sorted(set(_names_in(function.__code__)))
            self._follow_names("", function.__globals__, names, home)

    def _follow_names(self, prefix: str, space: Mapping[str, Any], names: Iterable[str], home: str) -> None:
        for name in names:
            if name not in space:
                continue
            value = space[name]
            if not isinstance(value, types.ModuleType) or is_released(value.__name__):
                self._add_value(prefix + name, value, home)
            elif self._is_new(value):
                self._follow_names(f"{prefix}{name}.", vars(value), names, value.__name__)

    def _add_value(self, name: str, value: Any, home: str) -> None:
        self._write(name, self._text(value, home, 0))

    def _code(self, value: Any) -> str:
        """Name of a class or function; what is not released is added, and named by its place among the added."""
        if isinstance(value, type):
            local = [base for base in value.__mro__ if not is_released(base.__module__) and not is_ours(base)]
            for base in local:
                self.add_class(base)
            is_added = value in local
        elif is_added := not is_ours(value) and not is_released_function(value):
            self.add_function(value)
        return f"{qualified_name(value)}#{self._places[id(value)]}" if is_added else qualified_name(value)

    def _text(self, value: Any, home: str, depth: int) -> str:
        """Return the text of ``value``, read by code of the module ``home``. Never empty, the same in every process."""
        if (constant := _constant_text(value)) is not None:
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
            return f"{self._code(cls)}.{value.name}={self._text(value.value, home, depth)}"
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
        return [self._text(value, home, depth) for value in values]

    def _contents(self, value: Any, home: str, depth: int) -> str | None:
        """Return the text of a container, or ``None``. A mapping's order counts: code loops over it."""
        if isinstance(value, dict | types.MappingProxyType):
            pairs = dict.items(value) if isinstance(value, dict) else value.items()
            inner = [f"{self._text(name, home, depth)}:{self._text(item, home, depth)}" for name, item in pairs]
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
            return f"{self._text(value.__func__, home, depth)} of {self._text(value.__self__, home, depth)}"
        if isinstance(value, staticmethod | classmethod):
            return self._text(value.__func__, home, depth)
        if isinstance(value, types.BuiltinFunctionType | types.MethodWrapperType):
            owner = value.__self__
            is_free = owner is None or isinstance(owner, types.ModuleType | type)
            return qualified_name(value) if is_free else f"{value.__name__} of {self._text(owner, home, depth)}"
        cls = type(value)
        if not callable(value) or not is_released(cls.__module__):
            return None
        if cls.__module__ == "torch._ops":
            return f"{cls.__qualname__} {value}"
        state = state_of(value)
        for name in ("__wrapped__", "fn"):
            if isinstance(state.get(name), types.FunctionType):
                return f"{qualified_name(cls)} of {self._text(state[name], home, depth)}"
        if cls.__name__ == "ScriptFunction":
            return f"{qualified_name(cls)} {value.code}"
        return f"{qualified_name(cls)} {value.__name__}" if isinstance(getattr(value, "__name__", None), str) else None

    def _number(self, value: Any) -> str | None:
        for base in (int, float, complex, str, bytes):
            if isinstance(value, base):
                convert: Any = base if base is not str else str.__str__
                return f"{self._code(type(value))} {_constant_text(convert(value))}"
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
                return f"{head} {self._text(value.tolist(), home, depth)}"
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
            inner = [f"{name}={self._text(state[name], home, depth)}" for name in sorted(state)]
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


def _names_in(code: types.CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names_in(constant)


def _is_class_value(cls: type, name: str, value: Any) -> bool:
    """Methods are followed on their own; descriptors stand in the source, and Python keeps its own books."""
    if name.startswith(("__", "_pipevault", "_abc_")) or is_ours(value):
        return False
    if issubclass(cls, enum.Enum) and name.startswith("_") and name.endswith("_"):
        return False
    if isinstance(value, types.FunctionType | staticmethod | classmethod | property):
        return False
    kind = type(value)
    return not (hasattr(kind, "__get__") and is_released(kind.__module__) and not callable(value))


def _methods(cls: type) -> Iterator[tuple[str, types.FunctionType]]:
    for name, value in vars(cls).items():
        if isinstance(value, staticmethod | classmethod):
            value = value.__func__
        if isinstance(value, property):
            value = value.fget
        if isinstance(value, functools.cached_property):
            value = value.func
        if isinstance(value, types.FunctionType) and not is_ours(value):
            yield name, value


def _constant_text(value: Any) -> str | None:
    """Return the text of a constant, or ``None`` if it is not a constant."""
    kind = type(value)
    if kind is str:
        return _PLACE if os.path.isabs(value) else repr(value)
    if kind in _CONSTANT_TYPES:
        return repr(value)
    if kind is tuple or kind is frozenset:
        texts = [text for item in value if (text := _constant_text(item)) is not None]
        if len(texts) < len(value):
            return None
        return f"{kind.__name__}({','.join(sorted(texts) if kind is frozenset else texts)})"
    if kind.__module__ == "torch" and kind.__name__ == "dtype":
        return str(value)
    return None


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
