"""What the pages promise: a short README, every command, setting and piece of state, and examples that parse."""

from __future__ import annotations

import ast
import importlib.util
import re
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import click
import pytest

import pipevault
from pipevault.cli.app import app
from pipevault.settings import Settings

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PACKAGE = Path(pipevault.__file__).parent
_MAKERS = {"dict", "list", "set", "WeakSet", "WeakKeyDictionary", "Lock", "RLock", "ContextVar", "local"}


def page(name: str) -> str:
    return (ROOT / name).read_text("utf-8")


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_bytes()) <= 6144


def test_every_page_is_reached_from_the_readme_or_the_navigation() -> None:
    navigation = page("mkdocs.yml")
    assert [path.name for path in DOCS.rglob("*.md") if str(path.relative_to(DOCS)) not in navigation] == []


def test_every_command_is_in_the_reference() -> None:
    text = page("docs/reference/commands.md")
    names = app.list_commands(click.Context(app))
    assert len(names) > 20
    assert [name for name in names if not re.search(rf"`{name}\b", text)] == []


def test_every_setting_is_in_the_reference() -> None:
    text = page("docs/reference/settings.md")
    assert [field.name for field in fields(Settings) if f"`{field.name}`" not in text] == []


@pytest.mark.parametrize("path", [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))], ids=lambda path: path.stem)
def test_python_in_the_pages_is_valid(path: Path) -> None:
    for code in re.findall(r"^ *```python\n(.*?)^ *```", path.read_text("utf-8"), re.DOTALL | re.MULTILINE):
        if not code.startswith("--8<--"):
            ast.parse(code)


def process_state(path: Path) -> Iterator[str]:
    """Yield the names in a module that hold a collection which changes, a lock, or a value of a thread or context."""
    tree = ast.parse(path.read_text("utf-8"))
    local = {node.name for node in tree.body if isinstance(node, ast.ClassDef) and _is_state(node)}
    rebound = {name for node in ast.walk(tree) if isinstance(node, ast.Global) for name in node.names}
    for node in tree.body:
        if not isinstance(node, ast.Assign | ast.AnnAssign) or node.value is None:
            continue
        target = node.targets[0] if isinstance(node, ast.Assign) else node.target
        if isinstance(target, ast.Name) and (target.id in rebound or _makes_state(node.value, _MAKERS | local)):
            yield target.id


def _is_state(node: ast.ClassDef) -> bool:
    """Return whether an instance that is made without arguments keeps something."""
    methods = {child.name for child in node.body if isinstance(child, ast.FunctionDef)}
    return "threading.local" in {ast.unparse(base) for base in node.bases} or "__init__" in methods


def _makes_state(value: ast.expr, makers: set[str]) -> bool:
    if isinstance(value, ast.Dict | ast.List | ast.Set):
        return not (value.values if isinstance(value, ast.Dict) else value.elts)
    return isinstance(value, ast.Call) and ast.unparse(value.func).rpartition(".")[2] in makers


def test_every_piece_of_state_of_the_process_has_its_owner() -> None:
    text = page("docs/state.md")
    found = [(path, name) for path in sorted(PACKAGE.rglob("*.py")) for name in process_state(path)]
    assert len(found) > 15
    assert [f"{path.relative_to(PACKAGE)}: {name}" for path, name in found if f"`{name}`" not in text] == []


def test_every_file_that_the_page_of_state_names_is_there() -> None:
    named = set(re.findall(r"`([a-z_]+/[a-z_/]+\.py)`", page("docs/state.md")))
    assert [name for name in sorted(named) if not (PACKAGE / name).is_file()] == []


def test_state_is_noticed(tmp_path: Path) -> None:
    module = tmp_path / "module.py"
    module.write_text(
        "A = {}\nB: dict[str, int] = {}\nC = (1, 2)\nD = {'a': 1}\nE = threading.Lock()\nF = None\n\n"
        "class G(threading.local):\n    x = 1\n\nH = G()\n\ndef f():\n    global F\n    F = 1\n"
    )
    assert list(process_state(module)) == ["A", "B", "E", "F", "H"]


def house() -> object:
    spec = importlib.util.spec_from_file_location("measure_house", ROOT / "scripts" / "measure_house.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["measure_house"] = module
    spec.loader.exec_module(module)
    return module


def test_the_measure_of_the_house(tmp_path: Path) -> None:
    package = tmp_path / "small"
    (package / "inner").mkdir(parents=True)
    (package / "__init__.py").write_text("from small.one import f\n")
    (package / "one.py").write_text("from small import inner\n\n\ndef f(a, /, b, *c, d=1, **e): ...\n")
    (package / "inner" / "__init__.py").write_text("from . import two\n")
    (package / "inner" / "two.py").write_text("def g():\n    from small.one import f\n")
    rows = dict(re.findall(r"^\| ([^|]+?) \| (.+) \|$", house().house(package), re.MULTILINE))  # type: ignore[attr-defined]
    assert (rows["lines of `src/pipevault`"], rows["files"]) == ("8", "4")
    assert rows["longest list of parameters"] == "5, `f` in `one.py`"
    assert rows["circles of imports"] == "1; small.one → small.inner → small.inner.two → small.one"


def test_the_contributing_page_has_the_measures() -> None:
    text = page("CONTRIBUTING.md")
    wanted = re.findall(r"^\| ([a-z][^|]+?) \|", house().house(PACKAGE), re.MULTILINE)  # type: ignore[attr-defined]
    assert len(wanted) == 5
    assert [row for row in wanted if f"| {row} |" not in text] == []
