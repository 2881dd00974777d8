#!/usr/bin/env python3
"""Put "same seed, same bits" under load: a server and its clients, threads, costs, hostile records.

Run: ``.venv/bin/python scripts/stress_seeds.py``; ``--quick`` compiles nothing and takes about a minute. The whole
takes half an hour on two cores, a third of it compiling unless ``--dir`` has the graphs. Prints a Markdown table, or
JSON with ``--json``. Times are only printed; the exit code is 1 if a promise was broken: other bytes, a missing record,
an error, a stream or a switch that was moved.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # a factor of the key, so for every process and before torch is imported
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from figures import Figure, markdown
from stress_costs import measure_costs, measure_two_threads
from stress_server import Load, measure_server

FUZZ = Path(__file__).resolve().parents[1] / "tests" / "evidence" / "test_replay_fuzz.py"


@dataclass(frozen=True)
class Amounts:
    """How much is done. ``frozen``: whether graphs are compiled and used."""

    frozen: bool
    load: Load
    calls: int
    rounds: int
    examples: int


QUICK = Amounts(
    frozen=False, load=Load(requests=60, rounds=1, kills=1, kill_every_s=1), calls=400, rounds=5, examples=100
)
FULL = Amounts(
    frozen=True,
    load=Load(requests=1000, rounds=3, kills=20, kill_every_s=5, sizes=((32, 32), (32, 48)), frozen=True),
    calls=2000,
    rounds=60,
    examples=5000,
)


def measure_threads(folder: Path, amounts: Amounts, seed: int) -> list[Figure]:
    from stress_threads import measure_threads  # which imports torch

    return measure_threads(folder, calls=amounts.calls, frozen=amounts.frozen, seed=seed)


def measure_all_costs(folder: Path, amounts: Amounts) -> list[Figure]:
    levels = ("seeded", "strict", "repeatable") if amounts.frozen else ("repeatable",)
    figures = measure_costs(folder / "vault", amounts.rounds, frozen=amounts.frozen, levels=levels)
    if amounts.frozen:
        ten = measure_costs(folder / "vault", amounts.rounds, frozen=True, levels=("repeatable",), batch_size=10)
        figures += ten
    rounds = max(1, amounts.rounds // 4)
    kinds = (False, True) if amounts.frozen else (False,)
    return figures + [measure_two_threads(folder / "vault", rounds, frozen=frozen) for frozen in kinds]


def measure_records(examples: int) -> list[Figure]:
    """Records that were damaged or made up by a stranger, in a process of their own."""
    name = f"damaged or hostile records, {examples} examples for each test"
    if not FUZZ.is_file():
        return [Figure(name, f"not tried: there is no {FUZZ.name}", "an error of the project's own")]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(FUZZ)]
    environment = {**os.environ, "RANDOM_EXAMPLES": str(examples)}
    done = subprocess.run(command, cwd=FUZZ.parents[2], env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        print(done.stdout, done.stderr, sep="\n", file=sys.stderr)
    last = (done.stdout.strip().splitlines() or ["it printed nothing"])[-1]
    return [Figure(name, last.strip("= "), "an error of the project's own", done.returncode == 0)]


def measure_all(folder: Path, amounts: Amounts, *, seed: int, only: Sequence[str]) -> list[Figure]:
    stages: dict[str, Callable[[Path], list[Figure]]] = {
        "server": lambda place: measure_server(place, amounts.load, seed=seed),
        "threads": lambda place: measure_threads(place, amounts, seed),
        "costs": lambda place: measure_all_costs(place, amounts),
        "records": lambda place: measure_records(amounts.examples),
    }
    figures: list[Figure] = []
    for name, stage in stages.items():
        if not only or name in only:
            place = folder / ("demo" if name in ("server", "costs") else name)  # these two share a vault
            place.mkdir(exist_ok=True, parents=True)
            started_s = time.perf_counter()
            figures += stage(place)
            print(f"{name}: {time.perf_counter() - started_s:.1f} s", file=sys.stderr)
    return figures


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--quick", action="store_true", help="less of everything, and eagerly")
    parser.add_argument("--only", action="append", default=[], metavar="STAGE", choices=STAGES, help=", ".join(STAGES))
    parser.add_argument("--seed", type=int, default=0, help="of the random requests, waits and kills (default: 0)")
    parser.add_argument("--dir", type=Path, help="keep vaults and logs here (default: a temporary folder)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="pipevault-stress-") as temporary:
        folder = options.dir or Path(temporary)
        figures = measure_all(folder, QUICK if options.quick else FULL, seed=options.seed, only=options.only)
    print(json.dumps([asdict(figure) for figure in figures], indent=2) if options.json else markdown(figures))
    return int(any(figure.kept is False for figure in figures))


STAGES = ("server", "threads", "costs", "records")

if __name__ == "__main__":
    sys.exit(main())
