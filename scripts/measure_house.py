#!/usr/bin/env python3
"""Print how large the package is: lines, files, the longest list of parameters, circles of imports.

The table is that of CONTRIBUTING.md. With --check the exit code is 1 if the table there is another one.
"""

from __future__ import annotations

import argparse
import ast
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "pipevault"
PAGE = ROOT / "CONTRIBUTING.md"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--check", action="store_true", help="compare with CONTRIBUTING.md")
    table = house(PACKAGE)
    print(table)
    if parser.parse_args().check and table not in PAGE.read_text("utf-8"):
        sys.exit("CONTRIBUTING.md has another table: put this one there.")


def house(package: Path) -> str:
    """Return the table for a package, in Markdown."""
    trees = {path: ast.parse(path.read_text("utf-8")) for path in sorted(package.rglob("*.py"))}
    lines = sum(len(path.read_text("utf-8").splitlines()) for path in trees)
    largest = max(trees, key=lambda path: len(path.read_text("utf-8").splitlines()))
    count, where = max(parameters(path.relative_to(package), tree) for path, tree in trees.items())
    circles = circles_of(imports(package, trees))
    rows = (
        ("lines of `src/pipevault`", f"{lines:,}"),
        ("files", str(len(trees))),
        ("longest file", f"`{largest.relative_to(package)}`, {len(largest.read_text('utf-8').splitlines())} lines"),
        ("longest list of parameters", f"{count}, {where}"),
        ("circles of imports", str(len(circles)) + "".join(f"; {' → '.join(circle)}" for circle in circles)),
    )
    return "\n".join(["| | measured |", "| --- | ---: |", *(f"| {name} | {value} |" for name, value in rows)])


def parameters(path: Path, tree: ast.Module) -> tuple[int, str]:
    """Return the most parameters that a function of the module takes, without ``self`` and ``cls``; and where."""
    found = [(0, "")]
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            given = node.args
            names = [each.arg for each in [*given.posonlyargs, *given.args, *given.kwonlyargs]]
            more = [each.arg for each in (given.vararg, given.kwarg) if each is not None]
            own = [name for name in [*names, *more] if name not in ("self", "cls")]
            found.append((len(own), f"`{node.name}` in `{path}`"))
    return max(found)


def imports(package: Path, trees: dict[Path, ast.Module]) -> dict[str, set[str]]:
    """Return, for each module, the modules of the package that it imports anywhere."""
    names = {name_of(package, path): path for path in trees}
    found: dict[str, set[str]] = {}
    for name, path in names.items():
        parent = name if path.name == "__init__.py" else name.rpartition(".")[0]
        full = set()
        for node in ast.walk(trees[path]):
            if isinstance(node, ast.Import):
                full |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                up = parent.split(".")[: len(parent.split(".")) - node.level + 1] if node.level else []
                base = ".".join([*up, *([node.module] if node.module else [])])
                full |= {f"{base}.{alias.name}" for alias in node.names}
        found[name] = {each if each in names else each.rpartition(".")[0] for each in full} & set(names)
    root = package.name
    found[root] = {each for each in found[root] if each.count(".") == 1}  # the root hands out names
    return found


def name_of(package: Path, path: Path) -> str:
    parts = path.relative_to(package.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def circles_of(graph: dict[str, set[str]]) -> list[list[str]]:
    """Return one circle for each module at which a walk closes one."""
    circles: list[list[str]] = []
    done: set[str] = set()

    def walk(name: str, way: list[str]) -> None:
        if name in way:
            circles.append([*way[way.index(name) :], name])
        elif name not in done:
            for other in sorted(graph[name]):
                walk(other, [*way, name])
            done.add(name)

    for name in sorted(graph):
        walk(name, [])
    return circles


if __name__ == "__main__":
    main()
