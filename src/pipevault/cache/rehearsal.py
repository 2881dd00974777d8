"""Running a pipeline once as it will be called: every call of a part that has no graph is frozen on the way.

The whole output is compared with the eager pipeline's, in addition to what each graph was compared with. The pipeline,
its schedulers and all random streams are afterwards what they were.
"""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import nn

from pipevault.cache.builders import Builders, Work
from pipevault.cache.capture import Capture, Task
from pipevault.cache.outcome import Clock, PartOutcome, Step
from pipevault.calls.call import CallShape, has_optional_images, parameters, warm_up_arguments
from pipevault.calls.call_shapes import CallRange
from pipevault.calls.describe import digest_array, has_bytes
from pipevault.calls.outputs import as_array, is_image, is_media, leaves, plain_value
from pipevault.compat.glibc import keeping_freed_memory
from pipevault.determinism.layers import STREAMS, WITH_OTHERS, capture, moved
from pipevault.determinism.seeds import isolated_rng
from pipevault.determinism.turns import TURNS
from pipevault.errors import (
    BadCallError,
    CannotFreezeError,
    CompilerMissingError,
    InterruptedBuildError,
    NothingFrozenError,
    PipevaultError,
    TrainingModeError,
)
from pipevault.graphs import parts as graph_parts
from pipevault.graphs.adapters import adapter_of
from pipevault.graphs.check import GraphComparison, compare_trees, pipeline_tolerance
from pipevault.graphs.state import GENERATING, PartState
from pipevault.pipeline import Pipeline

Run: TypeAlias = Callable[[], Any]
"""Runs a pipeline with the same randomness each time, and returns its output."""

REHEARSAL_SEED = 0
LEAST_GAIN = 0.03
"""The share of its time that a part must save to be frozen, where that is asked."""


@dataclass(frozen=True)
class Rehearsal:
    """The outcome of each part, and the keys of the graphs that it used. ``eager``: parts to be left eager, and why.
    ``check``: the whole output against eager code. ``problems``: why a part has no graph for a range of sizes.
    """

    parts: Mapping[str, PartOutcome]
    graphs: Mapping[str, tuple[str, ...]]
    eager: Mapping[str, str]
    check: GraphComparison | None
    problems: tuple[str, ...] = ()


def rehearse(
    pipe: Pipeline,
    states: Mapping[str, PartState],
    shape: CallShape | CallRange,
    *,
    clock: Clock,
    builders: Builders,
    worthwhile: bool,
) -> Rehearsal:
    """Run ``pipe`` eagerly at ``shape``, or at both ends of a range; freeze the calls that it makes; run it again, and
    compare the outputs. With ``worthwhile``, parts stay eager whose graphs gain less than :data:`LEAST_GAIN`.

    Raises :class:`BadCallError` if the pipeline refuses the call, what freezing a call raises, and
    :class:`NothingFrozenError` if no part could be frozen.
    """
    runs = [_runs(pipe, states, end) for end in _ends(shape)]
    eager: dict[str, str] = {}
    checks: list[GraphComparison] = []
    capture = Capture()
    if len(graph_parts.by_part(states)) > 1:
        builders.start_one()
    with clock.step("capture"), policies(states, "off"):
        noting = functools.partial(capture.run, states)
        drawn = [_first_accepted(runs[0], noting)]
        if isinstance(shape, CallRange):
            for causes, other in shape.between():
                _first_accepted(_runs(pipe, states, other), functools.partial(noting, causes))
            drawn.append(_first_accepted(runs[1], functools.partial(noting, shape.ranged)))
    with policies(states, "compile"):
        for state in states.values():
            state.start_listing()
        tasks = capture.tasks(ranges=isinstance(shape, CallRange))
        problems = _freeze_ahead(states, tasks, builders, clock)
        if worthwhile:
            eager |= _idle_parts(states)
        for run, eager_output in drawn:
            with _left_eager(states, eager):
                output = run()
            with clock.step("check"):
                checks.append(_checked(states, run, eager_output, output, eager))
    check = max(checks, key=lambda one: one.distance)
    rehearsal = Rehearsal(*_parts_and_graphs(states, eager), eager, check, problems)
    if not worthwhile and not any(rehearsal.graphs.values()):
        details = "; ".join(f"{name}: {part.reason}" for name, part in rehearsal.parts.items() if part.reason)
        raise NothingFrozenError(
            f"No part of {type(pipe).__name__} could be frozen ({details or 'no part was called'})."
        )
    return rehearsal


def rehearse_frozen(pipe: Pipeline, states: Mapping[str, PartState], shape: CallShape | CallRange) -> Rehearsal:
    """Run ``pipe`` at ``shape``, or at both ends of a range, with the graphs that there are. A call without one is an
    :class:`~pipevault.errors.UnfrozenCallError`.
    """
    with policies(states, "error"):
        for state in states.values():
            state.start_listing()
        for end in _ends(shape):
            _first_accepted(_runs(pipe, states, end))
    return Rehearsal(*_parts_and_graphs(states, {}), {}, None)


def _ends(shape: CallShape | CallRange) -> list[CallShape]:
    return [shape.most, shape.least] if isinstance(shape, CallRange) else [shape]


def run_whole(pipe: Pipeline, shape: CallShape) -> Any:
    """Return the output of ``pipe`` as it is at ``shape``. Raises :class:`BadCallError` if it refuses the call."""
    return _first_accepted(_runs(pipe, {}, shape))[1]


def _freeze_ahead(
    states: Mapping[str, PartState], tasks: Sequence[Task], builders: Builders, clock: Clock
) -> tuple[str, ...]:
    """Freeze captured calls, but for those that depend on what the pipeline does around them; these are frozen as it
    makes them. Return why a range has no graph. Raises what is wrong with a call after all others are frozen.
    """
    problems: list[str] = []
    failures: list[CannotFreezeError] = []

    def failed(task: Task, error: CannotFreezeError) -> None:
        if task.others and not isinstance(error, (TrainingModeError, CompilerMissingError, InterruptedBuildError)):
            problems.append(f"{task.call.state.part} has no graph for a range of sizes: {error}")
        else:
            failures.append(error)

    # In one order everywhere: processes that wait for one another's locks would wait for ever.
    left = sorted((task for task in tasks if task.is_as_then), key=lambda task: task.order)
    started = itertools.count(1)
    count = 0

    def tell(name: str, signature: str) -> None:
        clock.report(Step(name, "compile", None, signature, f"{next(started)} of {count + len(left)}"))

    with ExitStack() as stack:
        stack.enter_context(_beside_others("freezing"))
        stack.enter_context(generating(states, rehearsing=True))
        try:
            while left:
                task, state = left[0], left.pop(0).call.state
                try:
                    pending = state.begin_ahead(task.call.args, task.call.kwargs, task.sized(), task.call.still_seen)
                except CannotFreezeError as error:
                    failed(task, error)
                    pending = None
                if failures:  # known before minutes are spent on compiling
                    raise failures[0]
                if pending is None:
                    continue
                stack.push(pending.held)
                count += 1
                if count == 1:
                    stack.enter_context(clock.step("compile", detail=builders.estimate(1 + len(left))))
                begun = functools.partial(tell, state.name, str(pending.signature))
                builders.offer(Work(state, pending, begun, functools.partial(failed, task)), more=len(left))
            builders.build_all()
        except BaseException:  # whatever it was goes on; before the folders go that others compile into
            builders.abandon()
            raise
    if failures:
        raise failures[0]
    return tuple(dict.fromkeys(problems))


def _idle_parts(states: Mapping[str, PartState]) -> dict[str, str]:
    """The parts whose graphs were no faster than eager code when they were checked, with the reason to leave them."""
    found = {}
    for part, members in graph_parts.by_part(states).items():
        slots = {slot.kept.key: slot for state in members for slot in state.graphs}
        timed = [slot.kept.times for slot in slots.values() if slot.kept.times is not None]
        eager_s, frozen_s = sum(one.eager_s for one in timed), sum(one.frozen_s for one in timed)
        if timed and frozen_s > (1 - LEAST_GAIN) * eager_s:
            found[part] = f"freezing it gains {100 * (1 - frozen_s / eager_s):.0f} %"
    return found


def _parts_and_graphs(
    states: Mapping[str, PartState], eager: Mapping[str, str]
) -> tuple[dict[str, PartOutcome], dict[str, tuple[str, ...]]]:
    """The outcome of each part, or of all blocks of one, since its states began to list, and the graphs that ran."""
    parts: dict[str, PartOutcome] = {}
    graphs: dict[str, tuple[str, ...]] = {}
    for name, members in graph_parts.by_part(states).items():
        touched = {key: slot for state in members for key, slot in state.touched.items()}
        used = [key for key, slot in touched.items() if slot.kept.document is not None]
        left = [eager[name]] if name in eager else []
        reasons = "; ".join(dict.fromkeys([*left, *graph_parts.eager_reasons(members)]))
        status = "eager" if reasons else "frozen" if touched else "not called"
        count = 0 if name in eager else len(used)
        parts[name] = PartOutcome(status, reasons, count, members[0].regions)
        if name not in eager:
            graphs[name] = tuple(sorted(used))
    return parts, graphs


def _checked(
    states: Mapping[str, PartState], run: Run, eager_output: Any, output: Any, eager: dict[str, str]
) -> GraphComparison:
    """Compare the whole output. Where it differs, each part is run frozen alone, and those that fail stay eager."""
    tolerance = pipeline_tolerance(state.module for state in states.values())
    comparison = compare_outputs(eager_output, output, tolerance)
    if comparison.passed:
        return comparison
    frozen = {name for name, members in graph_parts.by_part(states).items() if any(state.touched for state in members)}
    for name in sorted(frozen):
        with _left_eager(states, frozen - {name}):
            alone = compare_outputs(eager_output, run(), tolerance)
        if not alone.passed:
            eager[name] = f"the pipeline's output changes when it is frozen: {alone.failure}"
    with _left_eager(states, eager):
        comparison = compare_outputs(eager_output, run(), tolerance)
    if not comparison.passed:
        raise NothingFrozenError(
            f"The frozen pipeline's output is not the eager one's: {comparison.failure}. Nothing was stored for the "
            "whole call; leave parts out with parts=[...] to find the cause."
        )
    return comparison


def compare_outputs(eager_output: Any, output: Any, tolerance: float) -> GraphComparison:
    """Compare the whole output of a pipeline with compiled parts with the eager one's."""
    return compare_trees(_comparable(eager_output), _comparable(output), tolerance=tolerance, same_non_finite=True)


def _comparable(output: Any) -> list[tuple[str, Any]]:
    """The parts of an output that graphs have to give again, by path, without objects that tell nothing."""
    found: list[tuple[str, Any]] = []
    for path, leaf in leaves(output):
        if not is_media(leaf):
            with suppress(TypeError):
                value = plain_value(leaf)
                found.append((path, torch.tensor(value, dtype=torch.float32) if isinstance(value, float) else value))
        elif is_image(leaf) or has_bytes(leaf):
            found.append((path, _as_tensor(leaf)))
    return found


def _as_tensor(leaf: Any) -> torch.Tensor | str:
    """Pixels and sound of 8 or 16 bits as floats, because a graph may round to a neighbour of an eager value."""
    if isinstance(leaf, torch.Tensor) and (leaf.is_floating_point() or leaf.is_complex()):
        return leaf
    array = as_array(leaf)
    if array.dtype in (np.uint8, np.uint16, np.int16):
        return torch.from_numpy(array.astype(np.float32) / np.iinfo(array.dtype).max)
    if is_image(leaf) and array.dtype == np.int32:
        return torch.from_numpy(array.astype(np.float32))
    if array.dtype.kind not in "biufc":
        return digest_array(array)
    return torch.from_numpy(array.astype(array.dtype.newbyteorder("=")))


@contextmanager
def policies(states: Mapping[str, PartState], policy: str) -> Iterator[None]:
    """Have the parts do with calls that have no graph what ``policy`` says, inside."""
    before = {name: state.options for name, state in states.items()}
    for state in states.values():
        state.options = replace(state.options, policy=policy)
    try:
        yield
    finally:
        for name, state in states.items():
            state.options = before[name]


def _left_eager(states: Mapping[str, PartState], parts: Container[str]) -> AbstractContextManager[None]:
    return policies({name: state for name, state in states.items() if state.part in parts}, "off")


@contextmanager
def generating(states: Mapping[str, PartState], *, rehearsing: bool = False) -> Iterator[None]:
    """Mark the parts of a pipeline as called by a generation whose guard has looked at them, and let it keep memory."""
    before = GENERATING.parts, GENERATING.rehearsing
    for state in states.values():
        state.note_scalars()
    GENERATING.parts = before[0] | {id(state) for state in states.values()}
    GENERATING.rehearsing = rehearsing or before[1]
    try:
        with keeping_freed_memory():
            yield
    finally:
        GENERATING.parts, GENERATING.rehearsing = before


def _first_accepted(
    runs: Sequence[Run], around: Callable[[], AbstractContextManager[None]] = nullcontext
) -> tuple[Run, Any]:
    """The run that the pipeline accepts, and its output. Each is tried inside of ``around``."""
    first, *others = runs
    try:
        with around():
            return first, first()
    except Exception as error:  # a missing image shows as anything
        if not others or (isinstance(error, PipevaultError) and not isinstance(error, BadCallError)):
            raise
        with around():
            return others[0], others[0]()


def _runs(pipe: Pipeline, states: Mapping[str, PartState], shape: CallShape) -> list[Run]:
    """A run of the pipeline at ``shape``; another one to try where the pipeline may want an image."""
    own_call = adapter_of(pipe) is None and not callable(shape.call)
    if own_call and has_optional_images(pipe, shape):
        return [_run(pipe, states, shape, images=False), _run(pipe, states, shape)]
    return [_run(pipe, states, shape)]


def _run(pipe: Any, states: Mapping[str, PartState], shape: CallShape, *, images: bool = True) -> Run:
    """The run of the pipeline at ``shape``, which leaves nothing behind."""
    adapter = adapter_of(pipe)
    given = shape.call
    draws = True
    arguments: dict[str, Any] = {}
    if adapter is not None and adapter.call is not None and not callable(given):
        asked = {n: v for n, v in shape.to_json().items() if n != "call" and v is not None}
        made_up = adapter.call(pipe, {**asked, **(given or {})})
        given = made_up if callable(made_up) else {**(made_up or {}), **(given or {})}
    is_seeded = False
    if callable(given):
        function: Callable[..., Any] = functools.partial(given, pipe) if given is shape.call else given
    elif adapter is not None and adapter.methods[0] != "__call__":
        arguments = dict(given or {})
        function = functools.partial(getattr(type(pipe), adapter.methods[0]), pipe)
    else:
        function = pipe
        arguments = warm_up_arguments(pipe, replace(shape, call=given), images=images)
        own = parameters(pipe).get("generator")
        is_seeded = own is not None and own.default is None and arguments.get("generator") is None

    @contextmanager
    def streams() -> Iterator[None]:
        """The first run has the program's own random streams alone, seeded. If nothing was drawn from them, later runs,
        which compile for minutes, let other threads generate meanwhile.
        """
        nonlocal draws
        if not draws:
            with _beside_others("a rehearsal"):
                yield
            return
        with isolated_rng(REHEARSAL_SEED):
            before = capture()
            yield
            draws = bool(moved(before, capture()))

    def run() -> Any:
        seeded = {"generator": torch.Generator().manual_seed(REHEARSAL_SEED)} if is_seeded else {}
        with ExitStack() as stack:
            stack.enter_context(generating(states, rehearsing=True))
            stack.enter_context(untouched(pipe))
            stack.enter_context(streams())
            stack.enter_context(_rewound(arguments.get("generator")))
            stack.enter_context(torch.no_grad())
            try:
                return function(**{**arguments, **seeded})
            except (ValueError, TypeError) as error:
                if isinstance(error, PipevaultError):
                    raise
                raise BadCallError(
                    f"{type(pipe).__name__} refused the call that should be frozen: {error}. Pass a size it accepts, "
                    "or call={...} with the arguments it needs."
                ) from error

    return run


def _beside_others(what: str) -> AbstractContextManager[float]:
    """Let other threads draw from the program's streams meanwhile, unless this one has them alone already."""
    return TURNS.take({} if TURNS.holds(STREAMS) else {STREAMS: WITH_OTHERS}, what=what)


@contextmanager
def untouched(pipe: Pipeline) -> Iterator[None]:
    """Put back what running does to the pipeline itself, the pipelines in it, and their schedulers. Inside, diffusers'
    step bar, which would promise the user pictures, is off.

    On an error the weights get back their dtypes too: pipelines cast a VAE for the length of a call.
    """
    owners = list(_pipelines(pipe, set()))
    attributes = [(own, dict(own)) for owner in owners if (own := getattr(owner, "__dict__", None)) is not None]
    schedulers = {
        id(value): value
        for owner in owners
        for _, value in graph_parts.members(owner)
        if hasattr(value, "set_timesteps") and not isinstance(value, nn.Module) and hasattr(value, "__dict__")
    }
    states = [(scheduler, copy.deepcopy(vars(scheduler))) for scheduler in schedulers.values()]
    modules = [module for owner in owners for module in graph_parts.pipeline_modules(owner).values()]
    weights = [(tensor, tensor.data) for module in modules for tensor in (*module.parameters(), *module.buffers())]
    try:
        for owner in owners:
            if hasattr(owner, "set_progress_bar_config"):
                owner._progress_bar_config = {**(getattr(owner, "_progress_bar_config", None) or {}), "disable": True}
        yield
    except BaseException:  # whatever it was goes on
        for tensor, data in weights:
            if tensor.dtype != data.dtype:
                tensor.data = data
        raise
    finally:
        for own, before in attributes:
            for name in own.keys() - before.keys():
                del own[name]
            own.update(before)
        for scheduler, values in states:
            vars(scheduler).clear()
            vars(scheduler).update(values)


def _pipelines(pipe: Pipeline, seen: set[int]) -> Iterator[Any]:
    if id(pipe) in seen:
        return
    seen.add(id(pipe))
    yield pipe
    for _, value in list(graph_parts.members(pipe)):
        if graph_parts.is_pipeline(value) and not isinstance(value, nn.Module):
            yield from _pipelines(value, seen)


@contextmanager
def _rewound(generator: Any) -> Iterator[None]:
    generators = generator if isinstance(generator, (list, tuple)) else [generator] if generator is not None else []
    states = [g.get_state() for g in generators]
    try:
        yield
    finally:
        for g, state in zip(generators, states, strict=True):
            g.set_state(state)
