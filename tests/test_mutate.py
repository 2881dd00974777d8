"""The sampler of mutants: what it changes, and that a test which fails counts as a kill."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))
import mutate


@pytest.mark.parametrize("module", mutate.modules(""))
def test_mutants_are_other_code_that_can_be_read(module: str, tmp_path: Path) -> None:
    original = (mutate.SOURCE / "pipevault" / f"{module}.py").read_text("utf-8")
    tree = ast.dump(ast.parse(original))
    copy = tmp_path / "pipevault" / f"{module}.py"
    copy.parent.mkdir(parents=True)
    for mutant in mutate.mutants(module)[::10]:
        copy.write_text(original, "utf-8")
        mutant.apply(tmp_path)
        assert ast.dump(ast.parse(copy.read_text("utf-8"))) != tree, mutant


@pytest.mark.parametrize("module", mutate.modules(""))
def test_the_tests_that_fit_exist(module: str) -> None:
    assert mutate.fitting(module)
    assert [name for name in mutate.fitting(module) if not (mutate.ROOT / name).is_file()] == []


def changed(code: str) -> list[str]:
    return [text for node in ast.walk(ast.parse(code)) for _, text in mutate.changes(node)]


@pytest.mark.parametrize(
    ("code", "text"),
    [
        ("a == b", "(a != b)"),
        ("a and b", "(a or b)"),
        ("not a", "bool(a)"),
        ("x if f(a) else y", "(not f(a))"),
        ("x = True", "False"),
        ("x = 3", "4"),
        ("do(a)", "pass"),
    ],
)
def test_changes(code: str, text: str) -> None:
    assert changed(code) == [text]


@pytest.mark.parametrize(("check", "result"), [("== 1", "survived"), ("== 2", "killed by test_it.py::test_it")])
def test_a_failure_is_a_kill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, check: str, result: str) -> None:
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "mutated_module.py").write_text("x = 1\n")
    (tmp_path / "test_it.py").write_text(f"import mutated_module\n\ndef test_it(): assert mutated_module.x {check}\n")
    monkeypatch.setattr(mutate, "ROOT", tmp_path)
    assert mutate.run(("test_it.py",), tmp_path / "src") == result
