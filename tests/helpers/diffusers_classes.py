"""Every pipeline class of diffusers, and the methods of it that generate."""

from __future__ import annotations

import functools
import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterator
from typing import Any

import diffusers
from diffusers import DiffusionPipeline
from diffusers.modular_pipelines import ModularPipeline

from pipevault.graphs.adapters import METHODS

_PACKAGES = ("diffusers.pipelines", "diffusers.modular_pipelines", "diffusers.experimental")


@functools.cache
def pipeline_classes() -> tuple[type[Any], ...]:
    for module in pkgutil.walk_packages(diffusers.__path__, "diffusers."):
        if module.name.startswith(_PACKAGES):
            try:
                importlib.import_module(module.name)
            except ImportError:
                continue  # what it needs is not installed
    found = {cls for base in (DiffusionPipeline, ModularPipeline) for cls in (base, *_subclasses(base))}
    return tuple(sorted((cls for cls in found if _is_of_diffusers(cls)), key=lambda cls: cls.__name__))


def generating_methods(cls: type[Any]) -> dict[str, Callable[..., Any]]:
    """Methods that pipevault guards, and others that take a generator and a number of steps."""
    methods: dict[str, Callable[..., Any]] = {}
    for name, method in inspect.getmembers(cls, inspect.isfunction):
        wanted = {"generator", "num_inference_steps"} <= set(inspect.signature(method).parameters)
        if name in METHODS or (wanted and not name.startswith("_")):
            methods[name] = method
    return methods


def parameters(method: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    listed = list(inspect.signature(method).parameters.items())[1:]
    return {name: parameter for name, parameter in listed if parameter.kind not in variadic}


def _subclasses(cls: type[Any]) -> Iterator[type[Any]]:
    for subclass in cls.__subclasses__():
        yield subclass
        yield from _subclasses(subclass)


def _is_of_diffusers(cls: type[Any]) -> bool:
    return cls.__module__.startswith("diffusers.")
