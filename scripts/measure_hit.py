#!/usr/bin/env python3
"""Measure what a hit costs, each run in a fresh process: time, processes, compiler modules, memory.

Run: ``.venv/bin/python scripts/measure_hit.py``. Prints a Markdown table with the machine, or JSON with ``--json``.
Before it measures, one process of each kind runs unmeasured: an installed package has its bytecode on disk.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

sys.path.insert(0, str(Path(__file__).resolve().parent))
import sd15

COMPILER_MODULES = ("torch._inductor.compile_fx", "torch._inductor.codecache")
PROCESS_EVENTS = frozenset(
    {"subprocess.Popen", "os.fork", "os.forkpty", "os.posix_spawn", "os.spawn", "os.exec", "os.system"}
)
CHILD_TIMEOUT_S = 3600.0
SD15 = "sd15"
"""Stands for a pipeline of that size with random weights."""

Answer = TypeVar("Answer")


@dataclass(frozen=True)
class Measure:
    """One row: the median over the runs and the most that it may be (``None``: as it comes), both in ``unit``."""

    name: str
    value: float
    limit: float | None
    unit: str

    @property
    def within(self) -> bool:
        return self.limit is None or self.value <= self.limit


def open_model(model: str) -> Any:
    from pipevault.opening import open_pipeline

    return sd15.build() if model == SD15 else open_pipeline(model)


def shapes(model: str) -> list[Any]:
    from pipevault.cli.pipelines import shape_of

    return [{"call": dict(sd15.CALL)} if model == SD15 else shape_of(model)]


def freeze(model: str, vault: Path) -> dict[str, Any]:
    from pipevault import PipelineCache, outcome

    pipe = open_model(model)
    started_s = time.perf_counter()
    PipelineCache(vault, mode="compile").load(pipe, shapes=shapes(model))
    return {
        "load_s": time.perf_counter() - started_s,
        "parts": {name: part.status for name, part in outcome(pipe).parts.items()},
    }


def run_eager(model: str, vault: Path) -> dict[str, Any]:
    pipe = open_model(model)
    call_once(pipe, model)
    return {"resident_bytes": resident_bytes()}


def run_hit(model: str, vault: Path) -> dict[str, Any]:
    """What the import and the load do: everything else, also the call, is outside the measured stretches."""
    pipe = open_model(model)
    wanted = shapes(model)
    started_processes: list[str] = []
    watching = True

    def on_event(event: str, _: object) -> None:
        if watching and event in PROCESS_EVENTS:
            started_processes.append(event)

    sys.addaudithook(on_event)
    modules_before = set(sys.modules)
    started_s = time.perf_counter()
    from pipevault import PipelineCache, outcome

    imported_s = time.perf_counter()
    pipe = PipelineCache(vault, mode="require").load(pipe, shapes=wanted)
    loaded_s = time.perf_counter()
    watching = False
    imported = [name for name in COMPILER_MODULES if name in sys.modules and name not in modules_before]
    call_once(pipe, model)
    report = outcome(pipe)
    return {
        "load_s": loaded_s - imported_s,
        "import_s": imported_s - started_s,
        "seconds": dict(report.seconds),
        "status": report.status,
        "processes": len(started_processes),
        "compiler_modules": imported,
        "resident_bytes": resident_bytes(),
    }


CHILDREN = {"freeze": freeze, "eager": run_eager, "hit": run_hit}

IMPORT_PROGRAM = """
import sys, time
started_s = time.perf_counter()
import pipevault
print(time.perf_counter() - started_s, int("torch" in sys.modules))
"""


def call_once(pipe: Any, model: str) -> None:
    from pipevault.cli.demo import draw
    from pipevault.opening import DEMO_MODEL

    if model == DEMO_MODEL:
        draw(pipe, seed=0)
    elif model == SD15:
        pipe(**sd15.CALL)
    else:
        pipe("a lighthouse at dusk", num_inference_steps=2)


def resident_bytes() -> int:
    import psutil

    return int(psutil.Process().memory_info().rss)


def environment() -> dict[str, str]:
    """Of the measured processes: they may write and read bytecode, as an installed package has it."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}


def in_fresh_process(kind: str, model: str, vault: Path) -> dict[str, Any]:
    command = [
        sys.executable,
        str(Path(__file__).resolve()),
        "--child",
        kind,
        "--model",
        model,
        "--dir",
        str(vault),
    ]
    result = subprocess.run(
        command, env=environment(), stdout=subprocess.PIPE, text=True, timeout=CHILD_TIMEOUT_S, check=True
    )
    answer: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return answer


def import_in_fresh_process() -> dict[str, Any]:
    """In an interpreter that has imported nothing else, not even what this script imports."""
    command = [sys.executable, "-c", IMPORT_PROGRAM]
    result = subprocess.run(command, env=environment(), stdout=subprocess.PIPE, text=True, check=True)
    import_s, torch_imported = result.stdout.split()
    return {"import_s": float(import_s), "torch_imported": torch_imported == "1"}


def ls_seconds(vault: Path) -> float:
    started_s = time.perf_counter()
    command = [sys.executable, "-m", "pipevault", "ls", "--dir", str(vault)]
    subprocess.run(command, env=environment(), capture_output=True, timeout=CHILD_TIMEOUT_S, check=True)
    return time.perf_counter() - started_s


def warmed_up(run: Callable[[], Answer], runs: int) -> list[Answer]:
    """The answers of ``runs`` runs, after one that is not counted."""
    run()
    return [run() for _ in range(runs)]


def measure(model: str, vault: Path, runs: int) -> tuple[list[Measure], dict[str, Any]]:
    frozen = in_fresh_process("freeze", model, vault)
    hits = warmed_up(lambda: in_fresh_process("hit", model, vault), runs)
    eager = warmed_up(lambda: in_fresh_process("eager", model, vault), runs)
    imports = warmed_up(import_in_fresh_process, runs)
    lists_s = warmed_up(lambda: ls_seconds(vault), runs)

    def median(name: str) -> float:
        return float(statistics.median(run[name] for run in hits))

    added_bytes = median("resident_bytes") - statistics.median(run["resident_bytes"] for run in eager)
    measures = [
        Measure("the first load, once", frozen["load_s"], None, "s"),
        Measure("a hit adds to a constructed pipeline", 1000 * median("load_s"), 100, "ms"),
        Measure("importing `PipelineCache`, once per process", 1000 * median("import_s"), None, "ms"),
        Measure("processes that a hit starts", max(run["processes"] for run in hits), 0, ""),
        Measure("compiler modules that a hit imports", max(len(run["compiler_modules"]) for run in hits), 0, ""),
        Measure("resident memory beyond eager, after one call", added_bytes / 1e6, 60, "MB"),
        Measure("`import pipevault`", 1000 * statistics.median(run["import_s"] for run in imports), 50, "ms"),
        Measure(
            "processes whose `import pipevault` imports torch",
            sum(run["torch_imported"] for run in imports),
            0,
            "",
        ),
        Measure("`pipevault ls`, with the interpreter's start", 1000 * statistics.median(lists_s), 200, "ms"),
    ]
    return measures, {"frozen": frozen, "hits": hits, "eager": eager, "imports": imports, "ls_s": lists_s}


def machine() -> dict[str, str | int]:
    """What the figures were measured on; nothing that names the host."""
    from importlib.metadata import version

    return {
        "cpu": cpu_model(),
        "cores": os.cpu_count() or 1,
        "load average": f"{os.getloadavg()[0]:.1f}",
        "threads": os.environ.get("OMP_NUM_THREADS", "default"),
        "python": platform.python_version(),
        "torch": version("torch"),
        "diffusers": version("diffusers"),
    }


def cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:  # not Linux
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def markdown(measures: Sequence[Measure], facts: Mapping[str, str | int], *, model: str, runs: int) -> str:
    lines = [
        f"| measure (`{model}`, median of {runs} fresh processes) | measured | at most |",
        "| --- | ---: | ---: |",
    ]
    for row in measures:
        unit = f" {row.unit}" if row.unit else ""
        over = "" if row.within else " **over**"
        limit = "" if row.limit is None else f"{row.limit:.0f}{unit}"
        lines.append(f"| {row.name} | {row.value:.0f}{unit}{over} | {limit} |")
    lines += ["", "Machine: " + ", ".join(f"{name} {value}" for name, value in facts.items()) + "."]
    return "\n".join(lines)


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo", help=f"folder, repository id, {SD15}, or demo (default)")
    parser.add_argument("--dir", type=Path, help="vault; default: a temporary one")
    parser.add_argument("--runs", type=int, default=7, help="fresh processes for each figure")
    parser.add_argument("--json", action="store_true", help="print every run as JSON")
    parser.add_argument("--check", action="store_true", help="exit code 1 if a figure is over its limit")
    parser.add_argument("--child", choices=sorted(CHILDREN), help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse_arguments(arguments)
    if options.child:
        print(json.dumps(CHILDREN[options.child](options.model, options.dir)))
        return 0
    with tempfile.TemporaryDirectory() as temporary:
        vault = options.dir or Path(temporary) / "vault"
        measures, runs = measure(options.model, vault, options.runs)
    facts = machine()
    if options.json:
        rows = [{**asdict(row), "within": row.within} for row in measures]
        print(json.dumps({"machine": facts, "model": options.model, "measures": rows, "runs": runs}, indent=2))
    else:
        print(markdown(measures, facts, model=options.model, runs=options.runs))
    return 1 if options.check and not all(row.within for row in measures) else 0


if __name__ == "__main__":
    sys.exit(main())
