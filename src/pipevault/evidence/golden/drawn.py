"""The runs that goldens are made of and held to: what they drew, on which type of machine, and what differs.

A machine type is the processor and what a process may use of it: everything in a record's machine factors but the
versions of libraries. The threads belong to it, because their number changes bits. A library's version (oneDNN, CUDA,
cuDNN, HIP) does not: it is in the key, so that after an update a golden is still found, and what changed is named.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from PIL import Image
from torch.nn.modules.module import register_module_forward_pre_hook

from pipevault.calls.outputs import as_array, samples
from pipevault.digest import digest_json
from pipevault.errors import SettingsError
from pipevault.evidence.files import Array
from pipevault.graphs import parts as graph_parts
from pipevault.key import Difference, leaf_differences
from pipevault.pipeline import Pipeline
from pipevault.runtime.record import RunRecord

LIBRARIES = frozenset({"onednn", "cuda", "cudnn", "hip"})
_DIGEST_LENGTH = 8
_SHOWN_DIFFERENCES = 6
_SHOWN_LENGTH = 80

Sample: TypeAlias = "Image.Image | Array"


@dataclass(frozen=True)
class Drawn:
    """The results of a generation: ``samples`` are pictures (frames one after the other) or arrays, in order;
    ``latents`` are what the decoder was given at each call, if that was seen; ``factors`` are those of the key.
    """

    record: RunRecord
    samples: tuple[Sample, ...]
    latents: tuple[Array, ...] = ()
    factors: Mapping[str, Any] | None = None


def samples_of(output: Any) -> tuple[Sample, ...]:
    """Return the pictures and arrays of an output, or of a list of them. :class:`SettingsError` if there are none."""
    found = tuple(one.content for one in samples(output))
    if not found:
        raise SettingsError(
            f"This {type(output).__name__} holds no pictures, arrays or tensors to compare. Give what the pipeline "
            "returned, or its list of pictures."
        )
    return found


@contextmanager
def seen_latents(pipe: Pipeline) -> Iterator[list[Array]]:
    """Collect what the decoders of ``pipe`` are given while the block runs.

    The guard would refuse a hook on the decoder itself, so the hook is one of all modules.
    """
    decoders = [part for name, part in graph_parts.find_parts(pipe).items() if name.endswith("decoder")]
    seen: list[Array] = []

    def look(module: torch.nn.Module, args: tuple[Any, ...]) -> None:
        if args and isinstance(args[0], torch.Tensor) and any(module is decoder for decoder in decoders):
            seen.append(as_array(args[0]).copy())

    handle = register_module_forward_pre_hook(look)
    try:
        yield seen
    finally:
        handle.remove()


def machine_type(machine: Mapping[str, Any]) -> str:
    """Return a name that is safe for a folder: ``cpu-avx512-1t-3f9a2c1b``, ``cuda-nvidia-h200-3f9a2c1b``."""
    kind = str(machine.get("type", "unknown"))
    words = [kind, machine.get("capability"), f"{machine['threads']}t"] if "threads" in machine else [kind]
    if "name" in machine:
        words.append(str(machine["name"]))
    text = "-".join(str(word) for word in words if word).lower()
    return f"{re.sub('[^a-z0-9]+', '-', text)}-{digest_json(_counted(machine)).hex[:_DIGEST_LENGTH]}"


def machine_differences(golden: Mapping[str, Any], here: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(map(_text, leaf_differences(_counted(here), _counted(golden), "machine")))


def run_differences(golden: RunRecord, here: RunRecord) -> tuple[str, ...]:
    theirs, ours = ({**record.call, "seed": record.seeds["root"]} for record in (golden, here))
    return tuple(map(_text, leaf_differences(ours, theirs, "call")))


def build_differences(golden: Drawn, here: Drawn) -> tuple[str, ...]:
    """Return the differences of the graphs of two runs: the factors of their keys, or what their records hold."""
    theirs, ours = golden.factors, here.factors
    if theirs is None or ours is None:
        theirs, ours = _conditions(golden.record), _conditions(here.record)
    return tuple(map(_text, leaf_differences(ours, theirs)))


def listed(differences: Sequence[str]) -> str:
    more = len(differences) - _SHOWN_DIFFERENCES
    text = "; ".join(differences[:_SHOWN_DIFFERENCES])
    return f"{text}; and {more} more" if more > 0 else text


def _counted(machine: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in machine.items() if name not in LIBRARIES}


def _conditions(record: RunRecord) -> dict[str, Any]:
    return {
        "pipeline": {name: record.pipeline.get(name) for name in ("class", "scheduler")},
        "load": dict(record.pipeline.get("load") or {}),
        "machine": dict(record.machine),
        "toolchain": dict(record.versions),
        "level": record.level.get("asked"),
    }


def _text(difference: Difference) -> str:
    ours, theirs = difference.ours, difference.theirs
    if isinstance(ours, list) and isinstance(theirs, list):
        missing = [str(item) for item in theirs if item not in ours]
        added = [str(item) for item in ours if item not in theirs]
        changes = [*(f"without {item}" for item in missing), *(f"with {item}" for item in added)]
        if changes:
            return f"{difference.factor}: here {_clipped(', '.join(changes))}"
    return f"{difference.factor}: {_clipped(repr(theirs))} in the golden, {_clipped(repr(ours))} here"


def _clipped(text: str) -> str:
    return text if len(text) <= _SHOWN_LENGTH else f"{text[: _SHOWN_LENGTH - 1]}…"
