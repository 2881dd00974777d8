"""A loaded pipeline: the same object, of a class made from (:class:`FrozenPipeline`, its own class).

The class looks at the pipeline before each generation (see :mod:`pipevault.manager.guard`) and gives its components
to others as the eager modules that they share their state with, because diffusers' ``from_pipe`` accepts no others.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import nn

from pipevault.determinism.levels import parse_level
from pipevault.errors import SettingsError
from pipevault.graphs.part import FrozenPart, unfrozen
from pipevault.manager.guard import Guard
from pipevault.manager.leases import HeldLeases
from pipevault.manager.outcome import Outcome
from pipevault.manager.recorded_weights import ORIGINS, RecordedWeights

if TYPE_CHECKING:
    from pipevault.manager.run_record import Recorder

STATE = "_pipevault"
GENERATING = ("__call__", "generate")


@dataclass
class LoadedState:
    """What pipevault knows of a pipeline. ``digests`` are those of the parts' architecture when they were frozen.

    ``generating`` keeps a ``generate`` that calls the pipeline itself from being recorded twice. ``leases`` keep the
    entries in the vault.
    """

    outcome: Outcome
    owner: weakref.ref[Any]
    digests: Mapping[str, str] = field(default_factory=dict)
    level: str = "repeatable"
    load: Mapping[str, Any] = field(default_factory=dict)
    recorder: Recorder | None = None
    guard: Guard | None = None
    generating: bool = False
    leases: HeldLeases = field(default_factory=HeldLeases)

    def get_recorder(self, pipe: Any) -> Recorder:
        if self.recorder is None:
            from pipevault.manager.run_record import Recorder

            origins = vars(pipe).get(ORIGINS)
            self.recorder = Recorder(self.outcome, self.load, RecordedWeights(origins))
        return self.recorder

    def check(self, pipe: Any) -> None:
        """Raises :class:`~pipevault.errors.ChangedPartError` if the pipeline is not the one that was frozen."""
        if self.guard is None:
            self.guard = Guard(pipe, self.digests)
        self.guard.check(pipe)


class FrozenPipeline:
    """Mix-in of every class that :func:`freeze_pipeline_class` makes."""

    _pipevault_original_class: type[Any]


def attach_state(
    pipe: Any,
    outcome: Outcome,
    digests: Mapping[str, str],
    *,
    level: str,
    load: Mapping[str, Any] | None = None,
    leases: HeldLeases | None = None,
) -> None:
    """Remember what a load did, and how it was asked for; with frozen parts the pipeline is guarded from now on."""
    release_class(pipe)
    state = LoadedState(outcome, weakref.ref(pipe), digests, level, load or {}, leases=leases or HeldLeases())
    object.__setattr__(pipe, STATE, state)
    if digests:
        pipe.__class__ = freeze_pipeline_class(type(pipe))  # type: ignore[arg-type]


def release_class(pipe: Any) -> None:
    """Give the pipeline its own class back and forget what was loaded."""
    if isinstance(pipe, FrozenPipeline):
        pipe.__class__ = pipe._pipevault_original_class
    state = vars(pipe).get(STATE)
    if isinstance(state, LoadedState) and state.owner() is pipe:
        state.leases.release()
    if STATE in vars(pipe):
        object.__delattr__(pipe, STATE)


def outcome(pipe: Any) -> Outcome:
    """What :meth:`~pipevault.PipelineCache.load` did with ``pipe``.

    Raises :class:`SettingsError` if it was never loaded; a copy of a loaded pipeline is eager and counts as such.
    """
    state = vars(pipe).get(STATE)
    if not isinstance(state, LoadedState) or state.owner() is not pipe:
        raise SettingsError(
            f"This {type(pipe).__name__} was not loaded by pipevault. Load it: PipelineCache().load(pipe)."
        )
    return state.outcome


@functools.cache
def freeze_pipeline_class(original: Any) -> type[Any]:
    """It bears the original's name and signatures, so that ``save_pretrained`` writes what it always wrote."""
    attributes: dict[str, Any] = {
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "__doc__": original.__doc__,
        "_pipevault_original_class": original,
    }
    for name in GENERATING:
        if callable(getattr(original, name, None)):
            attributes[name] = _guarded(getattr(original, name))
    if isinstance(getattr(original, "components", None), property):
        attributes["components"] = property(lambda pipe: _eager_components(original.components.__get__(pipe)))
    return type(original.__name__, (FrozenPipeline, original), attributes)


def _guarded(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def guarded(pipe: Any, *args: Any, **kwargs: Any) -> Any:
        state = vars(pipe).get(STATE)
        if not isinstance(state, LoadedState) or state.owner() is not pipe or state.generating:
            return method(pipe, *args, **kwargs)
        from pipevault.manager.generation import generate

        state.check(pipe)
        state.leases.refresh()
        state.generating = True
        try:
            return generate(
                pipe, method, args, kwargs, asked=parse_level(state.level), recorder=state.get_recorder(pipe)
            )
        finally:
            state.generating = False

    return guarded


def _eager_components(components: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: unfrozen(value) if isinstance(value, nn.Module) and isinstance(value, FrozenPart) else value
        for name, value in components.items()
    }
