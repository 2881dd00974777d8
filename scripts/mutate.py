#!/usr/bin/env python3
"""Break the code in one place at a time and see whether a test notices.

Run: ``.venv/bin/python scripts/mutate.py --count 20``. It draws mutants from the load path, the runtime and replay,
runs the test files that fit the module against a copy of the source, stops at the first failure, and prints which
mutants were killed and which survived. ``--seed`` draws others, ``--file`` stays within modules whose path contains a
word, ``--list`` runs nothing. The exit code is 1 if fewer than 85 % were killed.
"""

from __future__ import annotations

import argparse
import ast
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "src"
WANTED = 0.85
TIMEOUT_S = 1200

LOADS = ("tests/cache/test_cache.py", "tests/cache/test_promises.py", "tests/cache/test_load_from_tiers.py")
CALLS = ("tests/runtime/test_generation.py", "tests/runtime/test_threads.py", "tests/evidence/test_replay.py")
RECORDS = ("tests/runtime/test_record.py", "tests/runtime/test_records.py", "tests/evidence/test_replay.py")
ONEDIFF = ("tests/cache/test_oneflow_backend.py",)
FITTING: dict[str, tuple[str, ...]] = {
    "cache": LOADS,
    "cache/background": ("tests/cache/test_promises.py", *LOADS),
    "cache/builders": ("tests/cache/test_builders.py", *LOADS),
    "cache/capture": ("tests/cache/test_capture.py", "tests/cache/test_ranges.py", *LOADS),
    "cache/generation_hook": CALLS,
    "cache/guard": (*CALLS, "tests/cache/test_promises.py", "tests/cache/test_stable_diffusion.py"),
    "cache/keys": ("tests/cache/test_keys.py", "tests/cache/test_explain_miss.py", *LOADS),
    "cache/loaded": (*LOADS, *CALLS),
    "cache/onediff_backends": ONEDIFF,
    "cache/onediff_load": ONEDIFF,
    "cache/outcome": (*LOADS, "tests/cli/test_cli_prewarm.py", "tests/cli/test_cli_render.py"),
    "cache/regions": ("tests/cache/test_regions.py",),
    "cache/rehearsal": ("tests/cache/test_rehearsal.py", *LOADS, "tests/cache/test_stable_diffusion.py"),
    "cache/search": ("tests/cache/test_explain_miss.py", "tests/store/test_golden_vault.py", *LOADS),
    "cache/turn": ("tests/runtime/test_threads.py", *LOADS),
    "runtime": CALLS,
    "runtime/by_hand": ("tests/runtime/test_by_hand.py", *CALLS),
    "runtime/drawing": ("tests/runtime/test_drop_in_noise.py", *CALLS),
    "runtime/joined_outputs": ("tests/runtime/test_joined_outputs.py", *CALLS),
    "runtime/record": RECORDS,
    "runtime/record_schema": RECORDS,
    "runtime/recorded_weights": ("tests/runtime/test_recorded_weights.py", *RECORDS),
    "runtime/records": RECORDS,
    "evidence/replay": ("tests/evidence/test_replay.py", "tests/evidence/test_replay_fuzz.py"),
}
"""The test files of a module, quick ones first; those of its package where it has none of its own."""

OPPOSITE: dict[type[ast.cmpop], type[ast.cmpop]] = {
    **{ast.Eq: ast.NotEq, ast.Lt: ast.GtE, ast.Gt: ast.LtE, ast.Is: ast.IsNot, ast.In: ast.NotIn},
    **{ast.NotEq: ast.Eq, ast.GtE: ast.Lt, ast.LtE: ast.Gt, ast.IsNot: ast.Is, ast.NotIn: ast.In},
}


@dataclass(frozen=True)
class Mutant:
    """One change: the characters ``start`` to ``end`` of a file become ``text``."""

    module: str
    line: int
    start: int
    end: int
    before: str
    text: str

    def __str__(self) -> str:
        return f"{self.module}.py:{self.line}: `{' '.join(self.before.split())}` → `{' '.join(self.text.split())}`"

    def apply(self, source: Path) -> None:
        path = source / "pipevault" / f"{self.module}.py"
        data = path.read_bytes()
        path.write_bytes(data[: self.start] + self.text.encode() + data[self.end :])


def changes(node: ast.AST) -> Iterator[tuple[ast.AST, str]]:
    """Yield what can be changed at a node, and the text that takes its place."""
    match node:
        case ast.Compare(ops=[operator]) if type(operator) in OPPOSITE:
            flipped = ast.Compare(node.left, [OPPOSITE[type(operator)]()], node.comparators)
            yield node, f"({ast.unparse(flipped)})"
        case ast.BoolOp(op=operator, values=values):
            other = ast.Or() if isinstance(operator, ast.And) else ast.And()
            yield node, f"({ast.unparse(ast.BoolOp(other, values))})"
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            yield node, f"bool({ast.unparse(operand)})"
        case ast.If(test=test) | ast.IfExp(test=test) if not isinstance(test, (ast.Compare, ast.BoolOp, ast.UnaryOp)):
            yield test, f"(not {ast.unparse(test)})"
        case ast.Constant(value=bool() as value):
            yield node, repr(not value)
        case ast.Constant(value=int() as value):
            yield node, repr(value + 1)
        case ast.Return(value=ast.expr() as value) if not isinstance(value, ast.Constant):
            yield value, "None"
        case ast.Expr(value=ast.Call()) | ast.AugAssign() | ast.Raise():
            yield node, "pass"


def mutants(module: str) -> list[Mutant]:
    """Return every mutant of a module. Annotations, imports for types and log lines are left alone."""
    source = (SOURCE / "pipevault" / f"{module}.py").read_bytes()
    starts = [0]
    for line in source.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    found = []

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            return
        if isinstance(node, ast.Expr) and ast.unparse(node).startswith("logger."):
            return
        if isinstance(node, ast.AnnAssign):
            if node.value is not None:
                visit(node.value)
            return
        for place, text in changes(node):
            assert isinstance(place, (ast.expr, ast.stmt))
            assert place.end_lineno is not None
            assert place.end_col_offset is not None
            start, end = (
                starts[place.lineno - 1] + place.col_offset,
                starts[place.end_lineno - 1] + place.end_col_offset,
            )
            found.append(Mutant(module, place.lineno, start, end, source[start:end].decode(), text))
        for name, value in ast.iter_fields(node):
            if name in ("annotation", "returns", "decorator_list", "bases"):
                continue
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST):
                    visit(child)

    visit(ast.parse(source))
    return found


def modules(word: str) -> list[str]:
    folder = SOURCE / "pipevault"
    paths = [
        path for room in ("cache/*.py", "runtime/*.py", "evidence/replay*.py") for path in sorted(folder.glob(room))
    ]
    return [name for path in paths if word in (name := str(path.relative_to(folder).with_suffix("")))]


def fitting(module: str) -> tuple[str, ...]:
    """Return the test files of a module without repetition."""
    room = "evidence/replay" if module.startswith("evidence/") else module.split("/")[0]
    return tuple(dict.fromkeys(FITTING.get(module, FITTING[room])))


def run(tests: tuple[str, ...], source: Path) -> str:
    """Return ``"survived"``, or how the tests noticed: a failure, or that they did not end."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(source)}
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired:
        return "killed (time)"
    if done.returncode == 0:
        return "survived"
    failed = [line.split(" ")[1] for line in done.stdout.splitlines() if line.startswith(("FAILED ", "ERROR "))]
    return f"killed by {failed[0] if failed else 'an error at the start'}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--file", default="", help="only modules whose path contains this")
    parser.add_argument("--list", action="store_true", help="print the drawn mutants and run nothing")
    arguments = parser.parse_args()
    every = [mutant for module in modules(arguments.file) for mutant in mutants(module)]
    drawn = random.Random(arguments.seed).sample(every, min(arguments.count, len(every)))
    print(f"{len(drawn)} of {len(every)} mutants, seed {arguments.seed}", flush=True)
    killed = 0
    for mutant in drawn:
        if arguments.list:
            print(mutant)
            continue
        started_s = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="mutant-") as folder:
            source = Path(folder, "src")
            shutil.copytree(SOURCE, source, ignore=shutil.ignore_patterns("__pycache__"))
            mutant.apply(source)
            result = run(fitting(mutant.module), source)
        killed += result != "survived"
        print(f"{mutant}: {result}, {time.monotonic() - started_s:.0f} s", flush=True)
    if arguments.list:
        return 0
    print(f"{killed} of {len(drawn)} killed")
    return int(killed < WANTED * len(drawn))


if __name__ == "__main__":
    raise SystemExit(main())
