#!/usr/bin/env python
"""Prints how the demo pipeline keeps its promise: distinct pictures over processes and workers, and replays.

Everything is drawn with one seed at batch 1 unless it says otherwise. Takes about fifteen minutes on two cores, most of
it compiling; ``--quick`` draws less. The exit code is 1 if a picture differed. What it costs: ``stress_seeds.py``.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

LEVELS = ("repeatable", "strict", "invariant")
BATCH_SIZES = (1, 2, 4, 8)
SEED = 7


def open_frozen(vault: Path, level: str, *, mode: str = "require", batch_size: int = 1) -> Any:
    from pipevault import PipelineCache
    from pipevault.opening import DEMO_MODEL, open_pipeline

    pipe = open_pipeline(DEMO_MODEL)
    return PipelineCache(vault, mode=mode, level=level).load(pipe, batch_size=batch_size, guidance=True)


def draw(pipe: Any, prompts: list[str], **arguments: Any) -> Any:
    from pipevault.demo import DEFAULT_GUIDANCE_SCALE, DEFAULT_STEPS

    prompt = prompts if len(prompts) > 1 else prompts[0]
    return pipe(prompt, num_inference_steps=DEFAULT_STEPS, guidance_scale=DEFAULT_GUIDANCE_SCALE, **arguments)


def digits(count: int) -> list[str]:
    from pipevault.demo import prompt

    return [prompt((7 + number) % 10) for number in range(count)]


# --- work of one process: each returns plain JSON


def pictures(vault: Path, level: str, count: int, mode: str) -> list[str]:
    from pipevault import record_of

    pipe = open_frozen(vault, level, mode=mode)
    return [record_of(draw(pipe, digits(1), seed=SEED)).results["pixels"][0] for _ in range(count)]


def batches(vault: Path) -> list[str]:
    """The first sample at every batch size, at level invariant."""
    from pipevault import record_of

    pipe = open_frozen(vault, "invariant")
    return [record_of(draw(pipe, digits(size), seed=SEED)).results["pixels"][0] for size in BATCH_SIZES]


def save_pictures(vault: Path, folder: Path, count: int) -> list[str]:
    from pipevault import save

    pipe = open_frozen(vault, "repeatable")
    return [str(save(draw(pipe, digits(1), seed=seed), folder / f"{seed}.png")[0]) for seed in range(count)]


# --- the processes


WORK: dict[str, Callable[..., Any]] = {
    "pictures": lambda vault, level, count, mode: pictures(Path(vault), level, count, mode),
    "batches": lambda vault: batches(Path(vault)),
    "save": lambda vault, folder, count: save_pictures(Path(vault), Path(folder), count),
}


def start(work: str, *arguments: Any) -> subprocess.Popen[str]:
    command = [sys.executable, __file__, "--work", json.dumps([work, *map(_plain, arguments)])]
    environment = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **os.environ}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment)


def result(process: subprocess.Popen[str]) -> Any:
    output, _ = process.communicate()
    if process.returncode:
        raise SystemExit(f"a process failed with exit code {process.returncode}")
    return json.loads(output.splitlines()[-1])


def run(work: str, *arguments: Any) -> Any:
    return result(start(work, *arguments))


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value


def measure(vault: Path, *, processes: int, per_process: int, workers: int, replays: int) -> bool:
    ok = True
    for level in LEVELS:
        compiled = run("pictures", vault, level, 1, "compile")
        fresh = [digest for _ in range(processes) for digest in run("pictures", vault, level, per_process, "require")]
        together = [start("pictures", vault, level, per_process, "require") for _ in range(workers)]
        concurrent = [digest for process in together for digest in result(process)]
        distinct = len({*compiled, *fresh, *concurrent})
        ok &= distinct == 1
        print(
            f"{level}: {distinct} distinct SHA-256 in {len(compiled)} generation of the process that compiled, "
            f"{len(fresh)} over {processes} fresh processes, {len(concurrent)} in {workers} concurrent workers",
            flush=True,
        )
    samples = run("batches", vault)
    ok &= len(set(samples)) == 1
    print(f"invariant: {len(set(samples))} distinct SHA-256 of one sample at batch sizes {BATCH_SIZES}", flush=True)
    equal = replay_count(vault, replays)
    ok &= equal == replays
    print(f"replay: {equal} of {replays} saved PNGs equal", flush=True)
    return ok


def replay_count(vault: Path, count: int) -> int:
    with tempfile.TemporaryDirectory(prefix="pipevault-pictures-") as folder:
        files = run("save", vault, folder, count)
        command = [sys.executable, "-m", "pipevault", "replay", *files, "--dir", str(vault), "--json"]
        environment = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **os.environ}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        return sum(file.get("equal", False) for file in json.loads(done.stdout)["files"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dir", type=Path, help="A vault to use and fill; default: a new one, removed at the end.")
    parser.add_argument("--quick", action="store_true", help="Fewer processes and pictures.")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        name, *rest = json.loads(arguments.work)
        print(json.dumps(WORK[name](*rest)))
        return
    sizes = (
        {"processes": 2, "per_process": 2, "workers": 2, "replays": 5}
        if arguments.quick
        else {"processes": 10, "per_process": 10, "workers": 4, "replays": 50}
    )
    with tempfile.TemporaryDirectory(prefix="pipevault-measure-") as folder:
        raise SystemExit(0 if measure(arguments.dir or Path(folder) / "vault", **sizes) else 1)


if __name__ == "__main__":
    main()
