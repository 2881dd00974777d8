"""The command ``compare`` with runs that never take place: options, table, JSON, report, exit codes."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from helpers.command_runner import Run
from helpers.comparison_runs import FakeRuns, brighter
from pipevault.demo import DEFAULT_STEPS
from pipevault.errors import MissingExtraError, PipevaultError
from pipevault.evidence.compare import run as compare_module
from pipevault.evidence.generation_job import GenerationJob


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the comparison was asked for; ``asked["runs"]`` may be set to other runs."""
    seen: dict[str, Any] = {"runs": FakeRuns()}
    real = compare_module.compare

    def compare(job: GenerationJob, **options: Any) -> Any:
        seen.update(vars(job), **options)
        return real(job, **options, run=seen["runs"])

    monkeypatch.setattr(compare_module, "compare", compare)
    return seen


def rows(text: str) -> list[dict[str, list[str]]]:
    """The cells of each run in each table; columns are two blanks or more apart."""
    tables = [table.splitlines()[2:] for table in text.split("\n\n")]
    return [{(cells := re.split("  +", line))[0]: cells[1:] for line in lines} for lines in tables]


def test_the_table_has_a_row_for_each_run(run: Run, asked: dict[str, Any]) -> None:
    asked["runs"] = FakeRuns(brighter("torch.compile", by=6))
    result = run("compare", "./model", "--prompt", "a cat", "--prompt", "a dog")
    assert result.exit_code == 0, result.output
    distances, seconds, _ = rows(result.stdout)
    assert list(seconds)[:2] == ["eager", "eager again"]
    assert seconds["eager"] == ["0.500", "3.000", "0.250"]
    assert next(iter(distances)) == "eager again", "the first run is compared with nothing"
    assert distances["torch.compile"][:4] == ["eager", "no", "0.78%", "6"]
    assert distances["frozen again"][:3] == ["frozen", "yes", "0.00%"]
    assert "eager, other thread count (2 threads, not 1)" in seconds
    assert "equal in every process and generation" in result.stdout
    assert "frozen again: running in a fresh process" in result.stderr


def test_80_columns_hold_the_words_of_the_table(run: Run, asked: dict[str, Any]) -> None:
    asked["runs"] = FakeRuns(brighter("torch.compile", by=6))
    text = run("compare", "./model", "--prompt", "a cat", env={"COLUMNS": "80"}).stdout
    assert max(map(len, text.splitlines())) <= 80
    assert ["RUN", "WITH", "EQUAL", "PIXELS", "MAX", "MEAN", "PSNR", "SSIM", "LATENTS"] in map(
        str.split, text.splitlines()
    )
    assert re.search(r"^torch\.compile +eager +no ", text, re.MULTILINE)


def test_options_reach_the_runs(run: Run, asked: dict[str, Any], tmp_path: Path) -> None:
    result = run(
        *("compare", "./model", "--prompt", "a cat", "--seed", "9", "--size", "64x32", "--steps", "3"),
        *("--guidance-scale", "2.5", "--dtype", "bfloat16", "--device", "cpu", "--dir", tmp_path, "--timeout", "60"),
        *("--pipeline-class", "FluxPipeline", "--runs", "eager,frozen", "--runs", "batch"),
    )
    assert result.exit_code == 0, result.output
    request = asked["request"]
    assert (request.prompts, request.seed, request.steps, request.guidance_scale) == (("a cat",), 9, 3, 2.5)
    assert (request.width, request.height) == (64, 32)
    assert (asked["dtype"], asked["device"], asked["pipeline_class"]) == ("bfloat16", "cpu", "FluxPipeline")
    assert (asked["dir"], asked["timeout_s"]) == (tmp_path, 60)
    assert asked["groups"] == ("eager", "frozen", "batch")


def test_the_demo_draws_the_ten_digits(run: Run, asked: dict[str, Any]) -> None:
    assert run("compare", "demo", "--runs", "eager").exit_code == 0
    assert asked["request"].prompts[7] == "a handwritten seven"
    assert len(asked["request"].prompts) == 10
    assert asked["request"].steps == DEFAULT_STEPS


def test_the_demo_draws_what_it_is_told(run: Run, asked: dict[str, Any]) -> None:
    assert run("compare", "demo", "--runs", "eager", "--prompt", "a handwritten two").exit_code == 0
    assert asked["request"].prompts == ("a handwritten two",)


def test_torch_compile_can_be_left_out(run: Run, asked: dict[str, Any]) -> None:
    assert run("compare", "./model", "--prompt", "a cat", "--without-torch-compile").exit_code == 0
    assert "torch.compile" not in asked["runs"].jobs
    assert "frozen again" in asked["runs"].jobs


def test_json(run: Run, asked: dict[str, Any]) -> None:
    result = run("compare", "./model", "--prompt", "a cat", "--runs", "frozen", "--json")
    document = json.loads(result.stdout)
    assert (result.exit_code, document["frozen_equal"]) == (0, True)
    assert [row["run"] for row in document["runs"]] == ["eager", "frozen", "frozen again"]


@pytest.mark.parametrize("arguments", [(), ("--json",)])
def test_frozen_runs_that_differ_are_shown_and_end_with_exit_code_1(
    run: Run, asked: dict[str, Any], tmp_path: Path, arguments: tuple[str, ...]
) -> None:
    asked["runs"] = FakeRuns(brighter("frozen again"))
    report = tmp_path / "report.html"
    result = run("compare", "./model", "--prompt", "a cat", "--report", report, *arguments)
    assert result.exit_code == 1
    assert "frozen again differs from frozen" in result.stdout
    assert result.stderr.splitlines()[-1].startswith(
        "pipevault: different-output: Frozen graphs gave different pictures for seed 0"
    )
    assert "frozen again differs from frozen" in report.read_text("utf-8")


def test_the_report_says_how_to_make_it_again(
    run: Run, asked: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    report = tmp_path / "report.html"
    result = run(
        *("compare", "./model", "--prompt", "a cat", "--prompt", "two dogs", "--seed", "-1", "--runs", "eager,batch"),
        *("--without-torch-compile", "--report", report),
    )
    assert result.exit_code == 0, result.output
    seed = asked["request"].seed
    assert seed >= 0
    command = (
        f"OMP_NUM_THREADS=3 pipevault compare ./model --prompt &#39;a cat&#39; --prompt &#39;two dogs&#39; "
        f"--seed {seed} --runs eager,batch --without-torch-compile --report {report}"
    )
    assert f"<code>{command}</code>" in report.read_text("utf-8")
    assert str(report) in result.stdout


def test_a_run_that_fails_is_one_line(run: Run, asked: dict[str, Any]) -> None:
    def failing(label: str) -> dict[str, Any]:
        raise PipevaultError(f"{label} failed: its process was killed by SIGKILL.\nIt printed nothing.")

    asked["runs"] = FakeRuns(say=failing)
    result = run("compare", "./model", "--prompt", "a cat")
    assert result.exit_code == 4
    assert result.stderr.splitlines()[-1] == (
        "pipevault: failed: eager failed: its process was killed by SIGKILL. It printed nothing."
    )


@pytest.mark.parametrize(
    ("arguments", "code", "named"),
    [
        (("--size", "big"), 2, "Invalid size 'big'"),
        (("--seed", "-2"), 2, "-2"),
        (("--seed", "x"), 2, "--seed"),
        (("--steps", "0"), 2, "--steps"),
        (("--timeout", "0"), 2, "--timeout"),
        (("--runs", "eager,fast"), 2, "'fast'"),
        (("--runs", ""), 2, "''"),
        (("--report", "none/report.html"), 2, "none/report.html"),
        (("--report", "."), 2, "--report"),
    ],
)
def test_what_cannot_be_used_is_refused_before_the_first_run(
    run: Run, asked: dict[str, Any], arguments: tuple[str, ...], code: int, named: str
) -> None:
    result = run("compare", "./model", "--prompt", "a cat", *arguments)
    assert result.exit_code == code
    assert named in result.stderr
    assert asked["runs"].jobs == {}


def test_a_missing_extra_is_said_before_the_first_run(
    run: Run, asked: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def render_page(template: str, content: Any) -> str:
        raise MissingExtraError('Install the extra "report"', "report")

    monkeypatch.setattr("pipevault.report.page.render_page", render_page)
    result = run("compare", "./model", "--prompt", "a cat", "--report", tmp_path / "report.html")
    assert result.exit_code == 4
    assert asked["runs"].jobs == {}


def test_help_has_examples(run: Run) -> None:
    result = run("compare", "--help")
    assert result.exit_code == 0
    assert "  pipevault compare demo --report compare.html" in result.stdout
