"""Measure several models with ``pipevault bench``: the demo, a transformer of Flux's structure, SD 1.5's size, SDXL's.

    OMP_NUM_THREADS=1 python scripts/bench.py demo dit --runs 3 --json bench.json --plot bench.svg

Prints a Markdown table for each model. ``all`` stands for all of them.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dit
import sd15
import sdxl
from pipevault.cli.bench import COLUMNS, notes, rows
from pipevault.cli.progress import StepProgress
from pipevault.demo import DIGIT_WORDS
from pipevault.evidence.bench import ALL_WAYS, Bench, bench
from pipevault.evidence.generation_job import GenerationJob
from pipevault.evidence.request import Request
from pipevault.report.plots import time_bars


@dataclass(frozen=True)
class Model:
    """A model to measure. ``build`` makes it (the demo ships); the rest is what is measured unless options say more."""

    request: Request
    build: Callable[[], Any] | None = None
    runs: int = 1
    calls: int = 2
    ways: tuple[str, ...] = ALL_WAYS


MODELS = {
    "demo": Model(
        Request(prompts=tuple(f"a handwritten {word}" for word in DIGIT_WORDS)).with_defaults_of("demo"),
        runs=3,
        calls=10,
    ),
    "dit": Model(Request(prompts=("a lighthouse",), steps=4, height=64, width=64), dit.build, runs=2, calls=3),
    "sd15": Model(Request(prompts=("a lighthouse",), steps=4, height=256, width=256), sd15.build),
    "sdxl": Model(
        Request(prompts=("a lighthouse",), steps=4, height=128, width=128),
        sdxl.build,
        ways=("eager", "torch.compile", "torch.compile by blocks", "whole", "blocks"),
    ),
}


def measure(model: str, folder: Path, options: argparse.Namespace) -> Bench:
    measured = MODELS[model]
    if measured.build is not None:
        measured.build().save_pretrained(folder)
    with StepProgress() as progress:
        progress.subject = model
        opened = model if measured.build is None else str(folder)
        job = GenerationJob(opened, measured.request, jobs=options.jobs, generations=options.calls or measured.calls)
        ways = tuple(options.ways.split(",")) if options.ways else measured.ways
        return bench(job, ways=ways, runs=options.runs or measured.runs, progress=progress)


def markdown(result: Bench) -> str:
    lines = [COLUMNS, ("---", *("---:" for _ in COLUMNS[1:])), *rows(result)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", choices=[*MODELS, "all"])
    parser.add_argument("--ways", help=f"of {', '.join(ALL_WAYS)}; all of them, and five for sdxl, unless given")
    parser.add_argument("--runs", type=int, help="with something on disk; 3 for the demo, 2 for dit, 1 unless given")
    parser.add_argument("--calls", type=int, help="of each process; 10 for the demo, 3 for dit, 2 unless given")
    parser.add_argument("--jobs", type=int)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    names = list(MODELS) if "all" in options.models else options.models
    results = {}
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            results[name] = measure(name, Path(folder, name), options)
        print(f"\n{name}\n\n{markdown(results[name])}\n", flush=True)
        for note, reason in notes(results[name]):
            print(f"{note}: {reason}", flush=True)
        if options.json:
            options.json.write_text(json.dumps({n: r.to_json() for n, r in results.items()}, indent=1))
    if options.plot:
        bars = {f"{name}: {one.name}": (one.miss_s, one.hit_s) for name in results for one in results[name].measured}
        options.plot.write_text(time_bars(bars))


if __name__ == "__main__":
    main()
