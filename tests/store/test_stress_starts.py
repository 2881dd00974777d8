"""The script that starts and kills containers: what they leave is bounded, and it notices where that is not so."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipevault.store import vault
from pipevault.store.retention import leftovers

pytestmark = pytest.mark.slow

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
STARTS = 30


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import stress_starts

    monkeypatch.setattr(leftovers, "TIDY_ABOVE", 16)
    monkeypatch.setattr(stress_starts, "_MOST_FILES", 24)
    monkeypatch.setattr(stress_starts, "ENTRIES", 6)
    yield stress_starts
    for name in ("figures", "stress_entries", "stress_starts"):
        sys.modules.pop(name, None)


def test_every_promise_is_kept(script: Any, tmp_path: Path) -> None:
    figures = script.measure_starts(tmp_path, STARTS)
    assert [figure.name for figure in figures if figure.kept is False] == []
    assert any("leases" in figure.name for figure in figures)


def test_it_notices_files_that_stay(script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vault, "tidy", lambda layout: None)
    figures = script.measure_starts(tmp_path, STARTS)
    broken = [figure.name for figure in figures if figure.kept is False]
    assert {"files in leases/, most", "files in tmp/, most"} <= set(broken)
