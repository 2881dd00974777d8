#!/usr/bin/env python
"""Prints how the demo pipeline keeps its promise: distinct pictures over processes and workers, replays, and costs.

Everything is drawn with one seed at batch 1 unless it says otherwise. Takes about fifteen minutes on two cores, most of
it compiling; ``--quick`` draws less. The exit code is 1 if a picture differed; costs decide nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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


def costs(vault: Path, rounds: int, levels: list[str], batch_size: int) -> dict[str, float]:
    """Medians in milliseconds, and each level's ratio to off; levels take turns, so that all see the same load."""
    import torch

    from pipevault.runtime.guard import Guard
    from pipevault.runtime.run_record import Recorder

    seconds: dict[str, list[float]] = {level: [] for level in ("off", *levels)}
    records: list[float] = []
    checks: list[float] = []
    pipes = {level: open_frozen(vault, level, mode="compile", batch_size=batch_size) for level in seconds}
    prompts = digits(batch_size)
    for pipe in pipes.values():
        for _ in range(2):  # the first makes the guard and hashes the weights
            draw(pipe, prompts, generator=torch.Generator().manual_seed(SEED))
    with timed(Recorder, "record", records), timed(Guard, "check", checks):
        for _ in range(rounds):
            for level, pipe in pipes.items():
                started_s = time.perf_counter()
                draw(pipe, prompts, generator=torch.Generator().manual_seed(SEED))
                seconds[level].append(time.perf_counter() - started_s)
    ratios = {
        f"{level}/off": statistics.median(
            with_level / off for off, with_level in zip(seconds["off"], times, strict=True)
        )
        for level, times in seconds.items()
    }
    milliseconds = {name: statistics.median(times) * 1000 for name, times in seconds.items()}
    return {
        **milliseconds,
        **ratios,
        "record": statistics.median(records) * 1000,
        "guard": statistics.median(checks) * 1000,
    }


@contextmanager
def timed(owner: type, name: str, seconds: list[float]) -> Iterator[None]:
    method: Callable[..., Any] = getattr(owner, name)

    def measured(*arguments: Any, **keywords: Any) -> Any:
        started_s = time.perf_counter()
        try:
            return method(*arguments, **keywords)
        finally:
            seconds.append(time.perf_counter() - started_s)

    setattr(owner, name, measured)
    try:
        yield
    finally:
        setattr(owner, name, method)


# --- the processes


WORK: dict[str, Callable[..., Any]] = {
    "pictures": lambda vault, level, count, mode: pictures(Path(vault), level, count, mode),
    "batches": lambda vault: batches(Path(vault)),
    "save": lambda vault, folder, count: save_pictures(Path(vault), Path(folder), count),
    "costs": lambda vault, rounds, levels, batch_size: costs(Path(vault), rounds, levels, batch_size),
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


def measure(vault: Path, *, processes: int, per_process: int, workers: int, replays: int, rounds: int) -> bool:
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
    for batch_size, levels in ((1, ["seeded", *LEVELS]), (10, ["repeatable"])):
        cost = run("costs", vault, rounds, levels, batch_size)
        for level in levels:
            print(
                f"cost of {level} at batch {batch_size}: {cost[f'{level}/off'] - 1:+.2%} per generation "
                f"({cost[level]:.1f} ms, off {cost['off']:.1f} ms, median of {rounds} pairs)"
            )
        print(f"of that a record, without hashing pixels: {cost['record']:.2f} ms; the guard: {cost['guard']:.2f} ms")
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
        {"processes": 2, "per_process": 2, "workers": 2, "replays": 5, "rounds": 10}
        if arguments.quick
        else {"processes": 10, "per_process": 10, "workers": 4, "replays": 50, "rounds": 60}
    )
    with tempfile.TemporaryDirectory(prefix="pipevault-measure-") as folder:
        raise SystemExit(0 if measure(arguments.dir or Path(folder) / "vault", **sizes) else 1)


if __name__ == "__main__":
    main()
