"""Writing down a generation: what the parts were given and returned, what came out, and the record of it all."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from pipevault.cache.keys import execution_device
from pipevault.cache.loaded import LoadedState
from pipevault.calls.describe import digest_array
from pipevault.calls.outputs import digests
from pipevault.demo import MODEL_DIR
from pipevault.determinism.levels import AchievedLevel, parse_level
from pipevault.digest import digest_bytes
from pipevault.fingerprint.machine import machine_factors
from pipevault.fingerprint.toolchain import package_version, toolchain_factors
from pipevault.graphs.inductor import GRAPH_FORMAT
from pipevault.opening import DEMO_MODEL
from pipevault.pipeline import Pipeline
from pipevault.runtime.drawing import DrawnOutput
from pipevault.runtime.record import RunRecord
from pipevault.runtime.recorded_weights import ORIGINS, RecordedWeights


@dataclass
class PartTrace:
    """The inputs and outputs of the parts: the latents that were decoded, and every output for an audit. ``graphs``
    are those that ran, by part; one that several blocks of a part ran stands with the first of them.
    """

    decoded: list[str] = field(default_factory=list)
    steps: list[dict[str, Any]] = field(default_factory=list)
    graphs: dict[str, dict[str, str]] = field(default_factory=dict)

    @property
    def latents(self) -> str | None:
        """The SHA-256 of the latents; where they were decoded in several calls, over the digests of each."""
        if len(self.decoded) > 1:
            return digest_bytes("".join(self.decoded).encode("ascii")).hex
        return self.decoded[0] if self.decoded else None


def weights_of(state: LoadedState, pipe: Pipeline) -> RecordedWeights:
    """Return what knows the digests of a loaded pipeline's weights, made at its first generation."""
    if not isinstance(state.weights, RecordedWeights):
        state.weights = RecordedWeights(getattr(pipe, "__dict__", {}).get(ORIGINS))
    return state.weights


def make_record(
    pipe: Pipeline,
    state: LoadedState,
    modules: Mapping[str, nn.Module],
    called: Mapping[str, Any],
    drawn: DrawnOutput,
    achieved: AchievedLevel,
    seen: PartTrace,
    seconds: Mapping[str, float],
) -> RunRecord:
    """Return the record of a generation that has ended: of its method and arguments, ``called``, and the ``seconds`` of
    waiting for its turn and of drawing.
    """
    asked, outcome = parse_level(state.level), state.outcome
    scheduler = getattr(pipe, "scheduler", None)
    notes = [*achieved.notes]
    if drawn.layers and drawn.seeds["source"] != "global":
        what = "was seeded with the root seed" if not drawn.seeds["streams"] else "went on from where it stood"
        notes.append(f"The pipeline drew from a global generator ({', '.join(drawn.layers)}), which {what}.")
    results = {"noise": drawn.noise, "latents": seen.latents, **digests(drawn.output)}
    if asked.audit:
        results["steps"] = seen.steps
    return RunRecord(
        pipeline={
            "class": type(pipe).__name__,
            "model": _model_name(pipe),
            "revision": None,
            "scheduler": type(scheduler).__name__ if scheduler is not None else None,
            "method": called["method"],
            "load": state.load,
        },
        call=called["arguments"],
        seeds=drawn.seeds,
        level={"asked": str(asked), "achieved": achieved.level, "flags": dict(achieved.flags), "notes": notes},
        results=results,
        outcome=outcome.status,
        key=outcome.key.hex if outcome.key else None,
        manifest=outcome.manifest.hex if outcome.manifest else None,
        graphs=seen.graphs,
        weights=weights_of(state, pipe).digests(modules),
        versions=versions(),
        machine=machine_factors(execution_device(pipe, modules)),
        seconds={name: round(value, 6) for name, value in seconds.items()},
    )


def _model_name(pipe: Pipeline) -> str | None:
    """Path or repository id; the demo model, which lies elsewhere on every machine, goes by its name."""
    model = getattr(getattr(pipe, "config", None), "_name_or_path", None)
    if not model:
        return None
    return DEMO_MODEL if Path(model) == MODEL_DIR else str(model)


def versions() -> dict[str, str]:
    """Return the version of everything whose change can move a bit, pipevault included."""
    return {
        "pipevault": package_version("pipevault"),
        "numpy": np.__version__,
        **toolchain_factors(graph_format=GRAPH_FORMAT),
    }


@contextmanager
def observed(pipe: Pipeline, loaded: LoadedState, *, audit: bool) -> Iterator[PartTrace]:
    seen = PartTrace()
    calls: Counter[str] = Counter()

    def observe(name: str, tensors: list[torch.Tensor], output: Any) -> None:
        if name.endswith("decoder") and tensors:
            seen.decoded.append(digest_array(tensors[0]))
        if audit:
            first = next(leaf for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor))
            seen.steps.append({"step": calls[name], "part": name, "sha256": digest_array(first)})
            calls[name] += 1

    states = loaded.states(pipe)
    for state in states.values():
        state.observer = observe
        state.ran = {}
    try:
        yield seen
    finally:
        named: set[tuple[str, str]] = set()
        for name, state in states.items():
            state.observer = None
            if new := {key: package for key, package in sorted(state.ran.items()) if (state.part, key) not in named}:
                seen.graphs[name] = new
                named |= {(state.part, key) for key in new}
