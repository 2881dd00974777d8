"""Names of classes and functions that are the same in every process, and what belongs to an installed distribution.

A distribution may lie anywhere: site-packages, ``--target``, conda. It is known by the ``dist-info`` folder next to its
packages. Nothing is imported, and other distributions are read only for a package whose name is none of theirs (``PIL``
of pillow).
"""

from __future__ import annotations

import functools
import inspect
import os
import re
import sys
import types
import weakref
from collections.abc import Iterator
from importlib import metadata
from typing import Any

_SITE_FOLDERS = frozenset({"site-packages", "dist-packages"})
_sources: weakref.WeakKeyDictionary[Any, str | None] = weakref.WeakKeyDictionary()


def is_ours(value: Any) -> bool:
    """Return True if a callable or an object is pipevault's own, which never changes what a model computes."""
    if isinstance(value, functools.partial):
        return is_ours(value.func)
    owner = value if isinstance(value, types.FunctionType | type) else getattr(value, "__func__", type(value))
    return (getattr(owner, "__module__", None) or "").partition(".")[0] == "pipevault"


def original_class(module: object) -> type:
    """Return the class of ``module``, seen through the classes that pipevault derives for frozen parts."""
    cls = type(module)
    original: type = getattr(cls, "_pipevault_original_class", cls)
    return original


def qualified_name(value: Any) -> str:
    """Return the readable name of a class or function; without the module if that is not a released package."""
    name = str(getattr(value, "__qualname__", None) or getattr(value, "__name__", type(value).__qualname__))
    module = getattr(value, "__module__", None) or ""
    return f"{module}.{name}" if module and is_released(module) else name


def source_of(value: Any) -> str | None:
    """Return the source of a module, class or function; ``None`` if there is none, as for code typed at a prompt."""
    if value not in _sources:
        try:
            _sources[value] = inspect.getsource(value)
        except (OSError, TypeError, SyntaxError):
            _sources[value] = None
    return _sources[value]


@functools.cache
def is_released(module_name: str) -> bool:
    """Return True if the module belongs to the standard library or to an installed distribution, wherever that lies."""
    root = module_name.partition(".")[0]
    return root in sys.stdlib_module_names or root in sys.builtin_module_names or folder_of(module_name) is not None


def is_released_function(function: types.FunctionType) -> bool:
    """Return True if a function comes from a released package.

    ``functools.wraps`` copies a module name, but not globals.
    """
    home = function.__globals__.get("__name__") or ""
    return is_released(function.__module__ or "") and is_released(home) and function.__name__ != "<lambda>"


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


def folder_of(module_name: str) -> str | None:
    """Return the folder of the installed distribution to which the module belongs; ``None`` for all other code.

    Code in a checkout that is installed as editable belongs to none: its version does not tell one state of the code
    from the next. So does a file that was not installed, though it may lie in ``site-packages``.
    """
    root = module_name.partition(".")[0]
    module, package = sys.modules.get(module_name), sys.modules.get(root)
    file = getattr(module or package, "__file__", None)
    if root == "__main__" or not isinstance(file, str) or not os.path.isabs(file):
        return None
    folder = _folder_around(package, file) or _folder_by_name(module_name, file)
    if folder is not None and _is_installed(folder, root):
        return folder
    true_name = getattr(module, "__name__", module_name)  # requests.packages.urllib3 is urllib3
    return folder_of(true_name) if true_name.partition(".")[0] != root else None


def _folder_around(package: types.ModuleType | None, file: str) -> str | None:
    """The folder that holds the top-level ``package``, if ``file`` lies in that package or is it."""
    top = getattr(package, "__file__", None)
    if not isinstance(top, str) or not os.path.isabs(top):
        return None  # a package without a file of its own: its parts may lie in several folders
    folder, name = os.path.split(top)
    if file == top and not name.startswith("__init__."):
        return folder
    return os.path.dirname(folder) if file.startswith(folder + os.sep) else None


def _folder_by_name(module_name: str, file: str) -> str | None:
    """The folder that ``file`` would be imported from under its full name; ``None`` if it does not fit the name."""
    path = os.path.dirname(file) if os.path.basename(file).startswith("__init__.") else file
    for name in reversed(module_name.split(".")):
        path, last = os.path.split(path)
        if last.partition(".")[0] != name:
            return None
    return path


@functools.cache
def _is_installed(folder: str, root: str) -> bool:
    return any(map(_is_fixed, _distributions(folder, root))) or root in _top_level_names(folder)


def _distributions(folder: str, name: str | None = None) -> Iterator[metadata.Distribution]:
    """The distributions in ``folder``, or that of one ``name``.

    An ``egg-info`` folder counts where packages are installed only; elsewhere it stands next to code in a checkout.
    """
    for found in metadata.distributions(name=name, path=[folder]):
        if os.path.basename(folder) in _SITE_FOLDERS or _fact(found, "METADATA"):
            yield found


@functools.cache
def _top_level_names(folder: str) -> frozenset[str]:
    """The names that the distributions in ``folder`` can be imported by, from their lists of names or of files."""
    patterns = {
        "top_level.txt": r"(?m)^([^/\s]+)\s*$",
        "RECORD": r"(?m)^([^/,.\n]+)(?=/|\.(?:py|pyd|so|[^/,\n]+\.so),)",
        "installed-files.txt": r"(?m)^\.\./([^/,.\n]+)",
    }
    names: set[str] = set()
    for found in filter(_is_fixed, _distributions(folder)):
        lists = (re.findall(pattern, _fact(found, name)) for name, pattern in patterns.items())
        names.update(next(filter(None, lists), ()))
    return frozenset(names)


def _is_fixed(distribution: metadata.Distribution) -> bool:
    """Return False if it points at a checkout (PEP 610); one that came from an index does not say."""
    return not re.search(r'"editable"\s*:\s*true', _fact(distribution, "direct_url.json"))


def _fact(distribution: metadata.Distribution, name: str) -> str:
    try:
        return distribution.read_text(name) or ""
    except (OSError, UnicodeError):  # what another distribution has there is no reason not to load
        return ""
