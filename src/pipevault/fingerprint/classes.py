"""Names for classes and functions that are the same in every process, and change when their code does.

A class of a released package is named by module and qualified name; the toolchain's versions cover its code.
For all others (``__main__``, a local file, code that came with a checkpoint) the source is part of the
identity, and so are the local functions, classes and constants that ``forward`` reaches. Such a class is
named without its module, which depends on how and from where the file was started.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import inspect
import os
import sys
import types
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ORIGINAL_CLASS_ATTRIBUTE = "_pipevault_original_class"
_ENTRY_METHODS = ("forward", "__call__")
_PACKAGE_FOLDERS = frozenset({"site-packages", "dist-packages"})
_CONSTANT_TYPES = (bool, int, float, complex, str, bytes, type(None))

# Only what cannot change while the process runs is remembered: a constant that local code reads can.
_EntryCode = tuple[Any, ...]
_released_identities: weakref.WeakKeyDictionary[type, tuple[_EntryCode, str]] = weakref.WeakKeyDictionary()
_sources: weakref.WeakKeyDictionary[Any, str | None] = weakref.WeakKeyDictionary()


def is_ours(value: Any) -> bool:
    """Whether a callable or an object is pipevault's own, which never changes what a model computes."""
    if isinstance(value, functools.partial):
        return is_ours(value.func)
    owner = value if isinstance(value, types.FunctionType | type) else getattr(value, "__func__", type(value))
    name = getattr(owner, "__module__", None) or ""
    return name == "pipevault" or name.startswith("pipevault.")


def original_class(module: object) -> type:
    """The class of ``module``, seen through the classes that pipevault derives for frozen parts."""
    cls = type(module)
    original: type = getattr(cls, ORIGINAL_CLASS_ATTRIBUTE, cls)
    return original


def qualified_name(value: Any) -> str:
    """Readable name of a class or function; without the module if that is no released package."""
    name = str(getattr(value, "__qualname__", None) or getattr(value, "__name__", type(value).__qualname__))
    module = getattr(value, "__module__", None) or ""
    return f"{module}.{name}" if module and is_released(module) else name


@functools.cache
def is_released(module_name: str) -> bool:
    """Whether the module belongs to the standard library or to an installed distribution."""
    root = module_name.partition(".")[0]
    if root in sys.stdlib_module_names or root in sys.builtin_module_names:
        return True
    module = sys.modules.get(module_name) or sys.modules.get(root)
    file = getattr(module, "__file__", None)
    if root == "__main__" or file is None:
        return False
    return not _PACKAGE_FOLDERS.isdisjoint(Path(file).parts)


def class_identity(cls: type) -> str:
    """Name of ``cls``, with a digest of its code if it is not released or its entry method was replaced."""
    entries = tuple(getattr(getattr(cls, name, None), "__code__", None) for name in _ENTRY_METHODS)
    known = _released_identities.get(cls)
    if known is not None and known[0] == entries:
        return known[1]
    text = qualified_name(cls)
    local = [base for base in cls.__mro__ if not is_released(base.__module__)]
    code = _CodeText()
    for base in local:
        code.add_class(base, entry_methods=_ENTRY_METHODS)
    for method in _foreign_entry_methods(cls):
        code.add_function(method)
    if code.is_used:
        text = f"{text} code:{code.hexdigest()}"
    if not local:
        _released_identities[cls] = (entries, text)
    return text


def function_identity(function: Any) -> str:
    """Name of a function, with a digest of its code if it is a lambda or not released."""
    text = qualified_name(function)
    if not isinstance(function, types.FunctionType):
        return text
    if is_released(function.__module__ or "") and "<lambda>" not in text:
        return text
    code = _CodeText()
    code.add_function(function)
    return f"{text} code:{code.hexdigest()}"


def _foreign_entry_methods(cls: type) -> Iterator[types.FunctionType]:
    """Entry methods of released classes with code from another file: decorated, or replaced at run time."""
    for name in _ENTRY_METHODS:
        owner = next((base for base in cls.__mro__ if name in vars(base)), None)
        method = vars(owner)[name] if owner is not None else None
        if not isinstance(method, types.FunctionType) or owner is None or is_ours(method):
            continue
        home = getattr(sys.modules.get(owner.__module__), "__file__", None)
        if is_released(owner.__module__) and method.__code__.co_filename != home:
            yield method


class _CodeText:
    """Hashes classes and functions outside released packages, with what their code reaches by name."""

    def __init__(self) -> None:
        self._hasher = hashlib.sha256()
        self._seen: set[int] = set()

    @property
    def is_used(self) -> bool:
        return bool(self._seen)

    def hexdigest(self) -> str:
        return self._hasher.hexdigest()

    def add_class(self, cls: type, *, entry_methods: tuple[str, ...] | None = None) -> None:
        """Adds source, class constants, and what the methods reach: all methods, or those the entries use."""
        if not self._is_new(cls):
            return
        methods = dict(sorted(_methods(cls)))
        source = _source(cls)
        if source is not None:
            self._write("source", cls.__qualname__, source)
        else:
            self._write("no source", cls.__qualname__)
            for name, method in methods.items():
                self._write(name)
                self._write_code(method.__code__)
        for name, value in sorted(vars(cls).items()):
            hidden = name.startswith(("__", "_pipevault")) or (text := constant_text(value)) is None
            if not hidden:
                self._write(name, text or "")
        for name in _reached_methods(methods, entry_methods):
            self._follow(methods[name])

    def add_function(self, function: types.FunctionType) -> None:
        if not self._is_new(function):
            return
        self._write("function", function.__qualname__)
        place = _place_in_package(function.__code__)
        source = None if function.__name__ == "<lambda>" else _source(function)
        if place is not None and function.__name__ != "<lambda>":
            self._write("released", place)
        elif source is not None:
            self._write("source", source)
        else:
            self._write_code(function.__code__)
        for default in (*(function.__defaults__ or ()), *sorted((function.__kwdefaults__ or {}).items())):
            self._add_value("default", default)
        self._follow(function)

    def _is_new(self, value: object) -> bool:
        known = id(value) in self._seen
        self._seen.add(id(value))
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
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
            with contextlib.suppress(ValueError):  # an empty cell: a name that was never bound
                self._add_value(name, cell.cell_contents)
        if is_released(function.__module__ or ""):
            return
        names = sorted(set(_names(function.__code__)))
        for name in names:
            value = function.__globals__.get(name)
            if isinstance(value, types.ModuleType) and not is_released(value.__name__):
                for inner in names:
                    if inner in vars(value):
                        self._add_value(f"{name}.{inner}", vars(value)[inner])
            elif name in function.__globals__:
                self._add_value(name, value)

    def _add_value(self, name: str, value: Any) -> None:
        if isinstance(value, types.FunctionType | type):
            if name == "__class__":
                return
            if is_ours(value) or is_released(value.__module__ or ""):
                self._write(name, qualified_name(value))
            elif isinstance(value, type):
                for base in value.__mro__:
                    if not is_released(base.__module__):
                        self.add_class(base)
            else:
                self.add_function(value)
        elif (text := constant_text(value)) is not None:
            self._write(name, text)


def _source(value: Any) -> str | None:
    """Source of a class or function; ``None`` if there is none, as for code typed at a prompt."""
    if value not in _sources:
        try:
            _sources[value] = inspect.getsource(value)
        except (OSError, TypeError, SyntaxError):
            _sources[value] = None
    return _sources[value]


def _place_in_package(code: types.CodeType) -> str | None:
    """File below ``site-packages``, line and name: the same for every version of Python, unlike bytecode."""
    parts = Path(code.co_filename).parts
    for index, part in enumerate(parts):
        if part in _PACKAGE_FOLDERS:
            return f"{'/'.join(parts[index + 1 :])}:{code.co_firstlineno}:{code.co_name}"
    return None


def _reached_methods(methods: dict[str, types.FunctionType], entries: tuple[str, ...] | None) -> list[str]:
    if entries is None:
        return list(methods)
    reached: set[str] = set()
    waiting = [name for name in methods if name in entries]
    while waiting:
        name = waiting.pop()
        reached.add(name)
        used = set(_names(methods[name].__code__))
        waiting.extend(other for other in methods if other in used and other not in reached)
    return sorted(reached)


def constant_text(value: Any) -> str | None:
    """Text of a constant, or ``None`` if it is no constant or names a place on this machine."""
    if isinstance(value, str):
        return None if os.path.isabs(value) else repr(value)
    if type(value) in _CONSTANT_TYPES:
        return repr(value)
    if isinstance(value, tuple | frozenset):
        inner = [constant_text(item) or "?" for item in value]
        return f"{type(value).__name__}({','.join(sorted(inner) if isinstance(value, frozenset) else inner)})"
    if type(value).__module__ == "torch" and type(value).__name__ == "dtype":
        return str(value)
    return None


def _methods(cls: type) -> Iterator[tuple[str, types.FunctionType]]:
    for name, value in vars(cls).items():
        if isinstance(value, staticmethod | classmethod):
            value = value.__func__
        if isinstance(value, property):
            value = value.fget
        if isinstance(value, types.FunctionType) and not is_ours(value):
            yield name, value


def _names(code: types.CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names(constant)
