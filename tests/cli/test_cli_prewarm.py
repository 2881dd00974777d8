"""``prewarm`` with a cache that freezes nothing: each size on its own, whatever happens to the others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import pipevault
from helpers.command_runner import Run
from helpers.stand_ins import KEY, PARTS, FakeCache, FlatPipeline, fake_outcome
from pipevault.cache.outcome import Outcome
from pipevault.cli import prewarm
from pipevault.errors import BadCallError, CompilerMissingError


@pytest.fixture(autouse=True)
def opened(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the model was opened with."""
    options: dict[str, Any] = {}

    def open_pipeline(model: str, **given: Any) -> FlatPipeline:
        options.update(model=model, **given)
        return FlatPipeline()

    monkeypatch.setattr(pipevault, "PipelineCache", FakeCache, raising=False)
    monkeypatch.setattr(pipevault, "outcome", fake_outcome, raising=False)
    monkeypatch.setattr(prewarm, "open_pipeline", open_pipeline)
    return options


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The arguments of every load; one of height 8 is refused, one of height 9 runs out of memory."""
    calls: list[dict[str, Any]] = []
    load = FakeCache.load

    def recording_load(cache: FakeCache, pipe: Any, **arguments: Any) -> Any:
        calls.append(arguments)
        if (height := arguments["shapes"][0].get("height")) == 8:
            raise BadCallError("height=8 does not suit\nthis pipeline.")
        if height == 9:
            raise MemoryError("not enough memory")
        return load(cache, pipe, **arguments)

    monkeypatch.setattr(FakeCache, "load", recording_load)
    return calls


def rows(text: str) -> list[list[str]]:
    return [line.split() for line in text.splitlines()[2:]]


def test_every_size_is_frozen(run: Run, opened: dict[str, Any], loads: list[dict[str, Any]], tmp_path: Path) -> None:
    result = run(
        *("prewarm", "./model", "--size", "512x512", "--size", "768x512", "--dtype", "bfloat16", "--dir", tmp_path),
        *("--weights", "baked", "--parts", "unet,vae.decoder", "--frames", "9", "--batch-size", "2", "--guidance"),
    )
    assert result.exit_code == 0, result.output
    call = {"num_frames": 9, "batch_size": 2, "guidance": True, "height": 512}
    assert [load["shapes"] for load in loads] == [[{**call, "width": 512}], [{**call, "width": 768}]]
    assert {load["parts"] for load in loads} == {("unet", "vae.decoder")}
    used = FakeCache.used
    assert (used["dir"], used["mode"], used["weights"]) == (tmp_path, "compile", "baked")
    assert opened == {"model": "./model", "dtype": "bfloat16", "device": None, "pipeline_class": None}


def test_table(run: Run) -> None:
    [row] = rows(run("prewarm", "demo", "--size", "32x32").stdout)
    assert row[:6] == ["32x32", KEY.digest.short, "miss", "unet", "yes", "1.5"]


def test_without_a_size(run: Run, loads: list[dict[str, Any]]) -> None:
    result = run("prewarm", "demo")
    assert result.stdout.splitlines()[-1].startswith("default size ")
    assert [load["shapes"] for load in loads] == [[{"batch_size": 10, "guidance": True}]]


def test_the_progress_names_the_size(run: Run) -> None:
    result = run("prewarm", "m", "--size", "512x512", "--size", "768x512")
    assert "] 512x512 (1 of 2) unet: compiling\n" in result.stderr
    assert "] 768x512 (2 of 2) unet: compiling\n" in result.stderr


@pytest.mark.usefixtures("loads")
class TestFailures:
    def test_the_others_go_on_and_the_table_says_why(self, run: Run) -> None:
        result = run("prewarm", "m", "--size", "512x8", "--size", "512x512")
        assert result.exit_code == 2
        failed, frozen = rows(result.stdout)
        assert failed[:3] == ["512x8", "failed", "no"]
        assert " ".join(failed[3:]) == "height=8 does not suit this pipeline."
        assert frozen[:3] == ["512x512", KEY.digest.short, "miss"]

    def test_json(self, run: Run, tmp_path: Path) -> None:
        result = run("prewarm", "m", "--size", "512x512", "--size", "512x8", "--json", "--dir", tmp_path)
        document = json.loads(result.stdout)
        assert document["vault"] == str(tmp_path)
        assert document["sizes"][0] == {"size": "512x512", **FakeCache.report.to_json()}
        assert document["sizes"][1] == {
            "size": "512x8",
            "status": "failed",
            "error": "BadCallError",
            "reason": "height=8 does not suit this pipeline.",
        }

    def test_an_error_of_a_library_keeps_its_traceback_and_the_others_go_on(self, run: Run) -> None:
        result = run("prewarm", "m", "--size", "512x9", "--size", "512x512")
        assert result.exit_code == 1
        assert "Traceback" in result.stderr
        failed, frozen = rows(result.stdout)
        assert " ".join(failed[3:]) == "MemoryError: not enough memory"
        assert frozen[2] == "miss"

    def test_the_first_error_decides_the_exit_code(self, run: Run) -> None:
        assert run("prewarm", "m", "--size", "512x512", "--size", "512x8", "--size", "512x9").exit_code == 2
        assert run("prewarm", "m", "--size", "512x9", "--size", "512x8").exit_code == 1


def test_an_error_of_every_size(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: Any, **__: Any) -> None:
        raise CompilerMissingError("No C++ compiler was found.")

    monkeypatch.setattr(FakeCache, "load", load)
    assert run("prewarm", "demo").exit_code == 5


def test_an_entry_that_was_not_stored_is_a_failure(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeCache, "report", Outcome("miss", KEY.digest, "disk full", PARTS, stored=False))
    result = run("prewarm", "demo")
    assert result.exit_code == 1
    assert "no" in result.stdout.splitlines()[-1].split()


def test_bad_size(run: Run, opened: dict[str, Any]) -> None:
    result = run("prewarm", "demo", "--size", "512")
    assert (result.exit_code, result.stdout, opened) == (2, "", {})
    assert "'512' is no size" in result.stderr
