#!/usr/bin/env python
"""Put the promise "same seed, same bytes" under load: a server, killed workers, many threads, hostile records; and say
what records, guard and level cost.

``--quick`` takes less than a minute and compiles nothing: threads and records only. The whole takes some twenty minutes
on two cores, a quarter of it compiling. Prints a Markdown table, or JSON with ``--json``. The exit code is 1 if a
promise was broken: a wrong byte, a missing record, an error, a stream or a switch that was left otherwise. Times decide
nothing.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import logging
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from served import ENVIRONMENT, environment, prewarm, server

os.environ.update(ENVIRONMENT)  # before torch reads it

import httpx
import psutil
import torch

ROOT = Path(__file__).parents[1]
STEPS = 6
SIZES = ((32, 32), (32, 48))
BATCHES = (1, 2)


@dataclass(frozen=True)
class Figure:
    what: str
    measured: str
    goal: str
    is_kept: bool = True


# --- threads


class Denoiser(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix = torch.nn.Linear(8, 8)

    def forward(self, latents: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
        return latents - 0.1 * torch.tanh(self.mix(latents)) * torch.cos(step)


class Pause:
    """A step callback that waits; all of them are of one kind."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def __call__(self) -> None:
        time.sleep(self.seconds)


class Toy:
    """A pipeline that draws its latents from the generator that it is given."""

    def __init__(self) -> None:
        self.transformer = Denoiser().eval()
        with torch.no_grad():
            for parameter in self.transformer.parameters():
                parameter.copy_(torch.linspace(-1, 1, parameter.numel()).reshape(parameter.shape))

    def __call__(self, prompt: str = "", generator: Any = None, pause: Pause | None = None) -> torch.Tensor:
        latents = torch.randn(1, 8, 8, generator=generator)
        with torch.no_grad():
            for step in range(3):
                if pause is not None:
                    pause()
                latents = self.transformer(latents, torch.tensor(float(step)))
        return latents


def stress_threads(folder: Path, *, threads: int, calls: int, freeze: bool) -> Iterator[Figure]:
    import pipevault
    from pipevault.determinism.layers import capture, moved
    from pipevault.determinism.switches import FLAGS

    logging.getLogger("pipevault").setLevel(logging.ERROR)
    policy = "compile" if freeze else "eager"
    pipes: list[Any] = [
        pipevault.PipelineCache(folder / "threads", level=level, on_unfrozen=policy).load(Toy())
        for level in ("off", "repeatable", "strict", "repeatable")
    ]
    seeded = {seed: [pipe(seed=seed) for pipe in pipes] for seed in range(20)}
    given = {seed: [pipe(generator=torch.Generator().manual_seed(seed)) for pipe in pipes] for seed in range(20)}
    before, switches = capture(), {name: flag.state() for name, flag in FLAGS.items()}

    def call(number: int) -> tuple[bool, bool]:
        draw = random.Random(number)
        index, seed, pause = draw.randrange(len(pipes)), draw.randrange(20), Pause(draw.random() * 0.004)
        if draw.random() < 0.6:
            output, expected = pipes[index](seed=seed, pause=pause), seeded[seed][index]
        else:
            generator = torch.Generator().manual_seed(seed)
            output, expected = pipes[index](generator=generator, pause=pause), given[seed][index]
        level = pipevault.record_of(output).level
        return torch.equal(output, expected), level["achieved"] == level["asked"] and not level["notes"]

    started_s = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        found = list(pool.map(call, range(calls)))
    seconds = time.perf_counter() - started_s
    wrong, unheld = sum(not right for right, _ in found), sum(not held for _, held in found)
    left = [*moved(before, capture()), *(name for name, flag in FLAGS.items() if flag.state() != switches[name])]
    what = f"{threads} threads, 4 pipelines, 3 levels, {calls} calls"
    yield Figure(
        f"{what}: wrong bytes, levels not held", f"{wrong}, {unheld} in {seconds:.0f} s", "0, 0", not wrong + unheld
    )
    yield Figure("streams and switches left otherwise", ", ".join(left) or "none", "none", not left)


# --- a server


@dataclass(frozen=True)
class Job:
    prompt: tuple[str, ...]
    seed: int
    height: int
    width: int

    def body(self) -> dict[str, Any]:
        prompt = list(self.prompt) if len(self.prompt) > 1 else self.prompt[0]
        return {
            "prompt": prompt,
            "seed": self.seed,
            "num_inference_steps": STEPS,
            "height": self.height,
            "width": self.width,
        }


def jobs() -> list[Job]:
    """Twenty pairs of prompt and seed, with sizes and batches mixed."""
    from pipevault.demo import prompt

    kinds = itertools.cycle(itertools.product(SIZES, BATCHES))
    return [
        Job(tuple(prompt((number + index) % 10) for index in range(batch)), 100 + number, *size)
        for number, (size, batch) in zip(range(20), kinds, strict=False)
    ]


EXPECTED_CODE = """
import json, sys
sys.path.insert(0, sys.argv[1])
from stress_seeds import jobs
import pipevault
from pipevault.opening import open_pipeline
pipe = pipevault.PipelineCache(sys.argv[2], mode="require").load(open_pipeline("demo"))
print(json.dumps([pipevault.record_of(pipe(**job.body())).results["pixels"] for job in jobs()]))
"""


def expected_pixels(vault: Path) -> dict[Job, list[str]]:
    """Drawn one after the other, in one thread of a process of its own."""
    command = [sys.executable, "-c", EXPECTED_CODE, str(Path(__file__).parent), str(vault)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=True)
    return dict(zip(jobs(), json.loads(done.stdout), strict=True))


def pixels_of(answer: httpx.Response) -> tuple[list[str], bool]:
    """The digests of the pictures in an answer, and whether each has its record."""
    import zipfile

    from PIL import Image

    from pipevault import read_record
    from pipevault.determinism.describe import pixels_sha256
    from pipevault.errors import RecordError

    files = [answer.content]
    if answer.headers["content-type"] == "application/zip":
        with zipfile.ZipFile(io.BytesIO(answer.content)) as archive:
            files = [archive.read(name) for name in archive.namelist()]
    digests, recorded = [], True
    with tempfile.TemporaryDirectory() as folder:
        for data in files:
            with Image.open(io.BytesIO(data)) as image:
                digests.append(pixels_sha256(image))
            (file := Path(folder) / "a.png").write_bytes(data)
            try:
                record = read_record(file)
                recorded &= record.results["pixels"][record.sample or 0] == digests[-1]
            except RecordError:
                recorded = False
    return digests, recorded


@contextmanager
def clients(count: int) -> Iterator[Callable[[str, list[Job], bool], list[httpx.Response | None]]]:
    with ThreadPoolExecutor(count) as pool, httpx.Client(timeout=300) as client:

        def post(address: str, work: list[Job], retry: bool) -> list[httpx.Response | None]:
            return list(pool.map(lambda job: one(client, address, job, retry), work))

        yield post


def one(client: httpx.Client, address: str, job: Job, retry: bool) -> httpx.Response | None:
    for attempt in range(200 if retry else 1):
        try:
            answer = client.post(f"{address}/generate", json=job.body())
            if answer.status_code == 200 or not retry:
                return answer
        except httpx.TransportError:
            pass  # its worker was killed
        time.sleep(0.05 * (1 + attempt % 10))
    return None


def judge(
    answers: list[httpx.Response | None], work: list[Job], expected: dict[Job, list[str]]
) -> tuple[int, int, int]:
    """Errors, wrong bytes, missing records."""
    errors = wrong = missing = 0
    for answer, job in zip(answers, work, strict=True):
        if answer is None or answer.status_code != 200:
            errors += 1
            continue
        digests, recorded = pixels_of(answer)
        wrong += digests != expected[job]
        missing += not recorded
    return errors, wrong, missing


def stress_server(folder: Path, *, requests: int, rounds: int, kills: int) -> Iterator[Figure]:
    vault = folder / "served"
    for batch in BATCHES:
        sizes = [option for height, width in SIZES for option in ("--size", f"{width}x{height}")]
        prewarm("demo", vault, *sizes, "--batch-size", str(batch))
    expected = expected_pixels(vault)
    work = random.Random(0).choices(jobs(), k=requests)
    options = ("--workers", "2", "--threads", "4")
    with (
        clients(8) as post,
        server("demo", vault, *options) as (frozen, process),
        server("demo", None, *options, "--plain") as (plain, _),
    ):
        errors, wrong, missing = judge(post(frozen, work, False), work, expected)
        what = f"server, 2 workers x 4 threads, 8 clients, {requests} requests"
        measured = f"{errors}, {wrong}, {missing}"
        yield Figure(f"{what}: errors, wrong bytes, missing records", measured, "0, 0, 0", not errors + wrong + missing)
        ratios = []
        part = work[: max(20, requests // 5)]
        for number in range(rounds):
            seconds: dict[str, float] = {}
            for address in (frozen, plain) if number % 2 else (plain, frozen):
                started_s = time.perf_counter()
                post(address, part, False)
                seconds[address] = time.perf_counter() - started_s
            ratios.append(seconds[plain] / seconds[frozen])
        yield Figure("throughput against plain diffusers", f"{statistics.median(ratios):.2f} times", "0.95 times")
        yield kill_workers(post, frozen, process.pid, work, expected, kills)


def kill_workers(
    post: Callable[[str, list[Job], bool], list[httpx.Response | None]],
    address: str,
    pid: int,
    work: list[Job],
    expected: dict[Job, list[str]],
    kills: int,
) -> Figure:
    killed = 0
    with ThreadPoolExecutor(1) as pool:
        draw, load = random.Random(1), work * 20
        answers: list[httpx.Response | None] = []
        done = 0
        while killed < kills:
            running = pool.submit(post, address, load[done : done + 16], True)
            time.sleep(draw.random() * 0.5)
            workers = [child for child in psutil.Process(pid).children() if "spawn_main" in " ".join(child.cmdline())]
            if workers:
                draw.choice(workers).kill()
                killed += 1
            answers += running.result()
            done += 16
    errors, wrong, missing = judge(answers, load[:done], expected)
    measured = f"{wrong} wrong, {missing} without record, {errors} given up, of {done}"
    return Figure(f"{killed} workers killed at random", measured, "0 wrong", not wrong + missing)


# --- costs


def measure_costs(folder: Path, *, rounds: int) -> Iterator[Figure]:
    """Medians over pictures of about 100 ms; levels take turns, so that all see the same load."""
    from pipevault import PipelineCache
    from pipevault.demo import DEFAULT_GUIDANCE_SCALE, DEFAULT_STEPS, prompt
    from pipevault.opening import DEMO_MODEL, open_pipeline

    vault = folder / "served"
    pipes = {
        level: PipelineCache(vault, mode="require", level=level).load(open_pipeline(DEMO_MODEL))
        for level in ("off", "repeatable")
    }
    times: dict[str, list[float]] = {level: [] for level in pipes}
    for number in range(rounds + 3):
        for level in sorted(pipes, reverse=bool(number % 2)):
            started_s = time.perf_counter()
            pipes[level](
                prompt(7),
                num_inference_steps=DEFAULT_STEPS,
                guidance_scale=DEFAULT_GUIDANCE_SCALE,
                height=32,
                width=32,
                seed=7,
            )
            if number >= 3:
                times[level].append(1e3 * (time.perf_counter() - started_s))
    off, repeatable = (statistics.median(times[level]) for level in ("off", "repeatable"))
    share = 100 * statistics.median(r / o - 1 for r, o in zip(times["repeatable"], times["off"], strict=True))
    yield Figure(f"repeatable against off ({repeatable:.1f} ms, off {off:.1f} ms)", f"{share:+.1f} %", "2 %")
    yield Figure("turn, level, guard and record of a generation", f"{overhead_ms(pipes['repeatable']):.2f} ms", "2 ms")


def overhead_ms(pipe: Any) -> float:
    """What a generation costs whose method does nothing but draw its noise and return a picture."""
    from PIL import Image

    from pipevault.runtime.generation import generate
    from pipevault.runtime.pipeline import loaded_state

    def method(self: Any, prompt: str = "", generator: Any = None) -> list[Image.Image]:
        torch.randn(1, 4, 8, 8, generator=generator)
        return [Image.new("RGB", (32, 32))]

    times = []
    for seed in range(220):
        started_s = time.process_time()
        generate(pipe, method, ("a seven",), {"seed": seed}, lambda: loaded_state(pipe))
        times.append(1e3 * (time.process_time() - started_s))
    return statistics.median(times[20:])


# --- records


def fuzz_records(examples: int) -> Iterator[Figure]:
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        str(ROOT / "tests/manager/test_replay_fuzz.py"),
    ]
    done = subprocess.run(
        command, cwd=ROOT, env={**environment(), "RECORD_FUZZ_EXAMPLES": str(examples)}, capture_output=True, text=True
    )
    last = done.stdout.strip().splitlines()[-1:] or ["nothing was run"]
    what = f"{2 * examples} damaged or hostile records: no error but the project's own, nothing started or written"
    yield Figure(what, "all" if done.returncode == 0 else last[0], "all", done.returncode == 0)


def figures(folder: Path, *, quick: bool) -> Iterator[Figure]:
    calls = 300 if quick else 2_000
    yield from stress_threads(folder, threads=64, calls=calls, freeze=not quick)
    yield from fuzz_records(100 if quick else 5_000)
    if not quick:
        yield from stress_server(folder, requests=1_000, rounds=3, kills=20)
        yield from measure_costs(folder, rounds=60)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    found: list[Figure] = []
    with tempfile.TemporaryDirectory() as folder:
        for figure in figures(Path(folder), quick=arguments.quick):
            found.append(figure)
            print(f"{'kept  ' if figure.is_kept else 'BROKEN'} {figure.what}: {figure.measured}", file=sys.stderr)
    if arguments.json:
        print(json.dumps([figure.__dict__ for figure in found], indent=2))
    else:
        print("| | measured | goal |\n| --- | ---: | ---: |")
        for figure in found:
            print(f"| {figure.what} | {figure.measured} | {figure.goal} |")
    return 0 if all(figure.is_kept for figure in found) else 1


if __name__ == "__main__":
    sys.exit(main())
