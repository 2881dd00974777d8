"""Who runs the generations of a loaded pipeline: a layer above announces itself, so that the arrow of imports runs one
way.

A home is a module with a function ``generate(pipe, method, args, kwargs, find)``, imported at the first generation.
``pipevault/__init__.py`` announces :mod:`pipevault.runtime.generation`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

from pipevault.pipeline import Pipeline

_HOME: list[str] = []


def announce_generation(home: str) -> None:
    """Have the module ``home`` run all generations from now on."""
    _HOME[:] = [home]


def generate(
    pipe: Pipeline,
    method: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    find: Callable[[], Any],
) -> Any:
    """Return what the announced module's ``generate`` returns."""
    [home] = _HOME
    return import_module(home).generate(pipe, method, args, kwargs, find)
