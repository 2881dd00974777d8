"""A loaded pipeline: the same object, of a class made from its own class and :class:`FrozenPipeline`.

The class looks at the pipeline before each generation (see :mod:`pipevault.cache.guard`) and gives its components
to others as the eager modules that they share their state with, because diffusers' ``from_pipe`` accepts no others.
A copy of a loaded pipeline, also by pickling, is an eager one.
"""

from __future__ import annotations

import copyreg
import functools
import weakref
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from pipevault.cache.generation_hook import generate
from pipevault.cache.guard import Guard
from pipevault.cache.outcome import Outcome, PartOutcome
from pipevault.cache.turn import is_running, turn
from pipevault.compat.glibc import give_back
from pipevault.determinism.turns import DEFAULT_TIMEOUT_S
from pipevault.errors import SettingsError
from pipevault.graphs import parts as graph_parts
from pipevault.graphs.adapters import generating_methods
from pipevault.graphs.part import FrozenPart, part_state, unfrozen
from pipevault.graphs.state import PartState
from pipevault.pipeline import Pipeline

if TYPE_CHECKING:
    from pipevault.store.locks.leases import Lease

STATE = "_pipevault"
_NOT_CALLED = PartOutcome("not called")


class HeldLeases:
    """The leases of one pipeline, so that a prune may remove what is no longer used: they are released on request, when
    it is collected, or when the interpreter ends. A copy, as a copy of the pipeline is eager, holds none.
    """

    def __init__(self, leases: list[Lease] | None = None) -> None:
        """``leases`` may grow: graphs are opened when they are first used."""
        self.leases = leases if leases is not None else []
        self.release = weakref.finalize(self, _release, self.leases)

    def __reduce__(self) -> tuple[Any, ...]:
        return HeldLeases, ()


def _release(leases: Sequence[Lease]) -> None:
    for lease in leases:
        lease.release()


@dataclass(eq=False)
class LoadedState:
    """The state that pipevault keeps of a loaded pipeline.

    ``digests`` are those of the parts' architecture when they were loaded. ``leases`` keep the entries in the
    vault. ``default_size`` is that of calls that give none. ``turn_timeout_s``: how long a call waits for those of
    other threads. ``draws`` tells by kind of call whether it draws from the program's own random streams. ``weights``
    belongs to whoever runs the generations.
    """

    outcome: Outcome
    owner: weakref.ref[Any]
    names: tuple[str, ...] = ()
    digests: Mapping[str, str] = field(default_factory=dict)
    level: str = "repeatable"
    load: Mapping[str, Any] = field(default_factory=dict)
    weights: object = None
    guard: Guard | None = None
    leases: HeldLeases = field(default_factory=HeldLeases)
    default_size: Mapping[str, int] = field(default_factory=dict)
    turn_timeout_s: float = DEFAULT_TIMEOUT_S
    draws: dict[Hashable, bool] = field(default_factory=dict)

    def states(self, pipe: Pipeline) -> dict[str, PartState]:
        """The parts that this load froze and that are still in their places."""
        parts = {name: graph_parts.get_part(pipe, name) for name in self.names}
        return {name: part_state(part) for name, part in parts.items() if isinstance(part, FrozenPart)}

    def give_back(self, pipe: Pipeline) -> None:
        """Put the eager parts back in their places."""
        for name, part in self.states(pipe).items():
            part.holders.discard(self)
            if not part.holders:
                graph_parts.detach(pipe, [name])

    def check(self, pipe: Pipeline, name: str | None = None) -> None:
        """Raise :class:`~pipevault.errors.ChangedPartError` if the pipeline is not the one that was frozen; with
        ``name``, look at that part alone, which is called outside of a generation.
        """
        if self.guard is None:
            self.guard = Guard(pipe, self.digests)
        self.guard.check(pipe, name)


class FrozenPipeline:
    """The mix-in of every class that :func:`freeze_pipeline_class` makes."""

    __slots__ = ()

    _pipevault_original_class: type[Any]

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Reduce as an eager pipeline of the original class, for pickles and copies."""
        original, own = self._pipevault_original_class, getattr(self, "__dict__", {})
        twin: Any = original.__new__(original)  # type: ignore[call-overload]
        for name, value in own.items():
            if name != STATE:
                twin.__dict__[name] = unfrozen(value)
        if "_modules" in own:
            twin.__dict__["_modules"] = {name: unfrozen(child) for name, child in own["_modules"].items()}
        make, arguments, *rest = twin.__reduce_ex__(protocol)
        # A pickler insists that what ``copyreg.__newobj__`` makes is of the class of what it was given.
        return (_new if make is copyreg.__newobj__ else make, arguments, *rest)  # type: ignore[attr-defined]


def _new(cls: Any, *arguments: Any) -> Any:
    return cls.__new__(cls, *arguments)


_STATES: dict[int, LoadedState] = {}
"""The states of pipelines without a ``__dict__``, by identity."""


def attach_state(pipe: Pipeline, state: LoadedState) -> None:
    """Remember what a load did, and how it was asked for; with frozen parts the pipeline is guarded from now on."""
    release_class(pipe)
    if hasattr(pipe, "__dict__"):
        pipe.__dict__[STATE] = state
    else:
        _STATES[id(pipe)] = state
        weakref.finalize(pipe, _STATES.pop, id(pipe), None)
    for part in state.states(pipe).values():
        part.holders.add(state)
    if state.names:
        pipe.__class__ = freeze_pipeline_class(type(pipe))


def loaded_state(pipe: Pipeline) -> LoadedState | None:
    """Return what was loaded for this very pipeline; ``None`` for one that was not loaded, and for a copy."""
    own = getattr(pipe, "__dict__", None)
    state = own.get(STATE) if own is not None else _STATES.get(id(pipe))
    return state if isinstance(state, LoadedState) and state.owner() is pipe else None


def release_class(pipe: Pipeline) -> None:
    """Give the pipeline its own class back and forget what was loaded; its parts stay."""
    if isinstance(pipe, FrozenPipeline):
        pipe.__class__ = pipe._pipevault_original_class
    if hasattr(pipe, "__dict__"):
        pipe.__dict__.pop(STATE, None)
    else:
        _STATES.pop(id(pipe), None)


@contextmanager
def unchanged_on_error(pipe: Pipeline) -> Iterator[None]:
    """Leave the pipeline exactly as it was if a load fails: its parts, its class, what was loaded before."""
    state = loaded_state(pipe)
    frozen = graph_parts.frozen_parts(pipe)
    places = {name: part.place() for name, part in frozen.items()}
    names = (*frozen, *(state.names if state else ()))
    modules = {name: part for name in names if (part := graph_parts.get_part(pipe, name)) is not None}
    try:
        yield
    except BaseException:  # whatever it was goes on
        graph_parts.detach(pipe, [name for name in graph_parts.frozen_parts(pipe) if name not in frozen])
        for name, module in modules.items():
            now = graph_parts.get_part(pipe, name)
            if now is not None and now is not module:
                graph_parts.replace_part(pipe, now, module)
        for name, part in frozen.items():
            vars(part).update(places[name])
        if state is not None:
            attach_state(pipe, state)
        raise


@contextmanager
def given_back(pipe: Pipeline) -> Iterator[None]:
    """Give ``pipe`` its eager parts and its own class back, for what is done inside; if that fails, it is as it was."""
    state = loaded_state(pipe)
    with unchanged_on_error(pipe):
        if state is not None:
            state.give_back(pipe)
            release_class(pipe)
        yield
    if state is not None:
        state.leases.release()


def unload(pipe: Pipeline) -> Any:
    """Give ``pipe`` its eager parts and its own class back, and return it; one that was not loaded stays as it is.

    A part that another loaded pipeline shares stays frozen in that one's places.
    """
    with turn(pipe, f"unloading {type(pipe).__name__}"):
        if (state := loaded_state(pipe)) is not None:
            state.give_back(pipe)
            release_class(pipe)
            state.leases.release()
            give_back()
    return pipe


def status(pipe: Pipeline) -> Outcome:
    """Return what :meth:`~pipevault.PipelineCache.load` did with ``pipe``, and what calls have frozen since.

    Raises :class:`SettingsError` if it was never loaded; a copy of a loaded pipeline is eager and counts as such.
    """
    state = loaded_state(pipe)
    if state is None:
        raise SettingsError(
            f"This {type(pipe).__name__} was not loaded by pipevault. Load it: PipelineCache().load(pipe)."
        )
    parts = dict(state.outcome.parts)
    for name, members in graph_parts.by_part(state.states(pipe)).items():
        parts[name] = part_now(members, parts.get(name, _NOT_CALLED))
    return replace(state.outcome, parts=parts)


outcome = status
"""The first name of :func:`status`, which stays."""


def part_now(members: Sequence[PartState], loaded: PartOutcome = _NOT_CALLED) -> PartOutcome:
    """Return the outcome of a part, or of all blocks of one, after what it was when it was ``loaded``.

    It is eager where a call ran eagerly. Calls that were not made count where the part has no graphs.
    """
    if loaded.status == "eager":
        return loaded
    graphs = max(len({slot.kept.key for part in members for slot in part.graphs}), loaded.graphs)
    reasons = graph_parts.eager_reasons(members)
    if not graphs:
        reasons += [slot.refusal for part in members for slot in part.table if slot.refusal]
    status = "eager" if reasons else "frozen" if graphs else loaded.status
    return PartOutcome(status, "; ".join(dict.fromkeys(reasons)), graphs, members[0].regions)


@functools.cache
def freeze_pipeline_class(original: Any) -> type[Any]:
    """The class made for ``original``, with its name and signatures, which ``save_pretrained`` writes."""
    attributes: dict[str, Any] = {
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "__doc__": original.__doc__,
        "__slots__": (),
        "_pipevault_original_class": original,
        "__reduce_ex__": FrozenPipeline.__reduce_ex__,
    }
    for name in generating_methods(original):
        attributes[name] = _guarded(getattr(original, name))
    if isinstance(getattr(original, "components", None), property):

        def components(pipe: Pipeline) -> dict[str, Any]:
            return {name: unfrozen(value) for name, value in original.components.__get__(pipe).items()}

        attributes["components"] = property(components)
    # The original comes first: an object changes its class only where both have its layout.
    return type(original.__name__, (original, FrozenPipeline), attributes)


def _guarded(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def guarded(pipe: Pipeline, *args: Any, **kwargs: Any) -> Any:
        if loaded_state(pipe) is None or is_running(pipe):
            return method(pipe, *args, **kwargs)
        return generate(pipe, method, args, kwargs, lambda: loaded_state(pipe))

    return guarded
