"""Imports run one way and in no circle: cli, evidence, runtime, cache, calls, { graphs, store, … }, { compat, … } …"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import pipevault

PACKAGE = Path(pipevault.__file__).resolve().parent

LAYERS = (
    frozenset({"__main__"}),
    frozenset({"cli", "pytest_plugin"}),
    frozenset({"__init__"}),  # hands out the public names
    frozenset({"evidence"}),
    frozenset({"runtime"}),
    frozenset({"cache"}),
    frozenset({"calls"}),
    frozenset({"fingerprint", "store", "graphs", "determinism", "opening", "report"}),
    frozenset({"compat", "files"}),
    frozenset({"key", "settings"}),
    frozenset({"digest"}),
    frozenset({"reading"}),
    frozenset({"errors", "pipeline"}),
)
"""Top to bottom. A layer imports only what stands below it; its members never import one another."""

OPEN_TO_ALL = frozenset({"demo"})
"""Imports nothing of the package but itself."""

WITHOUT_TORCH = frozenset(
    {
        "store",
        "cli",
        "opening",
        "report",
        "pytest_plugin",
        "compat",
        "files",
        "settings",
        "key",
        "digest",
        "reading",
        "errors",
        "pipeline",
        "__init__",
        "__main__",
    }
)
HEAVY = frozenset({"torch", "diffusers", "transformers", "onediff", "onediffx", "numpy"})
MAY_IMPORT_HEAVY = frozenset(
    {
        "fingerprint",
        "graphs",
        "determinism",
        "cache",
        "evidence",
        "calls",
        "runtime",
        "opening",
        "report",
        "cli",
        "compat",
        "demo",
    }
)


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def unit_of(path: Path) -> str:
    first = path.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py")


def imports(tree: ast.AST, package: tuple[str, ...]) -> Iterator[str]:
    """Full dotted names of what is imported, relative ones resolved against ``package``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{module}.{alias.name}" for alias in node.names)


def package_of(path: Path) -> tuple[str, ...]:
    return ("pipevault", *path.relative_to(PACKAGE).parts[:-1])


def unit_imported(name: str) -> str | None:
    """The top-level module or package of pipevault that ``name`` is in; ``None`` for other packages."""
    first, *rest = name.split(".")
    if first != "pipevault":
        return None
    known = {unit_of(path) for path in modules()}
    return rest[0] if rest and rest[0] in known else "__init__"


def layer_of(unit: str) -> int:
    return next(index for index, layer in enumerate(LAYERS) if unit in layer)


def offence(importer: str, imported: str) -> str | None:
    """Why ``importer`` must not import ``imported``; ``None`` if it may."""
    if importer == imported or imported in OPEN_TO_ALL:
        return None
    if importer in OPEN_TO_ALL:
        return f"{importer} stands alone and imports {imported}"
    if imported == "__init__" and layer_of(importer) > layer_of("__init__"):
        return f"{importer} imports a name from the package's root, which imports it"
    if layer_of(imported) > layer_of(importer):
        return None
    return f"{importer} imports {imported}, which does not stand below it"


def outside_functions(tree: ast.Module) -> ast.Module:
    """``tree`` without function bodies and ``if TYPE_CHECKING``: what runs when the module is imported."""

    class Remover(ast.NodeTransformer):
        def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
            return None

        def visit_AsyncFunctionDef(self, node: ast.AsyncFunctionDef) -> None:
            return None

        def visit_If(self, node: ast.If) -> ast.AST | list[ast.stmt]:
            if isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
                return [kept for statement in node.orelse if (kept := self.visit(statement)) is not None]
            return self.generic_visit(node)

    return Remover().visit(tree)


def name_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(("pipevault", *(parts[:-1] if parts[-1] == "__init__" else parts)))


def graph_of_imports() -> dict[str, set[str]]:
    """By module, the modules that it imports anywhere, type hints and the bodies of functions too."""
    names = {name_of(path) for path in modules()}
    found = {}
    for path in modules():
        full = set(imports(ast.parse(path.read_text("utf-8")), package_of(path)))
        found[name_of(path)] = {name if name in names else name.rpartition(".")[0] for name in full} & names
    return found


def circle(graph: dict[str, set[str]]) -> list[str]:
    """A circle of imports, or nothing."""
    done: set[str] = set()

    def walk(name: str, way: list[str]) -> list[str]:
        if name in way:
            return [*way[way.index(name) :], name]
        if name in done:
            return []
        for other in sorted(graph[name]):
            if found := walk(other, [*way, name]):
                return found
        done.add(name)
        return []

    return next((found for name in sorted(graph) if (found := walk(name, []))), [])


def test_no_module_imports_itself_by_way_of_others() -> None:
    graph = graph_of_imports()
    graph["pipevault"] -= {name for name in graph if name.count(".") > 1}  # the root hands names out
    assert circle(graph) == []


def test_a_circle_is_noticed() -> None:
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


def test_every_module_has_a_layer() -> None:
    known = set().union(*LAYERS) | OPEN_TO_ALL
    assert {unit_of(path) for path in modules()} <= known


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_run_downwards(path: Path) -> None:
    tree = ast.parse(path.read_text("utf-8"))
    units = {unit_imported(name) for name in imports(tree, package_of(path))}
    offences = [offence(unit_of(path), unit) for unit in units if unit is not None]
    assert [text for text in offences if text] == []


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_heavy_packages_are_imported_only_where_they_may_be(path: Path) -> None:
    tree = ast.parse(path.read_text("utf-8"))
    if unit_of(path) in WITHOUT_TORCH:
        at_import = outside_functions(ast.parse(path.read_text("utf-8")))
        assert {name.split(".")[0] for name in imports(at_import, package_of(path))} & HEAVY == set()
    if unit_of(path) not in MAY_IMPORT_HEAVY:
        type_hints_aside = {name.split(".")[0] for name in imports(tree, package_of(path))}
        assert type_hints_aside & HEAVY == set()


@pytest.mark.parametrize(
    "module", ["pipevault", "pipevault.cli.app", "pipevault.store.vault", "pipevault.settings", "pipevault.key"]
)
def test_importing_it_loads_no_torch(module: str) -> None:
    code = f"import sys, {module}; print(sorted({set(HEAVY)!r} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("importer", "imported"),
    [
        ("store", "graphs"),
        ("graphs", "store"),
        ("compat", "fingerprint"),
        ("store", "cache"),
        ("cache", "runtime"),
        ("runtime", "evidence"),
        ("evidence", "cli"),
        ("key", "settings"),
        ("errors", "digest"),
        ("digest", "key"),
        ("demo", "store"),
        ("store", "__init__"),
    ],
)
def test_an_arrow_that_runs_back_is_noticed(importer: str, imported: str) -> None:
    assert offence(importer, imported) is not None


@pytest.mark.parametrize(
    ("importer", "imported"),
    [("cli", "evidence"), ("cli", "__init__"), ("cli", "demo"), ("cache", "store"), ("store", "errors")],
)
def test_an_arrow_that_runs_down_is_allowed(importer: str, imported: str) -> None:
    assert offence(importer, imported) is None


def test_an_import_inside_a_function_does_not_run_at_import() -> None:
    source = "def f():\n    import torch\nif TYPE_CHECKING:\n    import torch\nelse:\n    import json\nimport os\n"
    assert sorted(imports(outside_functions(ast.parse(source)), ("pipevault",))) == ["json", "os"]


def test_relative_imports_are_resolved() -> None:
    tree = ast.parse("from ..graphs import part\nfrom . import layout\n")
    assert sorted(imports(tree, ("pipevault", "store"))) == ["pipevault.graphs.part", "pipevault.store.layout"]
