"""The command that freezes what is missing, for messages."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path

from pipevault.cache.keys import execution_device
from pipevault.calls.call import CallShape
from pipevault.calls.call_shapes import CallRange
from pipevault.determinism.levels import parse_level
from pipevault.pipeline import Pipeline


def freeze_command(pipe: Pipeline, shape: CallShape | CallRange, *, weights: str, level: str, dir: Path) -> str:
    """A sentence with the command that freezes ``pipe`` at ``shape`` into the vault at ``dir``."""
    least, most = (shape.least, shape.most) if isinstance(shape, CallRange) else (shape, shape)
    if callable(most.call) or (isinstance(most.call, Mapping) and most.call):
        return "run this program once with mode='compile' (its call cannot be given on a command line)"
    model = getattr(getattr(pipe, "config", None), "_name_or_path", None)
    if not model:
        return "run this program once with mode='compile'"
    words = ["pipevault", "prewarm", str(model)]
    if most.width and most.height:
        words += ["--size", _range(f"{least.width}x{least.height}", f"{most.width}x{most.height}")]
    dtype = getattr(pipe, "dtype", None)
    if dtype is not None and str(dtype) != "torch.float32":
        words += ["--dtype", str(dtype).removeprefix("torch.")]
    parts = {name: part for name, part in vars(pipe).items() if hasattr(part, "parameters")}
    words += ["--device", execution_device(pipe, parts).type]
    if most.batch_size > 1:
        words += ["--batch-size", _range(least.batch_size, most.batch_size)]
    if most.num_frames:
        words += ["--frames", _range(least.num_frames, most.num_frames)]
    if most.guidance is not None:
        words += ["--guidance" if most.guidance else "--no-guidance"]
    if weights != "bound":
        words += ["--weights", weights]
    if (name := parse_level(level).name) in ("strict", "invariant"):  # the other levels share their graphs
        words += ["--level", name]
    return f"run `{shlex.join([*words, '--dir', str(dir)])}`"


def _range(least: object, most: object) -> str:
    return str(most) if least == most else f"{least}..{most}"
