"""Freezing one call of a part: observe it, decide what its inputs are, compile it, compare it with eager code.

Nothing leaves here that was not compared with the eager part on two calls: the one that was made, and one of other
values. A call that no graph can stand in for is a :class:`CannotFreezeError` with the reason.
"""

from __future__ import annotations

import inspect
import logging
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from pipevault.digest import Digest, digest_file
from pipevault.errors import CannotFreezeError, NotFiniteError, TrainingModeError
from pipevault.files.opened import open_verified
from pipevault.graphs.check import NOT_FINITE, GraphComparison, compare_trees
from pipevault.graphs.frozen import BAKED, FrozenGraph, GraphDocument, constant_sha256
from pipevault.graphs.inductor import Build, BuildOptions, BuiltGraph, Varying, build_digest
from pipevault.graphs.library import CONSTANTS_NAME, LIBRARY_NAME, GraphFiles
from pipevault.graphs.observe import (
    Attributes,
    ObservedCall,
    PlainCall,
    UntouchableValue,
    copied,
    follow,
    held,
    named_tensors,
    observe,
    put_back_on_error,
    put_state,
    read_state,
    same_values,
)
from pipevault.graphs.program import (
    Program,
    Results,
    copied_leaves,
    free_numbers,
    is_degenerate,
    shaken_leaves,
    varied_leaves,
    with_number_tensors,
)
from pipevault.graphs.ranges import Symbol
from pipevault.graphs.signature import UNREAD, CallSignature, DescribedCall, describe_call, is_number, rebuild
from pipevault.graphs.views import tracing_view

logger = logging.getLogger("pipevault")

CANDIDATE_RUNS = 3
_SENSITIVITIES = 4.0
_LARGEST_EXCESS = 20.0
"""By how much a distance may be over its tolerance at the most, however sensitive eager code is."""

RunGraph = Callable[[Sequence[Any]], Mapping[str, Any]]


@dataclass(frozen=True)
class Subject:
    """The part whose call is frozen. ``eager`` runs its own forward, without the hooks around it."""

    name: str
    identity: str
    module: nn.Module
    eager: Callable[..., Any]
    device: torch.device
    known_state: tuple[str, ...] = ()


@dataclass(frozen=True)
class Observation:
    """All that decides the address of a graph. ``caches`` are attributes that the part fills whatever it is given."""

    call: DescribedCall
    program: Program
    caches: frozenset[str] = frozenset()
    seen: PlainCall | None = None
    """The call itself, where it did nothing but return values."""

    @property
    def signature(self) -> CallSignature:
        return self.program.signature

    @property
    def free(self) -> tuple[int, ...]:
        """The indices of the numbers that the graph takes as inputs."""
        fixed = {index for index, _ in self.signature.fixed}
        return tuple(index for index in self.call.numbers if index not in fixed)


@dataclass(frozen=True)
class CallTimes:
    """Seconds of one call, eager and frozen, as they were seen when the two were compared."""

    eager_s: float
    frozen_s: float


@dataclass(frozen=True)
class FrozenCall:
    """A graph that was compiled; its files lie where it was built."""

    document: GraphDocument
    paths: Mapping[str, Path]
    """By digest."""
    times: CallTimes | None = None

    def open(self) -> GraphFiles:
        """Open the files, if they are still what was built."""
        return self.document.open_files(
            lambda name, digest: open_verified(self.paths[digest], Digest(digest), what=f"The file {name}")
        )


def observe_call(
    subject: Subject, args: Sequence[Any], kwargs: Mapping[str, Any], seen: PlainCall | None = None
) -> Observation:
    """Run the part eagerly on copies and tell what a graph must take and return. State is put back, caches stay.

    ``seen`` shows that the call does nothing but return values, so that it is not made again.
    """
    call = describe_call(args, kwargs)
    if call.opaque:
        raise CannotFreezeError(call.opaque, subject.name)
    with put_back_on_error(subject.module) as (before, _):
        if seen is not None and not subject.known_state:
            return replace(_observation(subject, call, Program(call.signature)), seen=seen)
        return _ObservedPart(subject, args, kwargs, before).observation()


def _observation(subject: Subject, call: DescribedCall, program: Program) -> Observation:
    free = free_numbers(program, subject.module, subject.eager, call, subject.device)
    fixed = [index for index in call.numbers if index not in free]
    return Observation(call, replace(program, signature=call.signature.fix(fixed, call.leaves)))


class _ObservedPart:
    """A part and a call that it is given again and again: ``seen`` at first, when the modules held ``before``."""

    def __init__(self, subject: Subject, args: Sequence[Any], kwargs: Mapping[str, Any], before: Attributes) -> None:
        self.subject, self.args, self.kwargs, self.before = subject, args, kwargs, before
        self.overrides: dict[str, Any] = {}
        self.seen = self.call(args, kwargs)
        if _returns_cache(self.seen.output) and _accepts(subject.module, "use_cache"):
            # A language model as text encoder returns a cache, which no graph can return and no pipeline reads.
            self.overrides = {"use_cache": False}
            before.restore(tuple(self.seen.state))
            self.seen = self.call(args, kwargs)

    def call(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> ObservedCall:
        return observe(self.subject.module, self.subject.eager, args, {**kwargs, **self.overrides})

    def observation(self) -> Observation:
        subject, seen = self.subject, self.seen
        paths, written = set(subject.known_state), set(seen.state)
        if written:
            paths |= self._state()
            _refuse_counters(subject, {path: seen.state[path] for path in paths & written})
        state: dict[str, Any] = read_state(subject.module, sorted(paths))
        if paths and self._is_unread(paths):
            state = {path: UNREAD for path in sorted(paths & written)}
        call = describe_call(self.args, self.kwargs, state)
        if call.opaque:
            raise CannotFreezeError(f"it keeps state that no graph can take: {call.opaque}", subject.name)
        program = Program(call.signature, tuple(seen.after), self.overrides or None)
        return replace(_observation(subject, call, program), caches=frozenset(written - paths))

    def _state(self) -> set[str]:
        """The written attributes whose value depends on what the part was given, or on how often it was called; they
        are restored.

        The others are caches: equal after other inputs and after one more call, and filled, they change no output.
        """
        first, paths = self.seen.state, tuple(self.seen.state)
        described = describe_call(self.args, self.kwargs)
        # Numbers stay: an eager part may be given no other ones.
        varied_args, varied_kwargs = rebuild(described.signature.arguments, iter(varied_leaves(described.leaves, ())))
        self.before.restore(paths)
        try:
            self.call(varied_args, varied_kwargs)
            second = self._left(paths)
            self.call(self.args, self.kwargs)
            third = self._left(paths)
            state = {p for p in paths if not (same_values(first[p], second[p]) and same_values(first[p], third[p]))}
            if len(state) < len(paths):
                self.before.restore(tuple(state))
                if not self._does_again({path: first[path] for path in state}):
                    # A flag that the first call flips is not a cache, though it has one value ever after.
                    state = set(paths)
        except CannotFreezeError:
            raise
        except Exception:  # the part refuses the other values: nothing shows that what it wrote is a mere cache
            state = set(paths)
        self.before.restore(tuple(state))
        return state

    def _left(self, paths: Iterable[str]) -> dict[str, Any]:
        return {path: held(value) for path, value in read_state(self.subject.module, paths).items()}

    def _is_unread(self, paths: set[str]) -> bool:
        """Return True if the call sets each attribute at ``paths``, or leaves it, without a look at what it was.

        It is made again with ``None`` in their places, and with what raises if it is touched: a chunk of a video that
        begins it fills the caches again, whatever the video before has left there.
        """
        for other in (None, UntouchableValue()):
            try:
                for path in paths:
                    put_state(self.subject.module, path, other)
                if not self._does_again({path: self.seen.state.get(path, other) for path in paths}):
                    return False
            except Exception:  # whatever a part raises where it finds nothing
                return False
            finally:
                self.before.restore(tuple(paths))
        return True

    def _does_again(self, expected: Mapping[str, Any]) -> bool:
        again = self.call(self.args, self.kwargs)
        now = read_state(self.subject.module, expected)
        same = compare_trees(self.seen.output, again.output, tolerance=1e-4, same_non_finite=True).passed
        return same and all(same_values(value, now[path]) for path, value in expected.items())


def _refuse_counters(subject: Subject, final: Mapping[str, Any]) -> None:
    """Refuse a number that changes with each call: the next one would ask for another graph."""
    before = read_state(subject.module, final)
    for path, value in final.items():
        if is_number(value) and before[path] != value:
            raise CannotFreezeError(
                f"it keeps a number that changes with each call ({path.lstrip(':')}: {before[path]} became {value})",
                subject.name,
            )


class EagerRun:
    """A run of eager code on ``leaves``, which a graph is compared with; it waits until its result is asked for.

    ``seen``: the same call as it was made before. It was not timed: a first call prepares what later ones find.
    """

    def __init__(
        self,
        subject: Subject,
        program: Program,
        leaves: Sequence[Any],
        *,
        seen: PlainCall | None = None,
        may_refuse: bool = False,
    ) -> None:
        self._subject, self._program, self._may_refuse = subject, program, may_refuse
        self.leaves = leaves
        self._was_seen = seen is not None
        if seen is not None:
            self.result = program.result(seen.output), math.inf

    @cached_property
    def result(self) -> tuple[Any, float] | None:
        """A copy of the result tree, and the seconds that it took; ``None`` where the part refused strange values."""
        try:
            tree, eager_s = self._run(copied_leaves(self.leaves))
        except Exception:  # whatever a part raises for such values
            if self._may_refuse:
                return None
            raise
        return copied(tree), eager_s

    def afresh(self) -> bool:
        """Have the next look at the result run the code, if it was seen before; ``False`` if that was done."""
        was_seen, self._was_seen = self._was_seen, False
        if was_seen:
            del self.result
        return was_seen

    @property
    def is_done(self) -> bool:
        return "result" in vars(self)

    def timed_s(self) -> float:
        """Return the seconds that one more run takes."""
        return self._run(copied_leaves(self.leaves))[1]

    def shaken(self) -> Any:
        """Return the result tree for inputs that differ in their last bits."""
        return self._run(shaken_leaves(self.leaves))[0]

    def _run(self, leaves: Sequence[Any]) -> tuple[Any, float]:
        run = partial(self._program.run, self._subject.module, self._subject.eager)
        return _timed(self._subject.device, run, leaves)


@dataclass(frozen=True)
class PreparedCall:
    """A call that is ready to be compiled, by this process or by another one, and then to be checked."""

    subject: Subject
    observation: Observation
    others: tuple[SizedCall, ...]
    leaves: Sequence[Any]
    build: Build

    @cached_property
    def references(self) -> list[EagerRun]:
        """The runs that the graph is compared with: the call itself, other values, and other sizes."""
        run = partial(EagerRun, self.subject, self.observation.program)
        given = self.observation.call.leaves
        varied = run(varied_leaves(given, self.observation.free), may_refuse=True)
        own = run(given, seen=self.observation.seen)
        return [own, varied, *(run(other.call.leaves, seen=other.seen) for other in self.others)]


def prepare_call(
    subject: Subject, observation: Observation, *, options: BuildOptions, others: Sequence[SizedCall] = ()
) -> PreparedCall:
    """Return what compiling the observed call takes; with ``others``, for all sizes from smallest to largest."""
    refuse_training(subject.name, subject.module)
    call, program, seen = observation.call, observation.program, observation.seen
    if others and program.signature.state:
        raise CannotFreezeError("it keeps state between its calls", subject.name)
    if others and observation.caches:
        names = ", ".join(sorted(path.lstrip(":") for path in observation.caches))
        raise CannotFreezeError(f"it fills caches, which may depend on the size ({names})", subject.name)
    leaves = with_number_tensors(copied_leaves(call.leaves), observation.free, subject.device)
    if seen is not None and not observation.free:
        expected = program.result(seen.output)
    else:
        with torch.no_grad():
            expected = program.run(subject.module, subject.eager, leaves)
    results = Results.of(expected, leaves)
    varying = varying_sizes(program.signature, others)
    signature = range_signature(program.signature, call.leaves, others)
    inputs: list[Any] = with_number_tensors(copied_leaves(call.leaves), observation.free, subject.device)
    if varying:
        inputs = [leaf.contiguous() if isinstance(leaf, torch.Tensor) else leaf for leaf in inputs]
    places = [index for index, leaf in enumerate(inputs) if isinstance(leaf, torch.Tensor)]
    build = Build(
        module=tracing_view(subject.module, subject.device),
        program=program,
        leaves=inputs,
        results=results,
        digest=build_digest(subject.identity, signature, options),
        options=options,
        varying={(places.index(leaf), dim): symbol for (leaf, dim), symbol in varying.items()},
        counted=signature.counted,
    )
    return PreparedCall(subject, observation, tuple(others), leaves, build)


def finish_call(prepared: PreparedCall, built: BuiltGraph, *, verify: Callable[[nn.Module], str]) -> FrozenCall:
    """Check the compiled graph and its candidates, and return the fastest of those that pass."""
    candidates, finished = (built, *built.candidates), []
    for number, candidate in enumerate(candidates, start=1):
        try:
            finished.append(_finish(prepared, candidate, verify=verify))
        except Exception as error:  # whatever it is that this one cannot do, another may
            if not finished and number == len(candidates):
                raise  # kept in no list: an error holds its frames, and they would hold the list
            logger.info("a candidate for a graph of %s is left out: %s", prepared.subject.name, error)
    return min(finished, key=lambda one: one.times.frozen_s if one.times is not None else math.inf)


def _finish(prepared: PreparedCall, built: BuiltGraph, *, verify: Callable[[nn.Module], str]) -> FrozenCall:
    subject, observation = prepared.subject, prepared.observation
    frozen = _described(prepared, built)
    document = frozen.document
    with frozen.open() as files:
        graph = FrozenGraph(document, files, device=subject.device, part=subject.name)
    if prepared.build.options.weights == "bound":
        document = graph.document = replace(document, layout=graph.layout_digest(prepared.build.module))
    graph.bind(subject.module)
    run = partial(graph, subject.module, verify=verify)
    own, varied, *others = prepared.references
    compared = _check(subject, run, own, varied)
    eager_s = min(one.eager_s for one in compared)
    times = CallTimes(eager_s if eager_s < math.inf else own.timed_s(), min(one.frozen_s for one in compared))
    if prepared.build.options.candidates:
        given = observation.call.leaves
        frozen_s = min(_timed(subject.device, run, copied_leaves(given))[1] for _ in range(CANDIDATE_RUNS))
        times = replace(times, frozen_s=min(times.frozen_s, frozen_s))
    for other, reference in zip(prepared.others, others, strict=True):
        compared.append(_check_size(subject, run, reference, other.call, document.signature))
    worst = max(compared, key=lambda one: one.distance)
    checks = {"calls": len(compared), "distance": worst.distance, "tolerance": worst.tolerance}
    return FrozenCall(replace(document, checks=checks), frozen.paths, times)


def _described(prepared: PreparedCall, built: BuiltGraph) -> FrozenCall:
    """The fresh graph, whose layout is not known before it is mapped."""
    build = prepared.build
    signature = build.program.signature
    if (derived := built.sizes) is not None:
        sizes = [size for _, size in zip(signature.places, derived.sizes, strict=True)]
        counted = {index: (leaf, dim) for index, leaf, dim in build.counted}
        signature = signature.count(counted).with_sizes(sizes, derived.symbols, derived.conditions)
    files = {LIBRARY_NAME: built.library, **built.beside}
    if built.constants is not None:
        files[CONSTANTS_NAME] = built.constants
    digests = {name: digest_file(path).hex for name, path in files.items()}
    tensors = ((i, leaf) for i, leaf in enumerate(prepared.leaves) if isinstance(leaf, torch.Tensor))
    document = GraphDocument(
        signature=signature,
        build=build.digest.hex,
        library=digests[LIBRARY_NAME],
        constants=digests.get(CONSTANTS_NAME),
        beside={name: digests[name] for name in built.beside},
        inputs=tuple((i, tuple(tensor.stride())) for i, tensor in tensors),
        results=build.results,
        ties=built.ties,
        layout=BAKED,
        origins=_origin_digests(prepared.subject.module, built.origins, prepared.observation.caches),
        machine=built.machine,
        checks={},
    )
    return FrozenCall(document, {digests[name]: path for name, path in files.items()})


@dataclass(frozen=True)
class SizedCall:
    """A call of another size, and the arguments of the pipeline that made it so, such as ``height``, if any."""

    call: DescribedCall
    causes: frozenset[str] = frozenset()
    seen: PlainCall | None = None


_SIZE_NAMES: Mapping[frozenset[str], str] = {
    frozenset(): "length",
    frozenset({"height"}): "height",
    frozenset({"width"}): "width",
    frozenset({"batch_size"}): "batch",
    frozenset({"num_frames"}): "frames",
}
"""What a size is called that varies with these arguments of the pipeline; one of several counts tokens."""


def varying_sizes(base: CallSignature, others: Sequence[SizedCall]) -> Varying:
    """Return the sizes that differ between calls which differ in nothing else, by index of leaf and dimension."""
    for other in others:
        if other.call.signature.sizeless != base.sizeless:
            raise CannotFreezeError("its calls differ in more than sizes")
    seen: dict[tuple[int, ...], Symbol] = {}
    varying: dict[tuple[int, int], Symbol] = {}
    columns = zip(base.sizes, *(other.call.signature.sizes for other in others), strict=True)
    for place, values in zip(base.places, columns, strict=True):
        numbers = tuple(int(value) for value in values)
        if len(set(numbers)) == 1:
            continue
        usual = {numbers[0], *(n for n, other in zip(numbers[1:], others, strict=True) if not other.causes)}
        moved = {other.causes for n, other in zip(numbers[1:], others, strict=True) if n not in usual}
        single = {causes for causes in moved if len(causes) == 1}
        name = _SIZE_NAMES.get(frozenset().union(*(single or moved)), "tokens")
        varying[place] = seen.setdefault(numbers, Symbol(name, min(numbers), max(numbers)))
    return varying


def counted_numbers(
    base: CallSignature, leaves: Sequence[Any], others: Sequence[SizedCall]
) -> dict[int, tuple[int, int]]:
    """Return the numbers that steer the code and differ between the calls, with the place of the size that each is."""
    calls = [leaves, *(other.call.leaves for other in others)]
    counted = {}
    for index, _ in base.fixed:
        values = [call[index] for call in calls]
        if len(set(map(repr, values))) == 1:
            continue
        places = [
            (leaf, dim)
            for leaf, dim in base.places
            if all(call[leaf].shape[dim] == value for call, value in zip(calls, values, strict=True))
        ]
        if not places:
            raise CannotFreezeError(
                f"it takes a number that steers its code and is not a size ({values[0]}, {values[1]})"
            )
        counted[index] = places[0]
    return counted


def range_signature(base: CallSignature, leaves: Sequence[Any], others: Sequence[SizedCall]) -> CallSignature:
    """Return ``base``, of a call with ``leaves``, with the sizes in which ``others`` differ from it as symbols."""
    varying = varying_sizes(base, others)
    if not varying:
        return base
    sizes = [
        varying[place].name if place in varying else size for place, size in zip(base.places, base.sizes, strict=True)
    ]
    counted = counted_numbers(base, leaves, others)
    return base.count(counted).with_sizes(sizes, tuple(dict.fromkeys(varying.values())), ())


def refuse_training(name: str, module: nn.Module) -> None:
    """Raise :class:`TrainingModeError` for a part whose training mode would be frozen into its graphs."""
    if training := [path or type(child).__name__ for path, child in module.named_modules() if _trains(child)]:
        raise TrainingModeError(
            f"{name} is in training mode ({training[0]}), which would freeze its dropout. "
            f"Call pipe.{name}.eval() on it first.",
            name,
        )


def part_device(module: nn.Module) -> torch.device:
    """Return the device of the first weight that is not on the meta device; the CPU if there is none."""
    devices = (tensor.device for _, tensor in named_tensors(module))
    return next((device for device in devices if device.type != "meta"), torch.device("cpu"))


def _check(subject: Subject, graph: RunGraph, call: EagerRun, varied: EagerRun) -> list[GraphComparison]:
    """Return the comparisons on the call itself and on other values that count: one of them, or both."""
    own, other = _compare(subject, graph, call), _compare(subject, graph, varied)
    assert own is not None
    if own.failure == NOT_FINITE:
        raise NotFiniteError(
            f"{subject.name}: {NOT_FINITE}, so that nothing tells whether a graph is right", subject.name
        )
    if not own.passed and not (is_degenerate(call.leaves) and other is not None and other.passed):
        raise CannotFreezeError(f"the graph differs from eager code: {own.failure}", subject.name)
    if other is not None and not other.passed and other.failure != NOT_FINITE:
        raise CannotFreezeError(f"the graph differs from eager code on other values: {other.failure}", subject.name)
    return [one for one in (own, other) if one is not None and one.passed]


def _check_size(
    subject: Subject, graph: RunGraph, reference: EagerRun, call: DescribedCall, signature: CallSignature
) -> GraphComparison:
    sizes = ", ".join("x".join(map(str, tensor.shape)) for tensor in call.tensors if tensor.dim())
    if not signature.covers(call.signature):
        asked = "; ".join(signature.conditions)
        raise CannotFreezeError(f"a graph for {signature} ({asked or 'no more'}) does not take {sizes}", subject.name)
    comparison = _compare(subject, graph, reference)
    assert comparison is not None
    if not comparison.passed and not is_degenerate(call.leaves):
        raise CannotFreezeError(f"the graph differs from eager code at {sizes}: {comparison.failure}", subject.name)
    return comparison


def _compare(subject: Subject, graph: RunGraph, reference: EagerRun) -> GraphComparison | None:
    """The distance of the graph from eager code; ``None`` if eager code refuses the values."""
    if reference.result is None:
        return None
    expected, eager_s = reference.result
    actual, frozen_s = _timed(subject.device, graph, copied_leaves(reference.leaves))
    comparison = replace(compare_trees(expected, actual), eager_s=eager_s, frozen_s=frozen_s)
    if not comparison.passed and reference.afresh():  # weights that were swapped since show in no attribute
        return _compare(subject, graph, reference)
    if comparison.passed or not 0.0 < comparison.distance <= _LARGEST_EXCESS * comparison.tolerance:
        return comparison
    # A part that blows up rounding cannot measure its graph: the last bits of its inputs move it as far.
    allowed = _SENSITIVITIES * compare_trees(expected, reference.shaken(), tolerance=float("inf")).distance
    return replace(comparison, failure="", tolerance=allowed) if comparison.distance <= allowed else comparison


def _timed(device: torch.device, run: Callable[[Sequence[Any]], Any], leaves: Sequence[Any]) -> tuple[Any, float]:
    with torch.no_grad():
        started_s = _now_s(device)
        result = run(leaves)
        return result, _now_s(device) - started_s


def _now_s(device: torch.device) -> float:
    """The time when all that was asked of ``device`` is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _origin_digests(
    module: nn.Module, origins: Mapping[str, tuple[str | int, ...]], caches: frozenset[str]
) -> tuple[tuple[str, tuple[str | int, ...], str], ...]:
    """The constants that are attributes, but for caches: the eager part would replace these by what the graph has."""
    found = []
    for name, steps in origins.items():
        tensor = follow(module, steps)
        if tensor is not None and f"{steps[0]}:{steps[1]}" not in caches:
            found.append((name, steps, constant_sha256(tensor)))
    return tuple(found)


def _returns_cache(output: Any) -> bool:
    return any(
        type(leaf).__module__.startswith("transformers.") and type(leaf).__name__.endswith("Cache")
        for leaf in pytree.tree_leaves(output)
    )


def _accepts(module: nn.Module, name: str) -> bool:
    parameters = inspect.signature(type(module).forward).parameters
    return name in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def _trains(module: nn.Module) -> bool:
    """Return True if training mode changes what the module computes. peft leaves its layers in training mode, which is
    harmless unless one of them is a dropout.
    """
    if not module.training or type(module).__module__.startswith("peft."):
        return False
    if type(module).__module__.startswith("torch.nn."):
        return getattr(module, "p", 0) > 0 or isinstance(module, (nn.modules.batchnorm._NormBase, nn.RReLU))
    return True
