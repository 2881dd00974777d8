"""The stress of seeds: every promise is kept in its short mode, and it notices where one is broken."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))

pytest.importorskip("httpx")
pytest.importorskip("fastapi")

import stress_server  # type: ignore[import-not-found, unused-ignore]
import stress_threads  # type: ignore[import-not-found, unused-ignore]
from pipevault.determinism.turns import TURNS

pytestmark = pytest.mark.slow

LOAD = stress_server.Load(requests=24, rounds=1, kills=1, kill_every_s=0.5)


def broken(figures: list[Any]) -> list[str]:
    return [figure.name for figure in figures if figure.kept is False]


def test_threads(tmp_path: Path) -> None:
    figures = stress_threads.measure_threads(tmp_path, calls=160, frozen=False, seed=0)
    assert broken(figures) == []
    assert len([figure for figure in figures if figure.kept]) == 7


def test_a_server_under_load_whose_worker_is_killed(tmp_path: Path) -> None:
    figures = stress_server.measure_server(tmp_path, LOAD, seed=0)
    assert broken(figures) == []
    values = {figure.name: figure.value for figure in figures}
    assert values["server, 2 workers of 4 threads, 8 clients: right answers"] == "24"
    assert values["answers that /metrics counts"] == "24"
    assert values["workers in the end, 1 workers killed"] == "2"


class TestItNotices:
    def test_threads_that_do_not_take_turns(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        @contextmanager
        def at_once(*arguments: object, **options: object) -> Iterator[float]:
            yield 0.0

        monkeypatch.setattr(TURNS, "take", at_once)
        before = torch.get_rng_state()
        try:
            figures = stress_threads.measure_threads(tmp_path, calls=160, frozen=False, seed=0)
        finally:
            torch.set_rng_state(before)
            torch.use_deterministic_algorithms(False)
        assert broken(figures)

    def test_a_server_that_draws_other_pictures(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        wanted = [["0" * 64]] * stress_server.PAIRS
        monkeypatch.setattr(stress_server, "draw_alone", lambda load, vault: wanted)
        figures = stress_server.measure_server(tmp_path, replace(LOAD, kills=0), seed=0)
        assert "answers with other bytes" in broken(figures)
