"""One generation of a loaded pipeline: in its turn, at its level, with the noise that it was given, recorded."""

from __future__ import annotations

import inspect
import logging
import time
from collections.abc import Callable, Hashable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from pipevault.cache.keys import execution_device
from pipevault.cache.rehearsal import generating
from pipevault.cache.turn import resources, running
from pipevault.calls.describe import describe
from pipevault.calls.samples import Samples, count_nets, samples_of, split
from pipevault.determinism.layers import STREAMS, WITH_OTHERS, put
from pipevault.determinism.levels import SWITCHES, Level, level, needs, parse_level
from pipevault.determinism.streams import check_device
from pipevault.determinism.turns import ALONE, TURNS
from pipevault.errors import BadCallError
from pipevault.graphs import parts as graph_parts
from pipevault.pipeline import Pipeline
from pipevault.runtime.drawing import DrawnOutput, Sources, draw
from pipevault.runtime.joined_outputs import join
from pipevault.runtime.records import attach_record
from pipevault.runtime.run_record import make_record, observed, weights_of

if TYPE_CHECKING:
    from pipevault.cache.loaded import LoadedState

logger = logging.getLogger("pipevault")

_LONGEST_OPTION = 32  # characters of a text that chooses something, and is none that is drawn
_MAX_KINDS = 4096


@dataclass(frozen=True)
class _Call:
    """One call: its arguments, what they look like in a record, and where its noise comes from."""

    method: Callable[..., Any]
    arguments: Mapping[str, Any]
    described: Mapping[str, Any]
    sources: Sources
    samples: Samples
    kind: Hashable
    """Equal for calls that draw from the same streams, as far as can be told before they are made."""


def generate(
    pipe: Pipeline,
    method: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    find: Callable[[], LoadedState | None],
) -> Any:
    """Return ``method(pipe, *args, **kwargs)`` with a run record attached to it. ``seed=`` is taken next to the
    method's own arguments unless it has one of that name.

    ``find`` gives what is loaded for the pipeline, which may be another thing after a wait; the call runs plainly where
    nothing is. Raises what the method raises, :class:`BadCallError` for both ``seed=`` and ``generator=``, and
    :class:`~pipevault.errors.TurnTimeoutError`.
    """
    waited_s, first = 0.0, None
    while (state := find()) is not None:
        call = _read_call(pipe, method, args, kwargs, state.default_size)
        asked = parse_level(state.level)
        # A call draws from the program's own streams, or may, for all that is known of such calls.
        draws = call.sources.source == "global" or not call.sources.takes_generator
        is_alone = draws or state.draws.get(call.kind, True)
        wanted = _wanted(pipe, asked, is_alone=is_alone)
        what = f"{type(pipe).__name__} at level {asked}"
        with ExitStack() as stack:
            waited_s += stack.enter_context(TURNS.take(wanted, what=what, timeout_s=state.turn_timeout_s))
            if find() is not state:  # loaded again or unloaded while this thread waited
                continue
            stack.enter_context(running(pipe))
            state.check(pipe)
            stack.enter_context(generating(state.states(pipe)))
            started_s = time.perf_counter()
            modules = graph_parts.find_parts(pipe)
            weights_of(state, pipe).begin(modules)
            with level(asked) as achieved, observed(pipe, state, audit=asked.audit) as seen:
                drawn = _draw(pipe, call, modules, is_alone=is_alone, per_sample=achieved.per_sample)
                achieved = achieved.check_again()
            if len(state.draws) >= _MAX_KINDS:
                state.draws.clear()
            state.draws[call.kind] = bool(drawn.layers)
            if drawn.layers and not is_alone and call.sources.seed is not None:
                logger.warning(
                    "%s may have drawn from the program's own random stream (%s) while other threads could, which no "
                    "such call did before: it is drawn again alone",
                    type(pipe).__name__,
                    ", ".join(drawn.layers),
                )
                first = drawn
                continue
            if first is not None and drawn.layers:  # so it was this call, and not the program, that moved them
                put({name: first.before[name] for name in first.layers})
            called = {"method": method.__name__, "arguments": call.described}
            seconds = {"waiting": waited_s, "drawing": time.perf_counter() - started_s}
            record = make_record(pipe, state, modules, called, drawn, achieved, seen, seconds)
            return attach_record(drawn.output, record, call.arguments)
    return method(pipe, *args, **kwargs)


def _read_call(
    pipe: Pipeline,
    method: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    default_size: Mapping[str, int],
) -> _Call:
    accepted = inspect.signature(method).parameters
    is_seeded = "seed" in kwargs and "seed" not in accepted
    for name in {"level", "determinism"} & kwargs.keys() - accepted.keys():
        raise BadCallError(
            f"A call takes no {name}=, for a level may have graphs of its own. Give it where the pipeline is loaded: "
            f"PipelineCache({name}=...) or from_pretrained({name}=...)."
        )
    own = {name: value for name, value in kwargs.items() if not (is_seeded and name == "seed")}
    arguments = _named(method, pipe, args, own)
    if default_size and all(arguments.get(name) is None for name in ("height", "width", "num_frames")):
        arguments |= {name: size for name, size in default_size.items() if name in accepted}
    samples = samples_of(arguments, accepted, pipeline=type(pipe))
    count = samples.count
    seed = kwargs["seed"] if is_seeded else None
    sources = Sources.of_call(arguments, seed=seed, is_seeded=is_seeded, count=count, accepted=accepted)
    if any(generator.device.type != "cpu" for generator in sources.generators):
        device = execution_device(pipe, graph_parts.pipeline_modules(pipe))
        for generator in sources.generators:
            check_device(generator, device)
    described = {name: describe(value) for name, value in arguments.items()}
    scheduler = getattr(pipe, "scheduler", None)
    given = tuple((name, _kind(name, value)) for name, value in sorted(arguments.items()) if value is not None)
    settings = str(dict(getattr(scheduler, "config", {})))
    kind = (method.__name__, sources.source, type(scheduler).__qualname__, settings, given)
    return _Call(method, arguments, described, sources, samples, kind)


def _wanted(pipe: Pipeline, asked: Level, *, is_alone: bool) -> dict[Hashable, Hashable]:
    """Return what a generation holds. One inside another one is part of it as to the program's streams."""
    wanted = {**resources(pipe), SWITCHES: needs(asked)}
    if TURNS.holds(STREAMS):
        return {**wanted, f"nested {STREAMS}": ALONE} if is_alone else wanted
    return {**wanted, STREAMS: ALONE if is_alone else WITH_OTHERS}


def _draw(
    pipe: Pipeline, call: _Call, modules: Mapping[str, nn.Module], *, is_alone: bool, per_sample: bool
) -> DrawnOutput:
    def run(arguments: Mapping[str, Any]) -> Any:
        if per_sample and call.samples.count > 1:
            calls = split(arguments, call.samples, pipeline=type(pipe), nets=count_nets(pipe))
            return join([call.method(pipe, **one) for one in calls])
        return call.method(pipe, **arguments)

    sources = call.sources.drawn_root() if per_sample else call.sources
    return draw(run, call.arguments, sources, call.samples.count, is_alone=is_alone, modules=modules.values())


def _kind(name: str, value: Any) -> Hashable:
    """Return what may decide whether a call draws: not the text of a prompt, nor how large a number is."""
    if isinstance(value, (bool, type(None))):
        return value
    if isinstance(value, (int, float)):
        return value < 0, value == 0, value == 1, value > 1
    if isinstance(value, str):
        return "" if "prompt" in name or len(value) > _LONGEST_OPTION else value
    if isinstance(value, (list, tuple)):
        return type(value).__name__, _kind(name, value[0]) if value else None
    return str(getattr(value, "__qualname__", type(value).__qualname__))


def _named(method: Callable[..., Any], pipe: Pipeline, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    signature = inspect.signature(method)
    bound = dict(signature.bind(pipe, *args, **kwargs).arguments)
    bound.pop(next(iter(signature.parameters)))
    for name, parameter in signature.parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            bound.update(bound.pop(name, {}))
        elif parameter.kind is parameter.VAR_POSITIONAL and bound.get(name):
            raise BadCallError(f"{name} cannot be recorded: pass the arguments by name.")
    return bound
