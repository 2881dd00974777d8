from __future__ import annotations

import importlib.metadata
import logging
import sys
from pathlib import Path

import pytest
import torch

from pipevault.compat import versions


@pytest.fixture(autouse=True)
def _not_warned_yet() -> None:
    versions._warn_once.cache_clear()


@pytest.mark.parametrize("version", ["2.13.0", "2.13.0+cpu", "2.13.4+cu130", "2.11.0", "2.15.0+rocm7"])
def test_tried(version: str) -> None:
    assert versions.untried_text(version) is None


@pytest.mark.parametrize("version", ["2.9.1", "2.11.1", "2.14.1", "2.15.1", "2.130.0", "2.13.0a0+git1234", "3.0.0", ""])
def test_untried(version: str) -> None:
    assert f"torch {version} was not tried" in (versions.untried_text(version) or "")


@pytest.mark.parametrize(
    ("version", "too_old"), [("2.8.2", True), ("1.13.1", True), ("2.9.0", False), ("2.10.0+cpu", False), ("3.0", False)]
)
def test_too_old(version: str, too_old: bool) -> None:
    assert versions.is_too_old(version) is too_old


def test_the_version_of_the_imported_torch_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    assert versions.torch_version() == torch.__version__
    monkeypatch.delitem(sys.modules, "torch")
    assert versions.torch_version() == torch.__version__


def test_a_torch_without_a_file_of_its_version_has_that_of_its_metadata(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "METADATA").write_text("Name: torch\nVersion: 2.20.0\n")
    distribution = importlib.metadata.PathDistribution(tmp_path)
    monkeypatch.setattr(importlib.metadata, "distribution", lambda name: distribution)
    assert versions.installed_torch_version() == "2.20.0"


def test_no_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.delitem(sys.modules, "torch")
    monkeypatch.setattr(importlib.metadata, "distribution", missing)
    assert versions.torch_version() is None
    assert versions.warn_untried() is None


def test_one_warning_in_a_process(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(torch, "__version__", "2.99.0")
    with caplog.at_level(logging.WARNING, logger="pipevault"):
        texts = {versions.warn_untried() for _ in range(3)}
    assert [record.getMessage() for record in caplog.records] == list(texts)
    assert "torch 2.99.0" in caplog.text


def test_no_warning_of_a_torch_that_was_tried(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch, "__version__", "2.13.0+cpu")
    assert versions.warn_untried() is None
    assert caplog.records == []
