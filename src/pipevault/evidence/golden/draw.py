"""The results of a generation as a golden keeps them: pictures or arrays, and the latents they were decoded from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from PIL import Image
from torch.nn.modules.module import register_module_forward_pre_hook

from pipevault.calls.outputs import as_array, samples
from pipevault.errors import SettingsError
from pipevault.evidence.files import Array
from pipevault.graphs import parts as graph_parts
from pipevault.pipeline import Pipeline
from pipevault.runtime.record import RunRecord

Sample: TypeAlias = "Image.Image | Array"


@dataclass(frozen=True)
class Drawn:
    """The results of a generation. ``samples`` are the pictures (frames one after the other) or arrays of an output, in
    order. ``latents`` are what the decoder was given, a tensor for each of its calls; empty if that was not seen.
    ``factors`` are those of the key.
    """

    record: RunRecord
    samples: tuple[Sample, ...]
    latents: tuple[Array, ...] = ()
    factors: Mapping[str, Any] | None = field(default=None)


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

    A hook on the decoder itself would be a change that the guard refuses, so the hook is one of all modules.
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
