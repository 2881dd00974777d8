"""The sources of a generation's noise, and how they are known without a look at each call of torch.

With ``seed=`` (source ``argument``, or ``random`` for a fresh one) each sample has a generator from the root seed, and
the program's own streams, where the pipeline draws from them too, are seeded with the root and put back. With
``generator=`` (``generator``), or neither (``global``), a call draws from those and the program's streams, as in plain
diffusers. At level ``invariant`` each sample has a stream of its own whatever the call was given: the root seed is then
drawn from the generator or from torch's own stream.

Where nothing is known of such a call yet, it runs while no other generation does, and the states of all streams are
compared before and after. A call that was seen to draw from its generators alone touches no stream of the program, and
generations of other pipelines run next to it. Should one draw all the same, it is drawn again under the lock.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from pipevault.determinism.layers import capture, capture_torch, describe_state, fresh_seed, moved, set_aside
from pipevault.determinism.noise import host_noise
from pipevault.determinism.seeds import effective_seed, seed_layers
from pipevault.determinism.streams import check_generators, generators, sample_seed
from pipevault.digest import canonical_json
from pipevault.errors import BadCallError


@dataclass(frozen=True)
class DrawnOutput:
    """The result of :func:`draw`. ``seeds`` are those of the record: ``samples`` has one for each sample, or one from
    which all were drawn; ``streams`` are the states from which the program's own streams were drawn from. ``noise`` is
    a SHA-256 over the states in which the streams were left; ``None`` if nothing was drawn. ``layers`` are the
    program's own streams that were drawn from, ``before`` their states then.
    """

    output: Any
    seeds: Mapping[str, Any]
    noise: str | None
    layers: tuple[str, ...]
    before: Mapping[str, Any] = field(repr=False)


@dataclass(frozen=True)
class Sources:
    """The sources that a call was given to draw from."""

    source: str
    seed: int | None = None
    generators: tuple[torch.Generator, ...] = ()
    takes_generator: bool = True

    @classmethod
    def of_call(cls, arguments: Mapping[str, Any], *, seed: Any, is_seeded: bool, count: int, accepted: Any) -> Sources:
        """Return the sources of a call. Raises :class:`BadCallError` for a seed and a generator,
        :class:`GeneratorCountError`, :class:`BadSeedError`.
        """
        given = arguments.get("generator")
        if is_seeded and given is not None:
            raise BadCallError("A call takes seed= or generator=, not both.")
        takes_generator = "generator" in accepted
        if is_seeded:
            root = effective_seed(seed)
            return cls("argument" if seed == root else "random", root, takes_generator=takes_generator)
        if given is None:
            return cls("global", takes_generator=takes_generator)
        if not isinstance(given, (list, tuple)):
            return cls("generator", generators=(given,))
        check_generators(given, count)
        return cls("generator", generators=tuple(given))

    def seeds(self, count: int) -> dict[str, Any]:
        """The seeds as far as they are known before anything is drawn."""
        if self.seed is not None:
            samples = [sample_seed(self.seed, index) for index in range(count)]
        else:
            samples = [int(one.initial_seed()) for one in self.generators]
        root = self.seed if self.seed is not None or not samples else samples[0]
        return {"root": root, "samples": samples, "source": self.source, "streams": {}}

    def drawn_root(self) -> Sources:
        """Return these with a root seed, drawn from the one generator or from torch's own stream; for ``invariant``."""
        if self.seed is not None or len(self.generators) > 1:
            return self
        generator = self.generators[0] if self.generators else None
        root = int(torch.randint(2**63 - 1, (), generator=generator, device=generator.device if generator else "cpu"))
        return replace(self, seed=root)


def _needs_host_noise(modules: Iterable[nn.Module]) -> bool:
    """Return whether torch's numbers for the seeds of samples depend on where and in which dtype they are drawn."""
    if torch.get_default_dtype() not in (torch.float32, torch.float64):
        return True
    for module in modules:
        weight = next((tensor for tensor in module.parameters() if tensor.is_floating_point()), None)
        if weight is not None and (weight.device.type != "cpu" or weight.dtype not in (torch.float32, torch.float64)):
            return True
    return False


def draw(
    run: Callable[[Mapping[str, Any]], Any],
    arguments: Mapping[str, Any],
    sources: Sources,
    count: int,
    *,
    is_alone: bool,
    modules: Iterable[nn.Module],
) -> DrawnOutput:
    """Run ``run(arguments)`` with generators and streams as ``sources`` tells.

    ``is_alone``: the thread holds the program's streams, so that they may be seeded and what they lose is known.
    ``modules`` are those that the noise is for: where it need be, float32 noise is drawn on the host and cast.
    """
    given = list(sources.generators)
    with ExitStack() as stack:
        if sources.seed is not None:
            if sources.takes_generator:
                given = generators(sources.seed, count)
                arguments = {**arguments, "generator": given if count > 1 else given[0]}
            if is_alone:
                stack.enter_context(set_aside())
                seed_layers(sources.seed)
            if _needs_host_noise(modules):
                stack.enter_context(host_noise(global_draws=is_alone))
        states = [generator.get_state() for generator in given]
        before = capture() if is_alone else capture_torch()
        output = run(arguments)
        after = capture() if is_alone else capture_torch()
    layers = moved(before, after)
    seeds = sources.seeds(count)
    if sources.seed is None:
        seeds["streams"] = {name: describe_state(name, before[name]) for name in layers}
        if seeds["root"] is None and set(layers) == {"torch"} and (seed := fresh_seed(before["torch"])) is not None:
            seeds |= {"root": seed, "samples": [seed]}
    noise = _digest(given, states, {name: after[name] for name in layers})
    return DrawnOutput(output, seeds, noise, layers, before)


def _digest(given: Sequence[torch.Generator], before: Sequence[torch.Tensor], layers: Mapping[str, Any]) -> str | None:
    """Over the states of what was drawn from: the same where the same streams were left in the same places."""
    hasher = hashlib.sha256()
    has_drawn = False
    for index, (generator, state) in enumerate(zip(given, before, strict=True)):
        after = generator.get_state()
        if not torch.equal(state, after):
            has_drawn = True
            hasher.update(f"generator {index}\n".encode() + after.cpu().numpy().tobytes())
    for name, state in sorted(layers.items()):
        has_drawn = True
        hasher.update(f"{name}\n".encode() + canonical_json(describe_state(name, state)))
    return hasher.hexdigest() if has_drawn else None
