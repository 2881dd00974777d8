"""One generation of a loaded pipeline: seeded, at its level, isolated from the program's own randomness, recorded.

Without a generator and without ``seed=`` the root seed is drawn from torch's global generator, so that a program that
calls ``torch.manual_seed`` stays repeatable; the seed in use is in the record either way.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils._pytree import tree_leaves

from pipevault.determinism.describe import describe, digest_array, pixels_sha256
from pipevault.determinism.levels import Achieved, Level, level
from pipevault.determinism.noise import NoiseLog, host_noise
from pipevault.determinism.record import RunRecord
from pipevault.determinism.seeds import changed_layers, effective_seed, isolated_rng, rng_digests
from pipevault.determinism.streams import check_generators, generators, sample_seed
from pipevault.errors import BadCallError, SettingsError
from pipevault.fingerprint.machine import machine_factors
from pipevault.fingerprint.toolchain import toolchain_factors
from pipevault.graphs import parts as graph_parts
from pipevault.graphs.inductor import GRAPH_FORMAT
from pipevault.manager.keys import execution_device
from pipevault.manager.outcome import Outcome

RECORD_ATTRIBUTE = "_pipevault_record"
_REPEATS = ("num_images_per_prompt", "num_videos_per_prompt")


@dataclass(frozen=True)
class Seeds:
    """``samples`` has a seed for each sample; ``source`` is ``argument``, ``random``, ``generator`` or ``global``."""

    root: int
    samples: tuple[int, ...]
    source: str

    def to_json(self) -> dict[str, Any]:
        return {"root": self.root, "samples": list(self.samples), "source": self.source}


def generate(
    pipe: Any,
    method: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    asked: Level,
    outcome: Outcome,
) -> Any:
    """``method(pipe, *args, **kwargs)`` with a :class:`RunRecord` attached to its output.

    ``seed=`` is taken beside the method's own arguments unless it has one of that name. Raises what the method
    raises, and :class:`BadCallError` for ``seed=`` beside ``generator=``.
    """
    accepted = inspect.signature(method).parameters
    seed_given = "seed" in kwargs and "seed" not in accepted
    seed = kwargs.pop("seed") if seed_given else None
    arguments = _named(method, pipe, args, kwargs)
    if seed_given and arguments.get("generator") is not None:
        raise BadCallError("A call takes seed= or generator=, not both.")
    count = sample_count(arguments)
    seeds = _seeds(arguments.get("generator"), seed, seed_given, count)
    described = {name: describe(value) for name, value in arguments.items()}
    no_layers: tuple[str, ...] = ()
    with level(asked) as achieved, _observed(pipe, audit=asked.audit) as seen:
        if not asked.includes("seeded") and not seed_given:
            output, log, leaked = method(pipe, **arguments), NoiseLog(), no_layers
        else:
            if seeds.source != "generator" and "generator" in accepted:
                drawn = generators(seeds.root, count)
                arguments["generator"] = drawn if count > 1 else drawn[0]
            output, log, leaked = _run(pipe, method, arguments, seeds, count, achieved)
    record = _record(pipe, described, seeds, asked, achieved, outcome, _results(output, log, seen, asked), leaked)
    return _attach(output, record)


def sample_count(arguments: Mapping[str, Any]) -> int:
    """How many samples a call draws."""
    prompt, embeds = arguments.get("prompt"), arguments.get("prompt_embeds")
    repeats = next((arguments[name] for name in _REPEATS if arguments.get(name)), 1)
    if isinstance(prompt, (list, tuple)):
        return len(prompt) * repeats
    if isinstance(embeds, torch.Tensor):
        return int(embeds.shape[0]) * repeats
    return int(arguments.get("batch_size") or 1) * repeats


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
    pipe: Any, method: Callable[..., Any], arguments: dict[str, Any], seeds: Seeds, count: int, achieved: Achieved
) -> tuple[Any, NoiseLog, tuple[str, ...]]:
    with isolated_rng(seeds.root), host_noise(collect=True, global_draws=True) as log:
        before = rng_digests()
        if achieved.per_sample and count > 1:
            outputs = [method(pipe, **one) for one in _split(arguments, count)]
            output = _merged(outputs)
        else:
            output = method(pipe, **arguments)
        return output, log, changed_layers(before, rng_digests())


def _split(arguments: Mapping[str, Any], count: int) -> list[dict[str, Any]]:
    """The arguments of each sample's own call."""
    repeats = next((arguments[name] for name in _REPEATS if arguments.get(name)), 1)
    calls: list[dict[str, Any]] = []
    for index in range(count):
        call = dict(arguments)
        for name, value in arguments.items():
            if name in _REPEATS:
                call[name] = 1
            elif isinstance(value, (list, tuple)) and len(value) == count:
                call[name] = value[index] if name == "generator" else [value[index]]
            elif isinstance(value, (list, tuple)) and len(value) * repeats == count:
                call[name] = [value[index // repeats]]
            elif isinstance(value, torch.Tensor) and value.ndim and value.shape[0] == count:
                call[name] = value[index : index + 1]
            elif isinstance(value, torch.Tensor) and value.ndim and value.shape[0] * repeats == count:
                call[name] = value[index // repeats : index // repeats + 1]
        calls.append(call)
    return calls


def _merged(outputs: list[Any]) -> Any:
    first = outputs[0]
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


def _record(
    pipe: Any,
    call: Mapping[str, Any],
    seeds: Seeds,
    asked: Level,
    achieved: Achieved,
    outcome: Outcome,
    results: Mapping[str, Any],
    leaked: tuple[str, ...],
) -> RunRecord:
    model = getattr(getattr(pipe, "config", None), "_name_or_path", None)
    scheduler = getattr(pipe, "scheduler", None)
    notes = [*achieved.notes]
    if leaked:
        notes.append(
            f"The pipeline drew from a global generator ({', '.join(leaked)}); it was seeded with the root seed."
        )
    return RunRecord(
        pipeline={
            "class": type(pipe).__name__,
            "model": str(model) if model else None,
            "revision": None,
            "scheduler": type(scheduler).__name__ if scheduler is not None else None,
        },
        call=call,
        seeds=seeds.to_json(),
        level={
            "asked": str(asked),
            "achieved": achieved.level,
            "flags": dict(achieved.flags),
            "notes": notes,
        },
        results=results,
        outcome=outcome.status,
        key=outcome.key.hex if outcome.key else None,
        manifest=outcome.manifest.hex if outcome.manifest else None,
        versions=toolchain_factors(graph_format=GRAPH_FORMAT),
        machine=machine_factors(execution_device(pipe, graph_parts.find_parts(pipe))),
    )


@dataclass
class Seen:
    """What the frozen parts were given and returned: the latents that were decoded, and every output for an audit."""

    latents: str | None = None
    steps: list[dict[str, Any]] = field(default_factory=list)


@contextmanager
def _observed(pipe: Any, *, audit: bool) -> Iterator[Seen]:
    seen = Seen()
    calls: Counter[str] = Counter()

    def observe(name: str, tensors: list[torch.Tensor], output: Any) -> None:
        if name.endswith("decoder") and tensors:
            seen.latents = digest_array(tensors[0])
        if audit:
            first = next(leaf for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor))
            seen.steps.append({"step": calls[name], "part": name, "sha256": digest_array(first)})
            calls[name] += 1

    states = graph_parts.frozen_parts(pipe).values()
    for state in states:
        state.observer = observe
    try:
        yield seen
    finally:
        for state in states:
            state.observer = None


def _results(output: Any, log: NoiseLog, seen: Seen, asked: Level) -> dict[str, Any]:
    results: dict[str, Any] = {
        "noise": log.sha256 if log.draws else None,
        "latents": seen.latents,
        "pixels": _pixels(output),
    }
    if asked.audit:
        results["steps"] = seen.steps
    return results


def _pixels(output: Any) -> list[str]:
    """SHA-256 of each image or array of an output, in order."""
    values = list(output.values()) if isinstance(output, Mapping) else [output]
    digests: list[str] = []
    for value in values:
        for item in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(item, Image.Image):
                digests.append(pixels_sha256(item))
            elif isinstance(item, np.ndarray):
                digests.extend(digest_array(sample) for sample in item)
            elif isinstance(item, torch.Tensor):
                digests.extend(digest_array(sample) for sample in (item if item.ndim else item[None]))
    return digests


def _attach(output: Any, record: RunRecord) -> Any:
    try:
        object.__setattr__(output, RECORD_ATTRIBUTE, record)
    except AttributeError:
        return output  # a tuple or an array holds no attributes: record_of says so
    return output
