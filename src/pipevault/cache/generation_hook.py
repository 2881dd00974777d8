"""Who runs the generations of a loaded pipeline: a layer above announces itself, so that the arrow of imports runs one
way.

A home is a module with a function ``generate(pipe, method, args, kwargs, find)``, imported at the first generation.
``pipevault/__init__.py`` announces :mod:`pipevault.runtime.generation`.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOME: list[str] = []


def announce_generation(home: str) -> None:
    """Have the module ``home`` run all generations from now on."""
    _HOME[:] = [home]


def generate(*arguments: Any) -> Any:
    """Return what the announced module's ``generate`` returns."""
    return import_module(_HOME[0]).generate(*arguments)
