"""Adapters: the parts, the methods and a warm-up call of pipelines that are none of diffusers'.

Adapters belong to a class, or to the name of one, so that a model's code need not be imported to tell of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from pipevault.errors import SettingsError
from pipevault.graphs import pyramid_flow
from pipevault.pipeline import Pipeline

METHODS = ("__call__", "generate", "generate_i2v", "sample")
"""The methods that generate, of pipelines without an adapter."""

Parts: TypeAlias = "Sequence[str] | Callable[[Any], Sequence[str]]"
WarmUp: TypeAlias = "Callable[[Any, Mapping[str, Any]], Any]"


@dataclass(frozen=True)
class Adapter:
    """The description of a pipeline class; see :func:`register_adapter`."""

    parts: Parts | None
    methods: tuple[str, ...]
    call: WarmUp | None

    def part_names(self, pipe: Pipeline) -> tuple[str, ...] | None:
        """Return the parts that it names for ``pipe``; ``None`` if they are to be found."""
        if self.parts is None:
            return None
        return tuple(self.parts(pipe) if callable(self.parts) else self.parts)


_ADAPTERS: dict[type | str, Adapter] = {
    pyramid_flow.CLASS: Adapter(pyramid_flow.part_names, pyramid_flow.METHODS, pyramid_flow.warm_up),
}


def register_adapter(
    cls: type | str,
    *,
    parts: Parts | None = None,
    methods: Sequence[str] = METHODS,
    call: WarmUp | None = None,
) -> None:
    """Tell how pipelines of ``cls`` and its subclasses are built.

    ``cls`` may be the name of a class whose code is not imported yet. ``parts`` are the modules to freeze, by dotted
    name (``text_encoder.text_encoder_2``, ``experts.0``), or a function of the pipeline that returns them; by default
    they are found. ``methods`` generate: each is guarded, seeded and recorded. ``call(pipe, shape)`` makes the warm-up
    call for a load: it gets what ``load`` was given (``height``, ``batch_size``, …, and the items of a mapping
    ``call=``) and returns keyword arguments of the first of ``methods``, which those of that mapping are added to, or
    a function without arguments. Raises :class:`SettingsError` for a class that has none of the methods.
    """
    if not isinstance(cls, type) and not (isinstance(cls, str) and cls.isidentifier()):
        raise SettingsError(f"register_adapter takes a class or the name of one, not {cls!r}.")
    known = tuple(methods)
    if isinstance(cls, type):
        known = tuple(name for name in methods if has_method(cls, name))
        if not known:
            names = ", ".join(methods)
            raise SettingsError(f"{cls.__name__} has none of the methods {names}. Name one that generates.")
        if tuple(methods) != METHODS and len(known) != len(methods):
            missing = ", ".join(name for name in methods if name not in known)
            raise SettingsError(f"{cls.__name__} has no method {missing}. Its adapter was not registered.")
    _ADAPTERS[cls] = Adapter(parts if parts is None or callable(parts) else tuple(parts), known, call)


def adapter_of(pipe: Pipeline) -> Adapter | None:
    """Return the adapter of the nearest class of ``pipe`` that has one."""
    return _adapter_of_class(type(pipe))


def _adapter_of_class(cls: type) -> Adapter | None:
    names = (name for base in cls.__mro__ for name in (base, base.__name__))
    return next((_ADAPTERS[name] for name in names if name in _ADAPTERS), None)


def generating_methods(cls: type) -> tuple[str, ...]:
    """Return the names of the methods of a pipeline class that generate, the main one first."""
    adapter = _adapter_of_class(cls)
    names = adapter.methods if adapter else METHODS
    return tuple(name for name in names if has_method(cls, name))


def main_method(cls: type) -> str:
    """Return the name of the method that a load makes its warm-up call of."""
    adapter = _adapter_of_class(cls)
    return adapter.methods[0] if adapter else "__call__"


def has_method(cls: type, name: str) -> bool:
    """Return whether instances have the method; every class can be called itself, which does not count."""
    return any(name in vars(base) for base in cls.__mro__ if base is not object) and callable(getattr(cls, name))
