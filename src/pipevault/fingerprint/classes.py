"""Identities of classes and functions that are the same in every process, and change when their code does.

A class of a released package is named by module and qualified name; the toolchain's versions cover its code.
For all others (``__main__``, a local file, code that came with a checkpoint) the source is part of the
identity, and so are the local functions, classes and values that ``forward`` reaches. Such a class is
named without its module, which depends on how and from where the file was started.
"""

from __future__ import annotations

import sys
import types
import weakref
from collections.abc import Iterator
from typing import Any

from pipevault.fingerprint.code import CodeDigest, reached_names
from pipevault.fingerprint.names import is_ours, is_released, is_released_function, original_class, qualified_name
from pipevault.fingerprint.values import LiveText

__all__ = ["class_identity", "function_identity", "is_ours", "is_released", "original_class", "qualified_name"]

_ENTRY_METHODS = ("forward", "__call__")
# Bases that a class has for its package's sake: what it overrides of them is not a step of the computation.
_NEUTRAL_BASES = frozenset({"builtins", "abc", "typing", "enum", "torch.nn.modules.module"})

# Only what cannot change while the process runs is remembered: a value that local code reads can.
_EntryCode = tuple[Any, ...]
_released_identities: weakref.WeakKeyDictionary[type, tuple[_EntryCode, str]] = weakref.WeakKeyDictionary()


def class_identity(cls: type, *, live: LiveText | None = None) -> str:
    """Name of ``cls``, with a digest of its code if it is not released or its entry method was replaced.

    ``live`` gives the text of modules and tensors that the code reads; without it their values count.
    """
    entries = tuple(getattr(getattr(cls, name, None), "__code__", None) for name in _ENTRY_METHODS)
    known = _released_identities.get(cls)
    if known is not None and known[0] == entries:
        return known[1]
    text = qualified_name(cls)
    local = [base for base in cls.__mro__ if not is_released(base.__module__)]
    code = CodeDigest(live=live)
    reached = _reached(cls, local)
    for base in local:
        code.add_class(base, reached=reached)
    for method in _foreign_entry_methods(cls):
        code.add_function(method)
    if code.is_used:
        text = f"{text} code:{code.hexdigest()}"
    if not local:
        _released_identities[cls] = (entries, text)
    return text


def function_identity(function: Any, *, live: LiveText | None = None) -> str:
    """Return the name of a function, with a digest of its code if it is a lambda or not released."""
    text = qualified_name(function)
    if not isinstance(function, types.FunctionType):
        return text
    if is_released_function(function):
        return text
    code = CodeDigest(live=live)
    code.add_function(function)
    return f"{text} code:{code.hexdigest()}"


def _reached(cls: type, local: list[type]) -> frozenset[str] | None:
    """Names that a call of a module uses, its overrides of released code included; ``None``, all, for other classes."""
    if not local or not hasattr(cls, "forward"):
        return None
    released = [base for base in cls.__mro__ if base not in local and base.__module__ not in _NEUTRAL_BASES]
    own = {name for base in local for name in vars(base) if not name.startswith("__")}
    overrides = {name for name in own if any(name in vars(base) for base in released)}
    return reached_names(local, (*_ENTRY_METHODS, *sorted(overrides)))


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
