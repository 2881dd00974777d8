"""What the tests of graphs share: freezing a module for this process, and asserting that graphs ran."""

from __future__ import annotations

from typing import Any

import torch
from onediff.infer_compiler import compile as onediff_compile
from torch import nn

from helpers.pipelines import FAST_BUILD
from pipevault.graphs.freezing import Subject
from pipevault.graphs.inductor import BuildOptions
from pipevault.graphs.part import BACKEND, part_state
from pipevault.graphs.state import PartOptions


def frozen(module: nn.Module, **options: Any) -> Any:
    """``module`` as a part that freezes what it is called with; its graphs live as long as the process."""
    return onediff_compile(
        module.eval(), backend=BACKEND, options=PartOptions(build=BuildOptions(config=FAST_BUILD), **options)
    )


def subject_of(module: nn.Module) -> Subject:
    def eager(*args: Any, **kwargs: Any) -> Any:
        return type(module).forward(module, *args, **kwargs)

    return Subject("part", "identity", module.eval(), eager, torch.device("cpu"))


def graphs_of(part: nn.Module) -> int:
    return len(part_state(part).graphs)


def uses_of(part: nn.Module) -> dict[str, int]:
    return dict(part_state(part).uses)


def refusals_of(part: nn.Module) -> list[str]:
    return [slot.refusal for slot in part_state(part).table if slot.refusal]
