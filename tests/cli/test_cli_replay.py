"""``pipevault replay``: exit codes, and the names of what ``--save`` writes. Nothing is drawn."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from helpers.command_runner import Run
from helpers.golden_runs import a_run, picture
from pipevault.cli import replay as replay_command
from pipevault.errors import OtherMachineError, PipevaultError, RecordDigestError
from pipevault.evidence.replay import Divergence, Replay
from pipevault.runtime.records import attach_record

PICTURES = [picture(seed) for seed in range(3)]
RECORD = a_run(*PICTURES).record
DIFFERENT = replace(RECORD, results={**RECORD.results, "noise": "0" * 64})


def results(monkeypatch: pytest.MonkeyPatch, **of_file: Replay | PipevaultError) -> None:
    monkeypatch.setattr(replay_command, "_replayed", lambda files, *_: [(file, of_file[file.stem]) for file in files])


def test_the_exit_code_is_that_of_the_first_failure(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    results(
        monkeypatch,
        equal=Replay(RECORD, RECORD, (), None),
        other=Replay(RECORD, DIFFERENT, (Divergence("noise", "another"),), None),
        edited=RecordDigestError("It was changed."),
        machine=OtherMachineError("It is another."),
    )
    for files, code, word in (
        (["equal", "equal"], 0, None),
        (["equal", "other", "edited"], 1, "different-output"),
        (["edited", "other"], 3, "changed-record"),
        (["machine", "edited"], 4, "other-machine"),
    ):
        result = run("replay", *files, "--json")
        assert (result.exit_code, json.loads(result.stdout)["code"]) == (code, word), files


def test_an_edited_record_and_a_model_that_is_not_there(run: Run, tmp_path: Path) -> None:
    edited, whole = tmp_path / "edited.json", tmp_path / "whole.json"
    whole.write_text(RECORD.to_json())
    edited.write_text(RECORD.to_json().replace("a cat", "a dog"))
    assert run("replay", edited, "--model", "./nosuch").exit_code == 3
    assert run("replay", whole, "--model", "./nosuch").exit_code == 2


@pytest.mark.parametrize(("number", "names"), [(1, ["again.png"]), (None, [f"again-{n}.png" for n in range(3)])])
def test_one_sample_is_saved_under_its_very_name(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int | None, names: list[str]
) -> None:
    output = attach_record(SimpleNamespace(images=list(PICTURES)), RECORD, {})
    results(monkeypatch, one=Replay(replace(RECORD, sample=number), RECORD, (), output))
    result = run("replay", "one", "--save", tmp_path / "again.png")
    assert result.exit_code == 0, result.output
    assert sorted(path.name for path in tmp_path.glob("*.png")) == names
    assert [name for name in names if str(tmp_path / name) not in result.stderr] == []
    with Image.open(tmp_path / names[-1]) as image:
        assert image.tobytes() == PICTURES[1 if number else 2].tobytes()


def test_an_input_that_is_not_there(run: Run) -> None:
    result = run("replay", "one", "--input", "image=absent.png")
    assert (result.exit_code, "absent.png does not exist" in result.stderr) == (2, True)
