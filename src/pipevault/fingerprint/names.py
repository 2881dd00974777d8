"""Names of classes and functions that are the same in every process, and what belongs to a released package."""

from __future__ import annotations

import functools
import inspect
import os
import sys
import types
import weakref
from typing import Any

from pipevault.fingerprint.distributions import folder_of

ORIGINAL_CLASS_ATTRIBUTE = "_pipevault_original_class"
_sources: weakref.WeakKeyDictionary[Any, str | None] = weakref.WeakKeyDictionary()


def is_ours(value: Any) -> bool:
    """Return True if a callable or an object is pipevault's own, which never changes what a model computes."""
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
    """Return the readable name of a class or function; without the module if that is not a released package."""
    name = str(getattr(value, "__qualname__", None) or getattr(value, "__name__", type(value).__qualname__))
    module = getattr(value, "__module__", None) or ""
    return f"{module}.{name}" if module and is_released(module) else name


@functools.cache
def is_released(module_name: str) -> bool:
    """Return True if the module belongs to the standard library or to an installed distribution, wherever that lies."""
    root = module_name.partition(".")[0]
    if root in sys.stdlib_module_names or root in sys.builtin_module_names:
        return True
    return folder_of(module_name) is not None


def is_released_function(function: types.FunctionType) -> bool:
    """Return True if a function comes from a released package.

    ``functools.wraps`` copies a module name, but not globals.
    """
    home = function.__globals__.get("__name__") or ""
    return is_released(function.__module__ or "") and is_released(home) and function.__name__ != "<lambda>"


def source_of(value: Any) -> str | None:
    """Return the source of a module, class or function; ``None`` if there is none, as for code typed at a prompt."""
    if value not in _sources:
        try:
            _sources[value] = inspect.getsource(value)
        except (OSError, TypeError, SyntaxError):
            _sources[value] = None
    return _sources[value]


def place_in_package(function: types.FunctionType) -> str | None:
    """Return file below the folder of its distribution, line and name: unlike bytecode the same for every Python.

    ``None`` for code that belongs to no distribution, and for code that was made while the process runs.
    """
    folder = folder_of(function.__globals__.get("__name__") or "")
    code = function.__code__
    if folder is None or not code.co_filename.startswith(folder + os.sep):
        return None
    file = code.co_filename[len(folder) + 1 :].replace(os.sep, "/")
    return f"{file}:{code.co_firstlineno}:{code.co_name}"
