"""A pipeline whose parts one of OneDiff's own backends compiled."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from pipevault.cache.guard import WatchedModule, changed_error
from pipevault.cache.loaded import LoadedState
from pipevault.graphs import parts as graph_parts
from pipevault.pipeline import Pipeline

logger = logging.getLogger("pipevault")

_LOAD = "PipelineCache.prepare(pipe)"


@dataclass(eq=False)
class OnediffState(LoadedState):
    """The state of a pipeline that a backend of OneDiff compiled.

    ``parts`` has the eager and the compiled module of each part. ``watched`` are the eager modules that the
    backend does not look at again once it compiled them. ``new_compilations`` counts what the
    backend compiled since it was last asked.
    """

    parts: Mapping[str, tuple[nn.Module, Any]] = field(default_factory=dict)
    watched: Mapping[str, WatchedModule] = field(default_factory=dict)
    new_compilations: Callable[[], int] = lambda: 0

    def check(self, pipe: Pipeline) -> None:
        for name, (_, compiled) in self.parts.items():
            now = graph_parts.get_part(pipe, name)
            if now is not compiled:
                raise changed_error(name, f"it was replaced by another {type(now).__name__}", _LOAD)
        for name, module in self.watched.items():
            if (change := module.change()) is not None:
                raise changed_error(name, change.text, _LOAD)
        if count := self.new_compilations():
            logger.warning(
                "%s: %d graphs were compiled for calls that nothing was kept for; load it for such calls to keep them",
                type(pipe).__name__,
                count,
            )

    def check_part(self, pipe: Pipeline, name: str) -> None:
        self.check(pipe)

    def give_back(self, pipe: Pipeline) -> None:
        for eager, compiled in self.parts.values():
            graph_parts.replace_part(pipe, compiled, eager)
