"""The turn of a pipeline: calls of it are served one after the other, because it and its scheduler have state.

Pipelines that share a component, as those of diffusers' ``from_pipe`` do, take turns too.
"""

from __future__ import annotations

import threading
from collections.abc import Hashable, Iterator
from contextlib import AbstractContextManager, contextmanager
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

from pipevault.determinism.turns import ALONE, DEFAULT_TIMEOUT_S, TURNS
from pipevault.graphs import parts as graph_parts
from pipevault.pipeline import Pipeline

_STATELESS = (type, FunctionType, BuiltinFunctionType, MethodType, ModuleType)


class _Running(threading.local):
    """The pipelines whose calls run in this thread, outermost first."""

    pipes: tuple[int, ...] = ()


_RUNNING = _Running()


def resources(pipe: Pipeline) -> dict[Hashable, Hashable]:
    """Return what a call of ``pipe`` needs alone: the pipeline, those in it, and their components."""
    found: dict[Hashable, Hashable] = {}
    _add(pipe, found)
    return found


def _add(owner: Any, found: dict[Hashable, Hashable]) -> None:
    if _identity(owner) in found:
        return
    found[_identity(owner)] = ALONE
    for _, value in graph_parts.members(owner):
        if graph_parts.is_pipeline(value):
            _add(value, found)
            continue
        for item in value if isinstance(value, (list, tuple)) else value.values() if type(value) is dict else (value,):
            if hasattr(item, "__dict__") and not isinstance(item, _STATELESS):
                found[_identity(item)] = ALONE


def _identity(value: Any) -> Hashable:
    """A frozen part shares its ``__dict__`` with the eager module, and with frozen parts of other pipelines."""
    return "component", id(getattr(value, "__dict__", value))


def turn(pipe: Pipeline, what: str) -> AbstractContextManager[float]:
    """Hold the turn of ``pipe`` inside, for other work than a generation."""
    return TURNS.take(resources(pipe), what=what, timeout_s=DEFAULT_TIMEOUT_S)


@contextmanager
def running(pipe: Pipeline) -> Iterator[None]:
    """Mark a call of ``pipe`` as running in this thread."""
    before = _RUNNING.pipes
    _RUNNING.pipes = (*before, id(pipe))
    try:
        yield
    finally:
        _RUNNING.pipes = before


def is_running(pipe: Pipeline) -> bool:
    """Return whether this thread is inside a call of ``pipe``: then a call is part of that one."""
    return id(pipe) in _RUNNING.pipes
