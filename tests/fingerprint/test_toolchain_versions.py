from __future__ import annotations

import importlib.metadata
import json
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import diffusers
import pytest
import torch

from helpers.fresh_python import run_python
from pipevault.fingerprint import toolchain


@pytest.fixture(autouse=True)
def _no_remembered_versions() -> Iterator[None]:
    toolchain._installed_version.cache_clear()
    yield
    toolchain._installed_version.cache_clear()


def test_versions_of_what_generates_code() -> None:
    factors = toolchain.toolchain_factors(graph_format=3)
    assert factors["graph_format"] == "3"
    assert factors["torch"] == str(torch.__version__)
    assert factors["diffusers"] == diffusers.__version__
    assert factors["onediff"] == importlib.metadata.version("onediff")
    assert factors["onediffx"] == importlib.metadata.version("onediffx")
    assert set(factors) == {"graph_format", "torch", "triton", "diffusers", "transformers", "onediff", "onediffx"}


def test_same_factors_whether_or_not_the_packages_are_imported(tmp_path: Path) -> None:
    code = (
        "import json, sys; from pipevault.fingerprint.toolchain import toolchain_factors as f;"
        "first = f(graph_format=1); assert 'torch' not in sys.modules and 'diffusers' not in sys.modules;"
        "import torch, diffusers, transformers, onediff, onediffx; assert f(graph_format=1) == first;"
        "print(json.dumps(first))"
    )
    assert json.loads(run_python(code, cwd=tmp_path)) == toolchain.toolchain_factors(graph_format=1)


def test_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.delitem(sys.modules, "triton", raising=False)
    monkeypatch.setattr(importlib.metadata, "version", missing)
    assert toolchain.toolchain_factors(graph_format=1)["triton"] == "none"


def test_triton_under_the_name_of_another_distribution(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        if name == "pytorch-triton":
            return "3.5.0"
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.delitem(sys.modules, "triton", raising=False)
    monkeypatch.setattr(importlib.metadata, "version", version)
    assert toolchain.package_version("triton") == "3.5.0"


def script(folder: Path, name: str, body: str) -> Path:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def without_inductor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "torch._inductor.config", raising=False)


def configure(monkeypatch: pytest.MonkeyPatch, cxx: object) -> None:
    config = types.SimpleNamespace(cpp=types.SimpleNamespace(cxx=cxx))
    monkeypatch.setitem(sys.modules, "torch._inductor.config", config)


@pytest.mark.usefixtures("without_inductor")
def test_cxx_names_the_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = script(tmp_path, "my-cxx", "echo 'my-cxx 1.2'; echo more")
    monkeypatch.setenv("CXX", str(path))
    assert toolchain.find_cxx_compiler() == "my-cxx 1.2"
    assert toolchain.toolchain_record(graph_format=1)["cxx"] == "my-cxx 1.2"


def test_configuration_of_inductor_comes_before_cxx(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = script(tmp_path, "configured", "echo configured 3")
    monkeypatch.setenv("CXX", str(script(tmp_path, "other", "echo other")))
    for cxx in ((None, str(path)), str(path)):
        configure(monkeypatch, cxx)
        assert toolchain.find_cxx_compiler() == "configured 3"


def test_compiler_that_fails_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = script(tmp_path, "broken", "exit 1")
    works = script(tmp_path, "works", "echo works 1")
    configure(monkeypatch, (str(tmp_path / "missing"), str(broken), str(works)))
    assert toolchain.find_cxx_compiler() == "works 1"


@pytest.mark.usefixtures("without_inductor")
def test_no_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", str(tmp_path / "missing"))
    assert toolchain.find_cxx_compiler() is None
    assert toolchain.toolchain_record(graph_format=1)["cxx"] == "none"
