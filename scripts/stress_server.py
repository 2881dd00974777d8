"""Clients against ``examples/server.py``: right bytes under load, while workers are killed, and how fast."""

from __future__ import annotations

import io
import os
import random
import signal
import statistics
import tempfile
import threading
import time
import zipfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeAlias

import httpx

from figures import Figure
from served import Served, served

Body: TypeAlias = Mapping[str, Any]

CLIENTS = 8
PAIRS = 20
WORKERS, THREADS = 2, 4
STEPS = 4
REQUEST_TIMEOUT_S = 300.0
EAGER = {"PIPEVAULT_ON_UNFROZEN": "eager"}


@dataclass(frozen=True)
class Load:
    """What is served, and how much is asked of it. ``sizes``: (height, width), the first also in batches of two.

    ``frozen``: a vault is filled first and served in mode ``require``; else the parts run eagerly and nothing compiles.
    """

    requests: int
    rounds: int
    kills: int
    kill_every_s: float
    sizes: tuple[tuple[int, int], ...] = ((32, 32),)
    frozen: bool = False
    model: str = "demo"


@dataclass
class Counts:
    """What clients saw."""

    answered: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    wrong: int = 0
    without_record: int = 0
    retried: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)


def requests_of(load: Load) -> list[Body]:
    """Return one request for each pair of prompt and seed; sizes and batches take turns."""
    from pipevault.demo import prompt

    shapes = [*load.sizes, None]
    bodies: list[Body] = []
    for number in range(PAIRS):
        text, size = prompt(number % 10), shapes[number % len(shapes)]
        height, width = size or load.sizes[0]
        said = text if size else [text, prompt((number + 3) % 10)]
        bodies.append({"prompt": said, "seed": 1000 + number, "steps": STEPS, "height": height, "width": width})
    return bodies


def fill(load: Load, vault: Path) -> None:
    """Freeze what the requests need."""
    from pipevault import PipelineCache
    from pipevault.opening import open_pipeline

    shapes = [{"height": height, "width": width} for height, width in load.sizes]
    shapes.append({**shapes[0], "batch_size": 2})
    PipelineCache(vault).load(open_pipeline(load.model), shapes=shapes)


def draw_alone(load: Load, vault: Path) -> list[list[str]]:
    """Return the digests of the pictures of each request, drawn by one thread of a process of its own."""
    with get_context("spawn").Pool(1) as pool:
        return pool.apply(_draw_alone, (load, vault))


def _draw_alone(load: Load, vault: Path) -> list[list[str]]:
    from pipevault import PipelineCache
    from pipevault.calls.describe import pixels_sha256
    from pipevault.opening import open_pipeline

    cache = PipelineCache(vault, mode="require") if load.frozen else PipelineCache(vault, on_unfrozen="eager")
    pipe = cache.load(open_pipeline(load.model))
    digests = []
    for body in requests_of(load):
        arguments = {name: value for name, value in body.items() if name != "steps"}
        output = pipe(num_inference_steps=body["steps"], **arguments)
        digests.append([pixels_sha256(image) for image in output.images])
    return digests


def measure_server(folder: Path, load: Load, *, seed: int) -> list[Figure]:
    """Load, comparison with plain diffusers, and kills. ``folder`` keeps the vault, which is filled if need be."""
    vault = folder / "vault"
    if load.frozen:
        fill(load, vault)
    wanted = draw_alone(load, vault)
    with ExitStack() as stack:
        server = _start(stack, folder, load)
        return _measure_load(server, folder, load, wanted, seed=seed) + _measure_kills(server, load, wanted, seed=seed)


def _start(stack: ExitStack, folder: Path, load: Load, *, plain: bool = False) -> Served:
    mode = "require" if load.frozen else "compile"
    what = ["--plain"] if plain else ["--dir", str(folder / "vault"), "--mode", mode]
    limits = ["--threads", str(THREADS), "--max-queue", str(10 * CLIENTS)]
    environment = {} if load.frozen else EAGER
    log = folder / ("plain.log" if plain else "server.log")
    return stack.enter_context(served(load.model, *what, *limits, log=log, workers=WORKERS, environment=environment))


def _measure_load(
    server: Served, folder: Path, load: Load, wanted: Sequence[Sequence[str]], *, seed: int
) -> list[Figure]:
    """Both servers are up all the time, and one of them is asked at a time, in alternating order."""
    bodies, counts, plain_counts = requests_of(load), Counts(), Counts()
    each = -(-load.requests // load.rounds)
    ratios, rates, plain_rates = [], [], []
    with ExitStack() as stack:
        plain = _start(stack, folder, load, plain=True)
        for one, seen in ((server, Counts()), (plain, Counts())):
            _ask_many(one, list(range(PAIRS)), bodies, None, seen)  # the first of each kind takes longer
        for number in range(load.rounds):
            order = random.Random(seed + number).choices(range(PAIRS), k=each)

            def rate_of(one: Served, expected: Any, seen: Counts, order: list[int] = order) -> float:
                started_s = time.perf_counter()
                _ask_many(one, order, bodies, expected, seen)
                return len(order) / (time.perf_counter() - started_s)

            turns: list[Callable[[], None]] = [
                lambda: rates.append(rate_of(server, wanted, counts)),
                lambda: plain_rates.append(rate_of(plain, None, plain_counts)),
            ]
            for turn in turns if number % 2 == 0 else reversed(turns):
                turn()
            ratios.append(rates[-1] / plain_rates[-1])
        counted = _counted(server) - PAIRS
    name = f"server, {WORKERS} workers of {THREADS} threads, {CLIENTS} clients"
    rate, plain_rate, ratio = (statistics.median(values) for values in (rates, plain_rates, ratios))
    kind = "frozen" if load.frozen else "eager"
    return [
        Figure(f"{name}: right answers", str(counts.answered), str(each * load.rounds)),
        *_promises("", counts),
        Figure("answers that /metrics counts", str(counted), str(counts.answered), counted == counts.answered),
        Figure("errors of plain diffusers", _listed(plain_counts.errors), "0"),
        Figure(
            f"requests in a second, {kind} against plain diffusers, median of {load.rounds}",
            f"{rate:.1f} against {plain_rate:.1f}: {ratio:.2f} times",
            "1 time or more",
        ),
    ]


def _measure_kills(server: Served, load: Load, wanted: Sequence[Sequence[str]], *, seed: int) -> list[Figure]:
    bodies, counts, chance = requests_of(load), Counts(), random.Random(seed)
    ended, killed = threading.Event(), 0

    def client(number: int) -> None:
        order = random.Random(seed + number)
        while not ended.is_set():
            _ask_many(server, [order.randrange(PAIRS)], bodies, wanted, counts, clients=1)

    with ThreadPoolExecutor(CLIENTS) as pool:
        clients = [pool.submit(client, number) for number in range(CLIENTS)]
        try:
            while killed < load.kills:
                time.sleep(chance.uniform(0.2, 2) * load.kill_every_s)
                if alive := server.workers():
                    killed += _kill(chance.choice(alive))
            alive = _wait_for_workers(server)
        finally:
            ended.set()
        for each in clients:
            each.result()
    suffix = f", {killed} workers killed"
    return [
        Figure(f"right answers{suffix}", f"{counts.answered}, {counts.retried} of them asked again"),
        *_promises(suffix, counts),
        Figure(f"workers in the end{suffix}", str(len(alive)), str(WORKERS), len(alive) == WORKERS),
    ]


def _promises(suffix: str, counts: Counts) -> list[Figure]:
    return [
        Figure(f"errors{suffix}", _listed(counts.errors), "0", not counts.errors),
        Figure(f"answers with other bytes{suffix}", str(counts.wrong), "0", counts.wrong == 0),
        Figure(f"answers without their record{suffix}", str(counts.without_record), "0", counts.without_record == 0),
    ]


def _listed(errors: Counter[str]) -> str:
    return ", ".join(f"{number} {name}" for name, number in sorted(errors.items())) or "0"


def _kill(pid: int) -> bool:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return False
    return True


def _wait_for_workers(server: Served) -> list[int]:
    """Return the workers once as many live as were started and one of them answers, or after a while."""
    deadline_s = time.monotonic() + REQUEST_TIMEOUT_S
    while time.monotonic() < deadline_s:
        found = server.workers()
        if len(found) == WORKERS and httpx.get(f"{server.url}/healthz", timeout=REQUEST_TIMEOUT_S).is_success:
            break
        time.sleep(0.2)
    return found


def _ask_many(
    server: Served,
    order: Sequence[int],
    bodies: Sequence[Body],
    wanted: Sequence[Sequence[str]] | None,
    counts: Counts,
    *,
    clients: int = CLIENTS,
) -> None:
    """Send ``bodies`` in ``order``. ``wanted``: the digests of their pictures; ``None`` where nothing is promised."""
    local, opened = threading.local(), list[httpx.Client]()

    def client() -> httpx.Client:
        if not hasattr(local, "client"):
            local.client = httpx.Client(base_url=server.url, timeout=REQUEST_TIMEOUT_S)
            opened.append(local.client)
        found: httpx.Client = local.client
        return found

    def ask(number: int) -> None:
        retried = 0
        while True:
            try:
                response = client().post("/generate", json=bodies[number])
                break
            except httpx.TransportError as error:  # the worker died: another one draws the same
                if isinstance(error, httpx.TimeoutException):
                    raise
                retried += 1
                time.sleep(0.1)
        found = _looked_at(response) if response.status_code == 200 else None
        with counts.lock:
            counts.retried += retried
            if found is None:
                counts.errors[f"{response.status_code} {response.json()['error']}"] += 1
            elif wanted is not None and found.pixels != list(wanted[number]):
                counts.wrong += 1
            else:
                counts.answered += 1
                counts.without_record += wanted is not None and not found.has_records

    with ThreadPoolExecutor(clients) as pool:
        list(pool.map(ask, order))
    for each in opened:
        each.close()


@dataclass(frozen=True)
class _Answer:
    pixels: list[str]
    has_records: bool


def _looked_at(response: httpx.Response) -> _Answer:
    """Digests of the pictures, and whether each holds the record that the header names and that tells of it."""
    from PIL import Image

    from pipevault import read_record
    from pipevault.calls.describe import pixels_sha256
    from pipevault.errors import RecordError

    pixels, stated = [], response.headers.get("x-pipevault-record", "").split(", ")
    has_records = True
    with tempfile.TemporaryDirectory(prefix="pipevault-stress-") as folder:
        for index, data in enumerate(_pictures(response)):
            (file := Path(folder) / f"{index}.png").write_bytes(data)
            with Image.open(file) as image:
                pixels.append(pixels_sha256(image))
            try:
                record = read_record(file)
            except RecordError:
                has_records = False
                continue
            has_records &= stated[index : index + 1] == [record.digest.hex]
            has_records &= record.results["pixels"][index] == pixels[-1]
    return _Answer(pixels, has_records)


def _pictures(response: httpx.Response) -> list[bytes]:
    if response.headers["content-type"] == "image/png":
        return [response.content]
    with zipfile.ZipFile(io.BytesIO(response.content)) as archive:
        return [archive.read(name) for name in archive.namelist() if name.endswith(".png")]


def _counted(server: Served) -> int:
    text = httpx.get(f"{server.url}/metrics", timeout=REQUEST_TIMEOUT_S).text
    found = [line for line in text.splitlines() if line.startswith('pipevault_server_requests_total{outcome="ok"}')]
    return int(sum(float(line.rsplit(" ", 1)[1]) for line in found))
