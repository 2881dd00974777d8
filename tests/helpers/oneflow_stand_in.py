"""A stand-in for OneDiff's OneFlow backend: modules that onediffx drives, whose graphs differ from build to build."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from onediff.infer_compiler import DeployableModule, OneflowCompileOptions
from torch import nn


class StandInGraph:
    """A graph that was tuned as it was built: it is off by a tiny factor that another build would not have."""

    def __init__(self) -> None:
        self.factor: float | None = None

    @property
    def is_compiled(self) -> bool:
        return self.factor is not None

    def build(self) -> None:
        self.factor = 1 + random.SystemRandom().randint(1, 1 << 10) * 2.0**-23
        StandIn.builds += 1


class StandIn(DeployableModule):
    """The members that ``save_pipe`` and ``load_pipe`` use, as OneDiff's own ``OneflowDeployableModule`` has them."""

    builds = 0
    calls: list[str] = []  # noqa: RUF012 - of all modules

    def __init__(self, torch_module: nn.Module) -> None:
        nn.Module.__init__(self)
        object.__setattr__(self, "_modules", torch_module._modules)
        object.__setattr__(self, "_torch_module", torch_module)
        self._deployable_module_dpl_graph: StandInGraph | None = None

    def get_graph(self) -> StandInGraph:
        if self._deployable_module_dpl_graph is None:
            self._deployable_module_dpl_graph = StandInGraph()
        return self._deployable_module_dpl_graph

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.calls.append("run")
        graph = self.get_graph()
        if not graph.is_compiled:
            graph.build()
        return self._torch_module(*args, **kwargs) * graph.factor

    def save_graph(self, file_path: str) -> None:
        self.calls.append("save")
        Path(file_path).write_text(json.dumps(self.get_graph().factor))

    def load_graph(self, file_path: str, device: Any = None, run_warmup: bool = True) -> None:
        self.calls.append("load")
        self.get_graph().factor = json.loads(Path(file_path).read_text())


def stand_in_backend(kind: type[StandIn] = StandIn) -> Any:
    """A backend that compiles modules to ``kind``, mixed with their own class as OneDiff does."""

    def compile_module(torch_module: nn.Module, *, options: Any = None) -> Any:
        assert isinstance(options, OneflowCompileOptions)
        StandIn.calls.append("compile")
        mixed: Any = type(f"Mixed{type(torch_module).__name__}", (kind, type(torch_module)), {})
        return mixed(torch_module)

    return compile_module
