"""One generation of a loaded pipeline: seeded, at its level, isolated from the program's own randomness, recorded.

Without a generator and without ``seed=`` the root seed is drawn from torch's global generator, so that a program that
calls ``torch.manual_seed`` stays repeatable; the seed in use is in the record either way.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np
import torch

from pipevault.determinism.describe import describe
from pipevault.determinism.levels import Achieved, Level, level
from pipevault.determinism.noise import NoiseLog, host_noise
from pipevault.determinism.record import RunRecord
from pipevault.determinism.samples import Samples, count_nets, samples_of, split
from pipevault.determinism.seeds import changed_layers, effective_seed, isolated_rng, rng_digests
from pipevault.determinism.streams import check_generators, generators, sample_seed
from pipevault.errors import BadCallError, SettingsError
from pipevault.runtime.run_record import Recorder, Seeds, observed, results

RECORD_ATTRIBUTE = "_pipevault_record"


def generate(
    pipe: Any,
    method: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    asked: Level,
    recorder: Recorder,
    default_size: Mapping[str, int] | None = None,
) -> Any:
    """``method(pipe, *args, **kwargs)`` with a :class:`RunRecord` attached to its output.

    ``seed=`` is taken beside the method's own arguments unless it has one of that name. Raises what the method
    raises, and :class:`BadCallError` for ``seed=`` beside ``generator=``.
    """
    accepted = inspect.signature(method).parameters
    seed_given = "seed" in kwargs and "seed" not in accepted
    if "level" in kwargs and "level" not in accepted:
        raise BadCallError(
            "A call takes no level=, for a level may have graphs of its own. Give it where the pipeline is loaded: "
            "PipelineCache(level=...) or from_pretrained(level=...)."
        )
    seed = kwargs.pop("seed") if seed_given else None
    arguments = _named(method, pipe, args, kwargs)
    if default_size and all(arguments.get(name) is None for name in ("height", "width", "num_frames")):
        arguments |= {name: size for name, size in default_size.items() if name in accepted}
    if seed_given and arguments.get("generator") is not None:
        raise BadCallError("A call takes seed= or generator=, not both.")
    samples = samples_of(arguments, accepted, pipeline=type(pipe))
    count = samples.count
    unseeded = not asked.includes("seeded") and not seed_given
    if unseeded and arguments.get("generator") is None:
        seeds = Seeds(None, (), "global")  # nothing may be drawn: the program's own numbers must stay what they were
    else:
        seeds = _seeds(arguments.get("generator"), seed, seed_given, count)
    described = {name: describe(value) for name, value in arguments.items()}
    no_layers: tuple[str, ...] = ()
    with level(asked) as achieved, observed(pipe, audit=asked.audit) as seen:
        if unseeded:
            output, log, leaked = method(pipe, **arguments), NoiseLog(), no_layers
        else:
            if seeds.source != "generator" and "generator" in accepted:
                assert seeds.root is not None
                drawn = generators(seeds.root, count)
                arguments["generator"] = drawn if count > 1 else drawn[0]
            output, log, leaked = _run(pipe, method, arguments, seeds, samples, achieved)
    record = recorder.record(
        pipe,
        method=method.__name__,
        call=described,
        seeds=seeds,
        asked=asked,
        achieved=achieved,
        results=results(output, log, seen, asked),
        leaked=leaked,
        graphs=seen.graphs,
    )
    return _attach(output, record)


def record_of(output: Any) -> RunRecord:
    """The record of the generation that returned ``output``. :class:`SettingsError` if it has none."""
    record = getattr(output, RECORD_ATTRIBUTE, None)
    if not isinstance(record, RunRecord):
        raise SettingsError(
            f"This {type(output).__name__} has no run record: it must come from a pipeline that pipevault loaded, "
            "called with return_dict=True."
        )
    return record


def _named(method: Callable[..., Any], pipe: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    signature = inspect.signature(method)
    bound = dict(signature.bind(pipe, *args, **kwargs).arguments)
    bound.pop(next(iter(signature.parameters)))
    for name, parameter in signature.parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            bound.update(bound.pop(name, {}))
        elif parameter.kind is parameter.VAR_POSITIONAL and bound.get(name):
            raise BadCallError(f"{name} cannot be recorded: pass the arguments by name.")
    return bound


def _seeds(generator: Any, seed: Any, seed_given: bool, count: int) -> Seeds:
    if generator is not None:
        given = list(generator) if isinstance(generator, (list, tuple)) else [generator]
        if isinstance(generator, (list, tuple)):
            check_generators(given, count)
        seeds = tuple(int(one.initial_seed()) for one in given)
        return Seeds(seeds[0], seeds, "generator")
    if seed_given:
        root = effective_seed(seed)
        source = "argument" if seed == root else "random"
    else:
        root, source = int(torch.randint(2**63 - 1, ()).item()), "global"
    return Seeds(root, tuple(sample_seed(root, index) for index in range(count)), source)


def _run(
    pipe: Any, method: Callable[..., Any], arguments: dict[str, Any], seeds: Seeds, samples: Samples, achieved: Achieved
) -> tuple[Any, NoiseLog, tuple[str, ...]]:
    with isolated_rng(seeds.root), host_noise(collect=True, global_draws=True) as log:
        before = rng_digests()
        if achieved.per_sample and samples.count > 1:
            calls = split(arguments, samples, pipeline=type(pipe), nets=count_nets(pipe))
            outputs = [method(pipe, **one) for one in calls]
            output = _merged(outputs)
        else:
            output = method(pipe, **arguments)
        return output, log, changed_layers(before, rng_digests())


def _merged(outputs: list[Any]) -> Any:
    first = outputs[0]
    if is_dataclass(first):  # diffusers' outputs are mappings too, without the fields that are None
        merged = {f.name: _joined([getattr(output, f.name) for output in outputs]) for f in fields(first)}
        make: Any = type(first)
        return make(**merged)
    if isinstance(first, Mapping):
        merged = {name: _joined([output[name] for output in outputs]) for name in first}
        return type(first)(**merged)
    if isinstance(first, tuple):
        return tuple(_joined([output[i] for output in outputs]) for i in range(len(first)))
    return _joined(outputs)


def _joined(values: list[Any]) -> Any:
    first = values[0]
    if isinstance(first, torch.Tensor):
        return torch.cat(values)
    if isinstance(first, np.ndarray):
        return np.concatenate(values)
    if isinstance(first, (list, tuple)):
        return [item for value in values for item in value]
    return first


def _attach(output: Any, record: RunRecord) -> Any:
    try:
        object.__setattr__(output, RECORD_ATTRIBUTE, record)
    except AttributeError:
        return output  # a tuple or an array holds no attributes: record_of says so
    return output
