"""The worked example of docs/pipelines.md, run as it is written."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import pipevault
from helpers.pipelines import FAST_BUILD
from pipevault.cache.loaded import loaded_state

pytestmark = pytest.mark.compile

PAGE = Path(__file__).parents[2] / "docs" / "pipelines.md"


def test_the_example_of_an_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    section = PAGE.read_text("utf-8").partition("## Pipelines of your own")[2]
    code = re.findall(r"```python\n(.*?)```", section, re.DOTALL)[0]
    real = pipevault.PipelineCache
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pipevault, "PipelineCache", lambda dir: real(dir, build_config=FAST_BUILD), raising=False)
    monkeypatch.setattr("pipevault.graphs.adapters._ADAPTERS", {})
    names: dict[str, Any] = {"__name__": "example"}
    exec(compile(code, str(PAGE), "exec"), names)
    painter, picture = names["painter"], names["picture"]
    assert isinstance(picture, torch.Tensor)
    state = loaded_state(painter)
    assert state is not None
    states = state.states(painter)
    assert {name: part.uses["eager"] for name, part in states.items()} == {"stages.0": 0, "stages.1": 0}
    assert all(part.uses["frozen"] for part in states.values())
    graphs = [m for m in real("vault").vault.manifests() if m.key.kind == "graph"]
    assert len(graphs) == 1
    eager: Any = type(painter)._pipevault_original_class()
    torch.testing.assert_close(eager.stages[0].weight, painter.stages[0].weight)
    pipevault.unload(painter)
    torch.testing.assert_close(painter.paint(rows=4).shape, picture.shape)
