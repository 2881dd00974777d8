"""The miss path: capture a pipeline's calls, compile them, check them against eager code, and write them down.

Nothing leaves here that was not compared with eager code, call by call and as a whole (the pipeline's output). A part
that cannot be exported, or fails a check, stays eager with the reason.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pipevault.determinism.seeds import isolated_rng
from pipevault.errors import (
    BadCallError,
    CannotFreezeError,
    CompilerMissingError,
    NothingFrozenError,
    PipevaultError,
    TrainingModeError,
)
from pipevault.fingerprint.model import architecture
from pipevault.graphs import parts as graph_parts
from pipevault.graphs.check import Comparison, compare_trees, pipeline_tolerance
from pipevault.graphs.state import PartOptions, PartState, ReusableGraph
from pipevault.manager.call import CallShape, warm_up_arguments
from pipevault.manager.outcome import Clock, PartOutcome, Step, part_outcomes

CAPTURE_SEED = 0


@dataclass(frozen=True)
class Frozen:
    """The parts of a pipeline after freezing: ``parts`` as a manifest keeps them, and the pipeline-wide check."""

    parts: Mapping[str, Mapping[str, Any]]
    check: Comparison

    def outcomes(self) -> dict[str, PartOutcome]:
        return part_outcomes(self.parts)


def freeze_pipeline(
    pipe: Any,
    names: Sequence[str],
    shape: CallShape,
    *,
    options: PartOptions,
    identities: Mapping[str, str],
    folder: Path,
    clock: Clock,
    reuse: Callable[[str], ReusableGraph | None],
) -> Frozen:
    """Freeze ``names`` and save their documents and files to ``folder``; the parts stay attached to the pipeline.

    Raises :class:`BadCallError` if the pipeline refuses the call, :class:`TrainingModeError`,
    :class:`CompilerMissingError`, and :class:`NothingFrozenError` if no part could be frozen. On any error the
    pipeline gets its eager parts back.
    """
    states = graph_parts.attach(pipe, names, options)
    try:
        for name, state in states.items():
            state.identity = identities[name]
            state.discard_graphs()
            state.set_mode("capture")
        run = _runner(pipe, shape)
        with clock.step("capture"):
            eager_output = _capture(states, run)
        reasons = _compile_all(states, folder, clock, reuse)
        check = _check_pipeline(states, reasons, run, eager_output, clock)
        frozen = [name for name, state in states.items() if state.graphs]
        if not frozen:
            details = "; ".join(f"{name}: {reason}" for name, reason in reasons.items()) or "no part was called"
            raise NothingFrozenError(f"No part of {type(pipe).__name__} could be frozen ({details}).")
        with clock.step("save"):
            graph_parts.detach(pipe, [name for name in names if name not in frozen])
            graph_parts.save(pipe, folder, frozen)
        return Frozen({name: _part_document(state, reasons.get(name)) for name, state in states.items()}, check)
    except BaseException:  # whatever it was goes on, an interrupt too; the pipeline gets its eager parts back
        graph_parts.detach(pipe, names)
        raise


def _capture(states: Mapping[str, PartState], run: Callable[[], Any]) -> Any:
    """Run the pipeline eagerly and record its calls.

    A part that changes itself by running keeps state that no graph can keep; one that fills a cache at its first call
    and stays as it is then is captured in a second run. Either way the modules are left as they were.
    """
    modules = [state.module for state in states.values()]
    before = _architectures(states)
    with _attributes_restored(modules):
        output = run()
        after = _architectures(states)
        if after != before:
            for state in states.values():
                state.recorder.calls.clear()
            run()
            for name, digest in _architectures(states).items():
                if digest != after[name]:
                    states[name].recorder.refuse("it keeps state beside its arguments: each run leaves it changed")
    return output


@contextmanager
def _attributes_restored(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Undo what running does to plain attributes, so that every run starts from the same state."""
    before = [(child.__dict__, dict(child.__dict__)) for module in modules for child in module.modules()]
    try:
        yield
    finally:
        for attributes, values in before:
            for name in attributes.keys() - values.keys():
                del attributes[name]
            attributes.update(values)


def _architectures(states: Mapping[str, PartState]) -> dict[str, str]:
    return {name: architecture(state.module)["digest"] for name, state in states.items()}


def _part_document(state: PartState, reason: str | None) -> dict[str, Any]:
    graphs = [graph.document.to_json() for graph in state.graphs.values()]
    status = "frozen" if graphs else "eager" if reason else "not called"
    return {"status": status, "reason": reason or "", "graphs": graphs}


def _compile_all(
    states: Mapping[str, PartState],
    folder: Path,
    clock: Clock,
    reuse: Callable[[str], ReusableGraph | None],
) -> dict[str, str]:
    """Compile and check every captured part; the reasons of those that stay eager, by name."""
    reasons = {}
    for name, state in states.items():

        def on_step(action: str, detail: str, name: str = name) -> None:
            clock.report(Step(name, action, None, detail))

        if state.recorder.calls:
            try:
                with clock.step("compile", name):
                    state.compile_captured(folder / "build", on_step=on_step, reuse=reuse)
            except (TrainingModeError, CompilerMissingError):
                raise
            except CannotFreezeError as error:
                state.recorder.refuse(str(error))
        if state.recorder.refusal:
            reasons[name] = state.recorder.refusal
        state.recorder.calls.clear()
        state.set_mode("eager" if not state.graphs else "frozen")
    return reasons


def _check_pipeline(
    states: Mapping[str, PartState],
    reasons: dict[str, str],
    run: Callable[[], Any],
    eager_output: Any,
    clock: Clock,
) -> Comparison:
    """Compare the frozen pipeline's output with the eager one's. State that a part keeps beside its arguments shows
    here only: then each part is run frozen alone, and those that fail stay eager.
    """
    with clock.step("check"):
        tolerance = pipeline_tolerance(state.module for state in states.values())
        comparison = _compare_run(states, run, eager_output, tolerance)
        if comparison.passed:
            return comparison
        frozen = [name for name, state in states.items() if state.graphs]
        for name in frozen:
            for other in frozen:
                states[other].set_mode("frozen" if other == name else "eager")
            alone = _compare_run(states, run, eager_output, tolerance)
            if not alone.passed:
                reasons[name] = f"the pipeline's output changes when it is frozen: {alone.failure}"
        for name in frozen:
            if name in reasons:
                states[name].discard_graphs()
            states[name].set_mode("eager" if name in reasons else "frozen")
        comparison = _compare_run(states, run, eager_output, tolerance)
        if not comparison.passed:
            raise NothingFrozenError(
                f"The frozen pipeline's output is not the eager one's: {comparison.failure}. Nothing was stored; "
                "leave parts out with parts=[...] to find the cause."
            )
        return comparison


def _compare_run(
    states: Mapping[str, PartState], run: Callable[[], Any], eager_output: Any, tolerance: float
) -> Comparison:
    try:
        with _attributes_restored(state.module for state in states.values()):
            output = run()
    except PipevaultError as error:
        return Comparison(0.0, 0.0, str(error).splitlines()[0])
    return compare_trees(eager_output, output, tolerance=tolerance)


def _runner(pipe: Any, shape: CallShape) -> Callable[[], Any]:
    """A function that runs the pipeline at ``shape``, with the same randomness each time and none left behind."""
    if callable(shape.call):
        function: Callable[[], Any] = lambda: shape.call(pipe)  # type: ignore[misc, operator]  # noqa: E731
        arguments: dict[str, Any] = {}
    else:
        arguments = warm_up_arguments(pipe, shape)
        function = lambda: pipe(**arguments)  # noqa: E731

    def run() -> Any:
        with isolated_rng(CAPTURE_SEED), _rewound(arguments.get("generator")), _quiet(pipe), torch.no_grad():
            try:
                return function()
            except (ValueError, TypeError) as error:
                if isinstance(error, PipevaultError):
                    raise
                raise BadCallError(
                    f"{type(pipe).__name__} refused the call that should be frozen: {error}. Pass a size it accepts, "
                    "or call={...} with the arguments it needs."
                ) from error

    return run


@contextmanager
def _rewound(generator: Any) -> Iterator[None]:
    generators = generator if isinstance(generator, (list, tuple)) else [generator] if generator is not None else []
    states = [g.get_state() for g in generators]
    try:
        yield
    finally:
        for g, state in zip(generators, states, strict=True):
            g.set_state(state)


@contextmanager
def _quiet(pipe: Any) -> Iterator[None]:
    """Without diffusers' step bar, which would promise the user pictures."""
    if not hasattr(pipe, "set_progress_bar_config"):
        yield
        return
    before = getattr(pipe, "_progress_bar_config", None)
    pipe.set_progress_bar_config(**{**(before or {}), "disable": True})
    try:
        yield
    finally:
        if before is None:
            del pipe._progress_bar_config
        else:
            pipe._progress_bar_config = before
