"""A Python child: what it is given, and how it ends; tests/evidence/test_generation_job.py has further ways to fail."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pipevault.errors import PipevaultError, TrainingModeError
from pipevault.files.child import run_child

LEAVE = """
import pathlib, sys
from pipevault.errors import TrainingModeError
from pipevault.files.child import leave_error
leave_error(pathlib.Path(sys.argv[1]), TrainingModeError("in training mode", "unet"))
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a module that the child finds; tests write it."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    return "a_module_of_the_test"


def run(module: str, folder: Path, body: str, *, timeout_s: float | None = None) -> None:
    (folder / f"{module}.py").write_text(body)
    run_child(module, [str(folder)], folder, name="it", environment={"GIVEN": "7"}, timeout_s=timeout_s)


def test_the_child_has_its_arguments_and_the_environment_and_no_input(module: str, tmp_path: Path) -> None:
    run(module, tmp_path, "import os, sys; print(sys.argv[1:], os.environ['GIVEN'], repr(sys.stdin.read()))")
    assert (tmp_path / "output.txt").read_text() == f"['{tmp_path}'] 7 ''\n"


def test_the_error_that_the_child_left_is_raised(module: str, tmp_path: Path) -> None:
    with pytest.raises(TrainingModeError, match=r"^it failed: in training mode$") as caught:
        run(module, tmp_path, LEAVE)
    assert caught.value.part == "unet"


def test_a_child_that_fails_or_hangs_is_told_with_what_it_printed(module: str, tmp_path: Path) -> None:
    with pytest.raises(PipevaultError, match=r"^it failed: its process ended with exit code 3\. It printed:\nhalf$"):
        run(module, tmp_path, "print('half'); raise SystemExit(3)")
    with pytest.raises(PipevaultError, match=r"longer than 0\.1 s"):
        run(module, tmp_path, "import time; time.sleep(60)", timeout_s=0.1)
