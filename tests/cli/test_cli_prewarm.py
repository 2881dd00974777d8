"""``prewarm`` with a cache that freezes nothing: each call on its own, whatever happens to the others."""

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


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What the models were opened with, one after the other."""
    calls: list[dict[str, Any]] = []

    def open_pipeline(model: str, **given: Any) -> FlatPipeline:
        calls.append({"model": model, **given})
        return FlatPipeline()

    monkeypatch.setattr(pipevault, "PipelineCache", FakeCache, raising=False)
    monkeypatch.setattr(pipevault, "outcome", fake_outcome, raising=False)
    monkeypatch.setattr(prewarm, "open_pipeline", open_pipeline)
    return calls


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch, opened: list[dict[str, Any]]) -> list[dict[str, Any]]:
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


def test_every_size_is_frozen(
    run: Run, opened: list[dict[str, Any]], loads: list[dict[str, Any]], tmp_path: Path
) -> None:
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
    assert opened == [{"model": "./model", "dtype": "bfloat16", "device": None, "pipeline_class": None}]


def test_the_product_of_what_is_given_is_planned_and_then_frozen_dtype_by_dtype(
    run: Run, opened: list[dict[str, Any]], loads: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    explained: list[int] = []
    explain = FakeCache.explain

    def counting(cache: FakeCache, pipe: Any, **shape: Any) -> Any:
        explained.append(len(loads))
        return explain(cache, pipe, **shape)

    monkeypatch.setattr(FakeCache, "explain", counting)
    options = [("--dtype", "float16"), ("--dtype", "bfloat16"), ("--size", "8x16"), ("--size", "16x16")]
    options += [("--batch-size", "1"), ("--batch-size", "2..4")]
    result = run("prewarm", "m", *(word for option in options for word in option))
    assert result.exit_code == 0, result.output
    assert explained == [0] * 8, "all calls are looked up before the first is frozen"
    assert "8 planned: 0 in the vault, 0 failed, 8 to freeze." in result.stderr
    shapes = [(load["shapes"][0]["width"], load["shapes"][0]["batch_size"]) for load in loads]
    assert shapes == [(8, 1), (8, (2, 4)), (16, 1), (16, (2, 4))] * 2
    assert [call["dtype"] for call in opened] == ["float16", "bfloat16"] * 2, "one model is in memory at a time"
    labels = [line.partition("  ")[0] for line in result.stdout.splitlines()[2:]]
    assert labels[0] == "8x16, batch 1, float16"
    assert labels[-1] == "16x16, batch 2..4, bfloat16"
    assert "] 16x16, batch 2..4, bfloat16 (8 of 8) unet: compiling\n" in result.stderr


def test_table(run: Run, opened: list[dict[str, Any]]) -> None:
    [row] = rows(run("prewarm", "demo", "--size", "32x32").stdout)
    assert row[:5] == ["32x32", KEY.digest.short, "miss", "unet", "yes"]
    assert float(row[5]) < 1.5, "what it took, not the sum of steps that lie inside one another"


def test_without_a_size(run: Run, loads: list[dict[str, Any]]) -> None:
    result = run("prewarm", "demo")
    assert result.stdout.splitlines()[-1].startswith("default size ")
    assert [load["shapes"] for load in loads] == [[{"batch_size": 10, "guidance": True}]]


def test_the_progress_names_the_size(run: Run, opened: list[dict[str, Any]]) -> None:
    result = run("prewarm", "m", "--size", "512x512", "--size", "768x512")
    assert "] 512x512 (1 of 2) unet: compiling\n" in result.stderr
    assert "] 768x512 (2 of 2) unet: compiling\n" in result.stderr


class TestDryRun:
    """With the real cache: looking up compiles nothing."""

    def test_it_shows_the_plan_and_freezes_nothing(self, run: Run, tmp_path: Path) -> None:
        result = run("prewarm", "demo", "--size", "32x32", "--size", "0x0", "--dry-run", "--dir", tmp_path / "vault")
        assert result.exit_code == 2
        assert "Invalid size '0x0'" in result.stderr
        options = (
            "--size",
            "32x32",
            "--batch-size",
            "1",
            "--batch-size",
            "2",
            "--dry-run",
            "--dir",
            tmp_path / "vault",
        )
        result = run("prewarm", "demo", *options, "--json")
        assert (result.exit_code, json.loads(result.stdout)["code"]) == (1, "miss")
        found = json.loads(result.stdout)["calls"]
        assert [(call["size"], call["batch_size"], call["dtype"]) for call in found] == [
            ("32x32", "1", None),
            ("32x32", "2", None),
        ]
        assert len({call["key"] for call in found}) == 2
        assert {call["status"] for call in found} == {"miss"}
        lines = run("prewarm", "demo", *options).stdout.splitlines()
        assert [line.split("  ")[0] for line in lines[2:]] == ["32x32, batch 1", "32x32, batch 2"]
        assert all("would be frozen" in line for line in lines[2:])
        assert not (tmp_path / "vault").exists()

    def test_a_call_that_the_model_does_not_accept_fails_alone(self, run: Run, tmp_path: Path) -> None:
        result = run("prewarm", "demo", "--size", "33x32", "--size", "32x32", "--dry-run", "--dir", tmp_path, "--json")
        assert result.exit_code == 2
        refused, missing = json.loads(result.stdout)["calls"]
        assert (refused["status"], refused["code"], missing["code"]) == ("failed", "bad-call", "miss")
        assert json.loads(result.stdout)["code"] == "bad-call"


@pytest.mark.usefixtures("loads")
class TestFailures:
    def test_the_others_go_on_and_the_table_says_why(self, run: Run) -> None:
        result = run("prewarm", "m", "--size", "512x8", "--size", "512x512")
        assert result.exit_code == 2
        failed, frozen = rows(result.stdout)
        assert failed[:3] == ["512x8", "failed", "no"]
        assert " ".join(failed[3:]) == "bad-call: height=8 does not suit this pipeline."
        assert frozen[:3] == ["512x512", KEY.digest.short, "miss"]

    def test_json(self, run: Run, tmp_path: Path) -> None:
        result = run("prewarm", "m", "--size", "512x512", "--size", "512x8", "--json", "--dir", tmp_path)
        document = json.loads(result.stdout)
        assert (document["vault"], document["code"]) == (str(tmp_path), "bad-call")
        asked = {"batch_size": None, "dtype": None}
        assert document["calls"][0] == {"size": "512x512", **asked, "code": None, **FakeCache.report.to_json()}
        assert document["calls"][1] == {
            "size": "512x8",
            **asked,
            "status": "failed",
            "code": "bad-call",
            "message": "height=8 does not suit this pipeline.",
        }

    def test_an_error_of_a_library_is_told_and_the_others_go_on(
        self, run: Run, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        result = run("prewarm", "m", "--size", "512x9", "--size", "512x512")
        assert result.exit_code == 4
        assert "Traceback" not in result.stderr
        failed, frozen = rows(result.stdout)
        assert " ".join(failed[3:]) == "failed: MemoryError: not enough memory"
        assert frozen[2] == "miss"
        monkeypatch.setenv("PIPEVAULT_DEBUG", "1")
        assert "Traceback" in run("prewarm", "m", "--size", "512x9").stderr

    def test_the_first_error_decides_the_exit_code(self, run: Run) -> None:
        assert run("prewarm", "m", "--size", "512x512", "--size", "512x8", "--size", "512x9").exit_code == 2
        assert run("prewarm", "m", "--size", "512x9", "--size", "512x8").exit_code == 4

    def test_an_error_of_every_size(self, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
        def load(*_: Any, **__: Any) -> None:
            raise CompilerMissingError("No C++ compiler was found.")

        monkeypatch.setattr(FakeCache, "load", load)
        assert run("prewarm", "demo").exit_code == 4

    def test_what_fails_in_the_plan_is_not_frozen(
        self, run: Run, loads: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def explain(cache: FakeCache, pipe: Any, **shape: Any) -> Any:
            if shape["height"] == 16:
                raise BadCallError("height=16 does not suit this pipeline.")
            return FakeCache.explanation

        monkeypatch.setattr(FakeCache, "explain", explain)
        result = run("prewarm", "m", "--size", "16x16", "--size", "32x32")
        assert result.exit_code == 2
        assert [load["shapes"][0]["height"] for load in loads] == [32]
        assert "2 planned: 0 in the vault, 1 failed, 1 to freeze." in result.stderr

    def test_an_entry_that_was_not_stored(self, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(FakeCache, "report", Outcome("miss", KEY.digest, "disk full", PARTS, stored=False))
        result = run("prewarm", "demo", "--json")
        assert (result.exit_code, json.loads(result.stdout)["code"]) == (4, "not-stored")
        assert "no" in run("prewarm", "demo").stdout.splitlines()[-1].split()


def test_bad_size(run: Run, opened: list[dict[str, Any]]) -> None:
    result = run("prewarm", "demo", "--size", "512")
    assert (result.exit_code, result.stdout, opened) == (2, "", [])
    assert "Invalid size '512'" in result.stderr


def test_a_range_that_runs_downwards_is_answered_as_it_was_typed(run: Run) -> None:
    result = run("prewarm", "m", "--batch-size", "4..1")
    assert (result.exit_code, "Write 1..4." in result.stderr) == (2, True)


def test_without_weights_none_are_read(run: Run, opened: list[dict[str, Any]]) -> None:
    assert run("prewarm", "model", "--without-weights").exit_code == 0
    assert opened[0]["with_weights"] is False
    result = run("prewarm", "model", "--without-weights", "--weights", "baked")
    assert result.exit_code == 2
    assert "made up cannot be baked" in result.stderr
