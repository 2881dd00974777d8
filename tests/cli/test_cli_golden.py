"""``golden record`` and ``golden check``: options, table, JSON, exit codes. What is drawn comes from a stand-in."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest

from helpers.command_runner import Run
from helpers.golden_runs import MACHINE, OTHER_KEY, a_run, brighter, picture
from pipevault.errors import BadCallError
from pipevault.evidence.golden import run as golden
from pipevault.evidence.golden.drawn import Drawn
from pipevault.evidence.golden.drift import tolerance_of
from pipevault.evidence.golden.suite_file import Case, Suite

SUITE = """pipevault_suite = 1
model = "demo"
[[case]]
name = "seven"
seed = 7
[[case]]
name = "two"
seed = 2
"""


class Painter(golden.SuiteRunner):
    """Draws from a table, by default one picture for each seed."""

    machine_here: Mapping[str, Any] = MACHINE
    drawn: ClassVar[dict[str, Any]] = {}
    used: ClassVar[dict[str, Any]] = {}

    def __init__(self, suite: Suite, **options: Any) -> None:
        self.suite = suite
        type(self).used = options

    def machine(self) -> dict[str, Any]:
        return dict(self.machine_here)

    def draw(self, case: Case) -> Drawn:
        found = self.drawn.get(case.name)
        if isinstance(found, Exception):
            raise found
        drawn = found or picture(case.request.seed)
        return a_run(
            drawn, machine=dict(self.machine_here), key=OTHER_KEY if self.machine_here != MACHINE else "a" * 64
        )


@pytest.fixture
def painter(monkeypatch: pytest.MonkeyPatch) -> type[Painter]:
    for name, value in (("machine_here", MACHINE), ("drawn", {}), ("used", {})):
        monkeypatch.setattr(Painter, name, value)
    monkeypatch.setattr(golden, "SuiteRunner", Painter)
    return Painter


@pytest.fixture
def suite(tmp_path: Path, painter: type[Painter]) -> Path:
    path = tmp_path / "digits.toml"
    path.write_text(SUITE)
    return path


@pytest.fixture
def recorded(suite: Path, run: Run) -> Path:
    assert run("golden", "record", suite).exit_code == 0
    return suite


def rows(text: str) -> list[list[str]]:
    return [line.split() for line in text.splitlines()[2:]]


@pytest.mark.parametrize("command", ["record", "check"])
def test_help_has_examples(run: Run, command: str) -> None:
    result = run("golden", command, "--help")
    assert result.exit_code == 0
    assert f"  pipevault golden {command} digits.toml" in result.stdout
    assert "--json" in result.stdout


def test_recorded_and_checked(run: Run, suite: Path) -> None:
    result = run("golden", "record", suite)
    assert result.exit_code == 0, result.output
    assert [row[:5] for row in rows(result.stdout)] == [
        ["seven", "cpu-avx512-1t-" + row_type(suite), "aaaaaaaaaaaa", "1", "none"],
        ["two", "cpu-avx512-1t-" + row_type(suite), "aaaaaaaaaaaa", "1", "none"],
    ]
    result = run("golden", "check", suite)
    assert result.exit_code == 0
    assert rows(result.stdout) == [["seven", "equal"], ["two", "equal"]]
    assert result.stderr == ""


def row_type(suite: Path) -> str:
    [folder] = suite.with_suffix(".goldens").iterdir()
    return folder.name.rpartition("-")[2]


def test_options_reach_the_cache(run: Run, suite: Path, painter: type[Painter], tmp_path: Path) -> None:
    run("golden", "record", suite, "--dir", tmp_path / "vault", "--mode", "require", "--case", "two")
    assert (painter.used["dir"], painter.used["mode"]) == (tmp_path / "vault", "require")
    assert not list(suite.with_suffix(".goldens").glob("*/seven"))


def test_a_different_output_is_exit_code_1_with_pictures(run: Run, recorded: Path, painter: type[Painter]) -> None:
    painter.drawn["seven"] = brighter(picture(7), 3)
    result = run("golden", "check", recorded)
    assert result.exit_code == 1
    assert rows(result.stdout) == [["seven", "failed", "different-output"], ["two", "equal"]]
    folder = recorded.with_suffix(".failures") / "seven"
    assert result.stderr.count("\n") == 1
    assert str(folder) in result.stderr
    assert (folder / "difference.png").is_file()


def test_out_says_where_the_pictures_go(run: Run, recorded: Path, painter: type[Painter], tmp_path: Path) -> None:
    painter.drawn["two"] = brighter(picture(2), 3)
    assert run("golden", "check", recorded, "--out", tmp_path / "out").exit_code == 1
    assert (tmp_path / "out" / "two" / "actual.png").is_file()
    assert not recorded.with_suffix(".failures").exists()


def test_all_cases_are_checked_and_the_first_failure_decides(run: Run, recorded: Path, painter: type[Painter]) -> None:
    painter.drawn.update(seven=BadCallError("no such size"), two=brighter(picture(2), 3))
    result = run("golden", "check", recorded, "--json")
    assert result.exit_code == 2
    document = json.loads(result.stdout)
    assert [(case["case"], case["code"]) for case in document["cases"]] == [
        ("seven", "bad-call"),
        ("two", "different-output"),
    ]
    assert document["code"] == "bad-call"
    assert len(result.stderr.splitlines()) == 2


def test_nothing_recorded_is_exit_code_1(run: Run, suite: Path) -> None:
    result = run("golden", "check", suite)
    assert result.exit_code == 1
    assert "pipevault golden record" in result.stderr


def test_recording_anew_must_be_asked_for(run: Run, recorded: Path) -> None:
    result = run("golden", "record", recorded)
    assert result.exit_code == 2
    assert "--overwrite" in result.stderr
    assert run("golden", "record", recorded, "--overwrite").exit_code == 0


class TestOtherMachine:
    @pytest.fixture
    def elsewhere(self, run: Run, suite: Path, painter: type[Painter], monkeypatch: pytest.MonkeyPatch) -> Path:
        """A suite with goldens of one thread and their tolerance; this machine has two."""
        tolerance = tolerance_of({})
        monkeypatch.setattr(golden, "measure_tolerances", lambda _, drawn: dict.fromkeys(drawn, tolerance))
        suite.write_text(SUITE.replace("[[case]]", "tolerance = { pixels_max_abs = 3 }\n[[case]]", 1))
        assert run("golden", "record", suite, "--measure-tolerance").exit_code == 0
        painter.machine_here = {**MACHINE, "threads": 2}
        painter.drawn["seven"] = brighter(picture(7), 3)
        return suite

    def test_is_exit_code_4(self, run: Run, elsewhere: Path) -> None:
        result = run("golden", "check", elsewhere)
        assert result.exit_code == 4
        assert "machine.threads: 1 in the golden, 2 here" in result.stderr

    def test_passes_within_the_tolerance_if_asked(self, run: Run, elsewhere: Path) -> None:
        result = run("golden", "check", elsewhere, "--other-machine", "--json")
        assert result.exit_code == 0, result.output
        seven, two = json.loads(result.stdout)["cases"]
        assert (seven["result"], two["result"]) == ("within tolerance", "equal")
        assert seven["pixels"]["max_abs"] == 3

    def test_fails_beyond_it(self, run: Run, elsewhere: Path, painter: type[Painter]) -> None:
        painter.drawn["seven"] = brighter(picture(7), 4)
        assert run("golden", "check", elsewhere, "--other-machine").exit_code == 1

    def test_the_suite_may_allow_it(self, run: Run, elsewhere: Path) -> None:
        elsewhere.write_text(elsewhere.read_text().replace("tolerance", "other_machine = true\ntolerance", 1))
        assert run("golden", "check", elsewhere).exit_code == 0


def test_a_picture_that_was_repainted_is_exit_code_3(run: Run, recorded: Path) -> None:
    [file] = recorded.with_suffix(".goldens").glob("*/seven/0.png")
    brighter(picture(7), 9).save(file)
    result = run("golden", "check", recorded)
    assert result.exit_code == 3
    assert "0.png" in result.stderr


@pytest.mark.parametrize("command", ["record", "check"])
class TestBadInput:
    def test_a_suite_with_a_wrong_field(self, run: Run, suite: Path, command: str) -> None:
        suite.write_text(SUITE.replace("seed = 2", "seed = 'two'"))
        result = run("golden", command, suite)
        assert result.exit_code == 2
        assert "case[1].seed" in result.stderr

    def test_a_path_that_is_no_file(self, run: Run, tmp_path: Path, command: str) -> None:
        result = run("golden", command, tmp_path / "none.toml")
        assert result.exit_code == 2
        assert "none.toml" in result.stderr

    def test_a_case_that_there_is_not(self, run: Run, suite: Path, command: str) -> None:
        result = run("golden", command, suite, "--case", "nine")
        assert result.exit_code == 2
        assert "seven, two" in result.stderr
