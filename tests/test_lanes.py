"""Which tests the fast lane leaves out, and what workers share."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from helpers.made_once import made_once

REFUSING = Path(__file__).parent / "helpers" / "refusing_compiler.sh"


def marked(request: pytest.FixtureRequest, name: str) -> list[pytest.Item]:
    return [item for item in request.session.items if item.get_closest_marker(name)]


def test_who_waits_for_a_compiled_vault_is_marked(request: pytest.FixtureRequest) -> None:
    waiting = [item for item in request.session.items if "frozen_vault" in getattr(item, "fixturenames", ())]
    assert set(waiting) <= set(marked(request, "compile"))
    assert request.node not in marked(request, "compile")


def test_families_are_marked(request: pytest.FixtureRequest) -> None:
    found = [item for item in request.session.items if item.path.parent.name == "families"]
    assert found == marked(request, "families")


@pytest.mark.parametrize("workers", [False, True])
def test_a_folder_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: bool) -> None:
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
    if workers:
        monkeypatch.setenv("PYTEST_XDIST_WORKER", "gw0")
    made: list[Path] = []

    def make(folder: Path) -> None:
        assert list(folder.iterdir()) == []
        (folder / "file").write_text("x")
        made.append(folder)
        if len(made) == 1:
            raise ValueError("the first time fails")

    (tmp_path / "worker").mkdir()
    factory: Any = SimpleNamespace(getbasetemp=lambda: tmp_path / "worker")
    with pytest.raises(ValueError, match="the first time"):
        made_once(factory, "thing", make)
    folders = [made_once(factory, "thing", make) for _ in range(2)]
    assert len(made) == 2
    assert set(folders) == {(tmp_path if workers else tmp_path / "worker") / "thing"}


@pytest.mark.parametrize(("argument", "code"), [("--version", 0), ("a.wrapper.cpp", 1), ("a.kernel.o", 1)])
def test_the_compiler_of_the_fast_lane_refuses_graphs(tmp_path: Path, argument: str, code: int) -> None:
    (tmp_path / "g++").write_text("#!/bin/sh\nexit 0\n")
    (tmp_path / "g++").chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run([REFUSING, argument], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == code
    assert ("mark " in done.stderr) is bool(code)
