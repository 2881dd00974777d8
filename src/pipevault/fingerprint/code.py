"""Digest of classes and functions outside released packages, and of all that their code reaches by name."""

from __future__ import annotations

import contextlib
import enum
import functools
import hashlib
import types
import weakref
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from pipevault.fingerprint.names import (
    is_ours,
    is_released,
    is_released_function,
    place_in_package,
    qualified_name,
    source_of,
)
from pipevault.fingerprint.values import LiveText, ValueText, constant_text

_METHOD_TYPES = (
    types.FunctionType,
    staticmethod,
    classmethod,
    property,
    types.MemberDescriptorType,
    types.GetSetDescriptorType,
)


class CodeDigest:
    """A hash of classes and functions, one after the other; each one once."""

    def __init__(self, *, live: LiveText | None = None) -> None:
        self._hasher = hashlib.sha256()
        self._places: dict[int, int] = {}
        self._kept_alive: list[Any] = []
        code = weakref.WeakMethod(self._code_text)  # a cycle would keep the weights that were looked at
        self._values = ValueText(code=lambda value: code()(value), live=live)  # type: ignore[misc]

    @property
    def is_used(self) -> bool:
        return bool(self._places)

    def hexdigest(self) -> str:
        return self._hasher.hexdigest()

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
        place = place_in_package(function)
        source = None if function.__name__ == "<lambda>" else source_of(function)
        if place is not None and function.__name__ != "<lambda>":
            self._write("released", place)
        elif source is not None:
            self._write("source", source)
        else:
            self._write_code(function.__code__)
        for default in (*(function.__defaults__ or ()), *sorted((function.__kwdefaults__ or {}).items())):
            self._add_value("default", default, function.__module__ or "")
        self._follow(function)

    def _is_new(self, value: object) -> bool:
        known = id(value) in self._places
        if not known:
            self._places[id(value)] = len(self._places)
            self._kept_alive.append(value)
        return not known

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
            names = sorted(set(names_in(function.__code__)))
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
            return f"{qualified_name(value)}#{self._places[id(value)]}" if value in local else qualified_name(value)
        if is_ours(value) or is_released_function(value):
            return qualified_name(value)
        self.add_function(value)
        return f"{qualified_name(value)}#{self._places[id(value)]}"


def reached_names(classes: Iterable[type], entries: Iterable[str]) -> frozenset[str]:
    """Return the names that the methods in ``entries`` use, and the methods of those names, over all ``classes``."""
    methods = [dict(_methods(cls)) for cls in classes]
    reached: set[str] = set()
    waiting = list(entries)
    while waiting:
        name = waiting.pop()
        if name not in reached:
            reached.add(name)
            waiting.extend(used for own in methods if name in own for used in names_in(own[name].__code__))
    return frozenset(reached)


def names_in(code: types.CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from names_in(constant)


def _is_class_value(cls: type, name: str, value: Any) -> bool:
    """Methods are followed on their own; descriptors stand in the source, and Python keeps its own books."""
    if name.startswith(("__", "_pipevault", "_abc_")) or is_ours(value):
        return False
    if issubclass(cls, enum.Enum) and name.startswith("_") and name.endswith("_"):
        return False
    if isinstance(value, _METHOD_TYPES):
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
