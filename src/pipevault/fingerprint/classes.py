"""Identities of classes and functions that are the same in every process, and change when their code does.

A class of a released package is named by module and qualified name; the toolchain's versions cover its code. Of all
others (``__main__``, a local file, code that came with a checkpoint) the source counts, and the local functions,
classes and values that ``forward`` reaches; the module does not: it depends on how the file was started.
"""

from __future__ import annotations

import contextlib
import enum
import functools
import hashlib
import sys
import types
import weakref
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from pipevault.fingerprint.names import (
    is_ours,
    is_released,
    is_released_function,
    original_class,
    place_in_package,
    qualified_name,
    source_of,
)
from pipevault.fingerprint.values import LiveText, ValueText, constant_text

__all__ = ["class_identity", "function_identity", "is_released", "original_class", "qualified_name"]

_ENTRY_METHODS = ("forward", "__call__")
# Bases that a class has for its package's sake: what it overrides of them is not a step of the computation.
_NEUTRAL_BASES = frozenset({"builtins", "abc", "typing", "enum", "torch.nn.modules.module"})

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
        self._kept_alive: list[Any] = []
        code = weakref.WeakMethod(self._code_text)  # a cycle would keep the weights that were looked at
        self._values = ValueText(code=lambda value: code()(value), live=live)  # type: ignore[misc]

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
                self._write(constant_text(constant) or type(constant).__qualname__)

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
        self._write(name, self._values.text(value, home))

    def _code_text(self, value: Any) -> str:
        """Name of a class or function; what is not released is added, and named by its place among the added."""
        if isinstance(value, type):
            local = [base for base in value.__mro__ if not is_released(base.__module__) and not is_ours(base)]
            for base in local:
                self.add_class(base)
            is_added = value in local
        elif is_added := not is_ours(value) and not is_released_function(value):
            self.add_function(value)
        return f"{qualified_name(value)}#{self._places[id(value)]}" if is_added else qualified_name(value)


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
