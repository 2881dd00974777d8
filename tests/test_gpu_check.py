"""``scripts/gpu_check.py`` where there is no GPU: its dry run, its budget, its table."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "scripts" / "gpu_check.py"
sys.path.insert(0, str(SCRIPT.parent))

import gpu_check  # type: ignore[import-not-found, unused-ignore]  # noqa: E402


class FakeClock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


class FakeSink:
    def __init__(self) -> None:
        self.checks: list[tuple[str, bool, str]] = []
        self.left_out: list[tuple[str, str]] = []
        self.stages: list[tuple[str, str]] = []

    def check(self, name: str, ok: bool, detail: str) -> None:
        self.checks.append((name, ok, detail))

    def skipped(self, what: str, why: str) -> None:
        self.left_out.append((what, why))

    def began(self, stage: str) -> None:
        self.stages.append(("began", stage))

    def done(self, stage: str) -> None:
        self.stages.append(("done", stage))


def fake_stage(clock: FakeClock, name: str, need_s: float, *, after: str = "", ended: bool = True) -> Any:
    def run() -> bool:
        clock.now_s += need_s
        return ended

    return gpu_check.Stage(name, need_s, run, after)


def empty_document(**more: Any) -> dict[str, Any]:
    machine = {"card": "NVIDIA H100", "driver": None}
    document = {"dry_run": False, "machine": machine, "versions": {"torch": "2.11.0"}, "elapsed_s": 12.5}
    return {**document, "cases": {}, "checks": [], "skipped": [], **more}


@pytest.mark.compile
def test_dry_run_checks_a_model_and_lists_what_needs_a_gpu(tmp_path: Path) -> None:
    out = tmp_path / "results" / "dry.json"
    command = [sys.executable, str(SCRIPT), "--dry-run", "--models", "dit", "--out", str(out)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=400, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    document = json.loads(out.read_text("utf-8"))
    assert {"dry_run", "budget_s", "machine", "versions", "elapsed_s", "cases", "checks", "skipped"} <= set(document)
    assert {"card", "driver", "cpu"} <= set(document["machine"])
    assert {"torch", "triton", "diffusers"} <= set(document["versions"])
    assert [check for check in document["checks"] if not check["ok"]] == []
    names = {check["name"].removeprefix("dit-float32: ") for check in document["checks"]}
    assert {
        "a cold load compiles the model into the vault",
        "every step runs the graph",
        "frozen equals eager within tolerance",
        "a fresh process hits",
        "the same bits in every run",
        "a graph for another AOTI_CPU_ISA is refused by a load",
        "a graph for another AOTI_CPU_ISA is refused by a call",
        "on its own machine the same entry hits again",
        "frozen under accelerate's cpu_offload_with_hook",
        "frozen under accelerate's cpu_offload",
    } <= names
    figures = document["cases"]["dit-float32"]
    assert figures["sha256_compiling_run"] == figures["sha256_second_call"] == figures["sha256_fresh_process"]
    assert figures["distance"] <= figures["tolerance"]
    assert {"cold_load_s", "hit_ready_s", "eager_first_step_s", "parameters"} <= set(figures)
    assert not {"peak_eager_bytes", "peak_frozen_bytes", "torch_compile_first_call_s"} & set(figures)
    skipped = {item["what"]: item["why"] for item in document["skipped"]}
    for what in ("float16, bfloat16", "torch.compile", "dit-float32: peak_eager_bytes"):
        assert "needs CUDA" in skipped[what]
    assert "| dit-float32 |" in result.stdout
    assert "- skipped torch.compile: needs CUDA" in result.stdout


def test_without_a_gpu_it_says_that_a_dry_run_needs_none(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_check.main([]) == 2
    assert "--dry-run" in capsys.readouterr().err


def test_a_stage_for_which_too_little_is_left_is_skipped_and_a_shorter_one_runs() -> None:
    clock, sink = FakeClock(), FakeSink()
    stages = [fake_stage(clock, "a", 60), fake_stage(clock, "b", 50), fake_stage(clock, "c", 40)]
    gpu_check.run_stages(stages, gpu_check.Budget(100, clock), sink, "m: ")
    assert sink.stages == [("began", "a"), ("done", "a"), ("began", "c"), ("done", "c")]
    assert sink.left_out == [("m: b", "it takes about 50 s and 40 s are left of the budget")]
    assert sink.checks == []


@pytest.mark.parametrize("how", ["skipped", "not ended"])
def test_what_needs_a_stage_that_did_not_end_is_skipped(how: str) -> None:
    clock, sink = FakeClock(), FakeSink()
    first = fake_stage(clock, "a", 200) if how == "skipped" else fake_stage(clock, "a", 1, ended=False)
    gpu_check.run_stages([first, fake_stage(clock, "b", 1, after="a")], gpu_check.Budget(100, clock), sink)
    assert sink.left_out[-1] == ("b", "a did not come to its end")


def test_a_stage_that_raises_is_a_failed_check_and_others_go_on() -> None:
    clock, sink = FakeClock(), FakeSink()

    def fail() -> bool:
        raise ValueError("no\nsuch thing")

    stages = [gpu_check.Stage("a", 1, fail), fake_stage(clock, "b", 1, after="a"), fake_stage(clock, "c", 1)]
    gpu_check.run_stages(stages, gpu_check.Budget(100, clock), sink, "m: ")
    assert sink.checks == [("m: a", False, "ValueError: no such thing")]
    assert sink.left_out == [("m: b", "m: a did not come to its end")]
    assert ("done", "c") in sink.stages


def test_the_small_models_come_first_and_float16_last(tmp_path: Path) -> None:
    results = gpu_check.Results(None, {})
    runner = gpu_check.Runner(results, gpu_check.Budget(480), tmp_path, dry_run=False, offload="")
    names = [stage.name for stage in runner.stages(gpu_check.planned(["sdxl", "sd15", "dit"], dry_run=False))]
    assert names[:4] == ["sd15-bfloat16 freeze", "sd15-bfloat16 hit", "dit-bfloat16 freeze", "dit-bfloat16 hit"]
    assert names[4:7] == ["sd15-bfloat16 speed", "dit-bfloat16 speed", "sdxl-bfloat16 freeze"]
    assert names[-1] == "sd15-float16 speed"
    assert len(names) == len(set(names)) == 12


class FakeRunner(gpu_check.Runner):  # type: ignore[misc, unused-ignore]
    """Its processes run ``code``, with the file of events as argument."""

    code = ""

    def command(self, kind: str, case: Any, events: Path) -> list[str]:
        return [sys.executable, "-c", self.code, str(events)]


def follow(tmp_path: Path, code: str, budget_s: float) -> tuple[bool, dict[str, Any]]:
    out = tmp_path / "out.json"
    results = gpu_check.Results(out, {})
    runner = FakeRunner(results, gpu_check.Budget(budget_s), tmp_path, dry_run=True, offload="")
    runner.code = code
    done = runner.follow("freeze", gpu_check.Case("dit", "float32", tiny=True))
    return done, json.loads(out.read_text("utf-8"))


TELL = 'import sys; tell = lambda line: open(sys.argv[1], "a").write(line + "\\n")\n'


def test_what_a_process_tells_is_written(tmp_path: Path) -> None:
    code = TELL + """tell('{"figures": {"cold_load_s": 3.5}}'); tell('{"done": "cold load"}')"""
    done, document = follow(tmp_path, code, 60)
    assert done
    assert document["cases"]["dit-float32"] == {"cold_load_s": 3.5}
    assert document["checks"] == []


def test_a_process_that_dies_is_a_failed_check_and_what_it_told_stays(tmp_path: Path) -> None:
    code = TELL + """tell('{"figures": {"x": 1}}'); tell('{"began": "eager"}'); sys.exit("out of luck")"""
    done, document = follow(tmp_path, code, 60)
    assert not done
    [check] = document["checks"]
    assert not check["ok"]
    assert check["detail"] == "ended with 1 in eager: out of luck"
    assert document["cases"]["dit-float32"] == {"x": 1}


def test_a_process_that_outlasts_the_budget_is_stopped_and_said_to_be(tmp_path: Path) -> None:
    started_s = time.monotonic()
    code = TELL + """tell('{"began": "cold load"}'); import time; time.sleep(60)"""
    done, document = follow(tmp_path, code, 2)
    assert not done
    assert time.monotonic() - started_s < 30
    assert document["skipped"] == [
        {"what": "dit-float32: cold load", "why": "stopped in freeze: the budget ran out"}
    ] or document["skipped"] == [{"what": "dit-float32: its start", "why": "stopped in freeze: the budget ran out"}]
    assert document["checks"] == []


def test_what_was_not_measured_is_an_empty_cell() -> None:
    document = empty_document(cases={"dit-bfloat16": {"parameters": 2_556_184_640, "cold_load_s": 61.23}})
    table = gpu_check.markdown(document).splitlines()
    assert table[2].startswith("| dit-bfloat16 | 2556 M | 61.2 s |  |  |")
    assert table[0].count("|") == table[1].count("|") == table[2].count("|")


def test_step_times_of_the_table_are_of_one_process() -> None:
    times = {"all_s": [], "median_s": 0.02}
    hit = {"frozen": {**times, "median_s": 0.5}, "eager": {**times, "median_s": 0.5}}
    speed = {"frozen": times, "eager": {**times, "median_s": 0.04}}
    cells = gpu_check.table_cells({"steps_hit": hit, "steps_speed": speed, "steps_torch_compile": times})
    assert cells[7:10] == ["40 ms", "20 ms", "20 ms"]
    assert gpu_check.table_cells({"steps_hit": hit})[7:10] == ["500 ms", "500 ms", ""]


def test_failed_checks_and_skipped_stages_are_printed() -> None:
    checks = [{"name": "a", "ok": True, "detail": ""}, {"name": "b", "ok": False, "detail": "why"}]
    text = gpu_check.markdown(empty_document(checks=checks, skipped=[{"what": "sdxl", "why": "no time"}]))
    assert "1 of 2 checks ok, 12.5 s." in text
    assert "- **not ok** b: why" in text
    assert "- skipped sdxl: no time" in text
    assert "dry run" not in text


def test_no_check_at_all_is_no_success() -> None:
    results = gpu_check.Results(None, {})
    assert not results.ok
    results.check("a", True, "")
    assert results.ok
    results.check("b", False, "")
    assert not results.ok


def test_the_file_is_named_by_the_card() -> None:
    assert gpu_check.default_out("NVIDIA H100 80GB HBM3").name == "gpu-nvidia-h100-80gb-hbm3.json"
