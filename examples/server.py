#!/usr/bin/env python
"""Serve a diffusion pipeline over HTTP: the same seed gives the same bytes from every worker and every thread.

    python examples/server.py demo --dir /mnt/shared/vault --workers 2 --threads 4

POST /generate takes JSON, ``{"prompt": "a handwritten seven", "seed": 7}``, and answers with a PNG that holds its run
record; a list of prompts gives a ZIP of PNGs. GET /healthz tells whether the worker is ready, GET /metrics is for
Prometheus. In mode ``require`` nothing is compiled: what is not frozen answers 503 with the reason. See docs/server.md.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import json
import os
import tempfile
import threading
import zipfile
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from contextvars import copy_context
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import uvicorn
from fastapi import FastAPI, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field

OPTIONS_VARIABLE = "SERVER_OPTIONS"
METRICS_VARIABLE = "PROMETHEUS_MULTIPROC_DIR"


@dataclass(frozen=True)
class Options:
    model: str
    dir: str | None = None
    mode: str = "require"
    level: str = "repeatable"
    threads: int = 4
    max_queue: int = 64
    max_prompts: int = 8
    max_pixels: int = 1024 * 1024
    max_steps: int = 100
    timeout_s: float = 120.0
    plain: bool = False


class Job(BaseModel):
    """What a client may ask for; what it leaves out is the pipeline's default."""

    model_config = {"extra": "forbid"}

    prompt: Annotated[str, Field(max_length=10_000)] | list[Annotated[str, Field(max_length=10_000)]]
    seed: int | None = Field(None, ge=0, lt=2**64)
    num_inference_steps: int | None = Field(None, ge=1)
    guidance_scale: float | None = Field(None, ge=0, le=100)
    height: int | None = Field(None, ge=1)
    width: int | None = Field(None, ge=1)

    def arguments(self) -> dict[str, Any]:
        return {name: value for name, value in self.model_dump().items() if value is not None and name != "seed"}


class Painter:
    """A pipeline and the threads that call it. pipevault lets them take turns."""

    def __init__(self, options: Options) -> None:
        from pipevault import PipelineCache, errors
        from pipevault.opening import open_pipeline

        self.options = options
        self.pipe = open_pipeline(options.model)
        self.failure = ""
        self._plain_turn = threading.Lock()
        try:
            if not options.plain:
                PipelineCache(options.dir, mode=options.mode, level=options.level).load(self.pipe)
        except errors.MissError as error:  # the worker lives, and says what it lacks
            self.failure = str(error)
        self.threads = ThreadPoolExecutor(options.threads, thread_name_prefix="draw")
        self.in_flight = 0

    def draw(self, job: Job) -> tuple[list[bytes], Any]:
        """The PNGs, and the record of the generation."""
        import pipevault

        if self.options.plain:
            return self._draw_plainly(job), None
        output = self.pipe(**job.arguments(), seed=job.seed)
        with tempfile.TemporaryDirectory() as folder:
            files = pipevault.save(output, Path(folder) / "image.png")
            return [file.read_bytes() for file in files if file.suffix == ".png"], pipevault.record_of(output)

    def _draw_plainly(self, job: Job) -> list[bytes]:
        """The same noise from plain diffusers, whose pipelines serve one call at a time."""
        from pipevault import generators
        from pipevault.determinism.seeds import effective_seed

        count = len(job.prompt) if isinstance(job.prompt, list) else 1
        with self._plain_turn:
            images = self.pipe(**job.arguments(), generator=generators(effective_seed(job.seed), count)).images
        buffers = [io.BytesIO() for _ in images]
        for image, buffer in zip(images, buffers, strict=True):
            image.save(buffer, "PNG")
        return [buffer.getvalue() for buffer in buffers]


class Metrics:
    """Counts of this worker, or of all workers where they share a folder."""

    def __init__(self) -> None:
        from prometheus_client import Counter, Histogram

        self.requests = Counter("pipevault_requests", "Requests by HTTP status.", ["status"])
        self.waiting = Histogram("pipevault_waiting_seconds", "Time that a call waited for those of other threads.")
        self.drawing = Histogram("pipevault_drawing_seconds", "Time that a call drew.")

    def text(self) -> bytes:
        from prometheus_client import REGISTRY, CollectorRegistry, generate_latest, multiprocess

        if METRICS_VARIABLE not in os.environ:
            return generate_latest(REGISTRY)
        registry = CollectorRegistry()
        multiprocess.MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
        return generate_latest(registry)


class RefusedError(Exception):
    def __init__(self, status: int, error: str, reason: str) -> None:
        super().__init__(reason)
        self.status, self.error, self.reason = status, error, reason


def create_app() -> FastAPI:
    """The application of one worker; its options come from the environment, since workers are processes."""
    options = Options(**json.loads(os.environ[OPTIONS_VARIABLE]))
    metrics = Metrics()
    ready: list[Painter] = []

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        painter = await asyncio.to_thread(Painter, options)
        ready.append(painter)
        yield
        ready.clear()
        await asyncio.to_thread(painter.threads.shutdown)  # what runs is finished

    app = FastAPI(title="pipevault", lifespan=lifespan)

    @app.get("/healthz")
    async def healthz() -> Response:
        reason = ready[0].failure if ready else "The worker is starting or stopping."
        return JSONResponse({"ready": not reason, "reason": reason}, 503 if reason else 200)

    @app.get("/metrics")
    async def read_metrics() -> Response:
        return Response(metrics.text(), media_type="text/plain; version=0.0.4")

    @app.post("/generate")
    async def generate(job: Job) -> Response:
        try:
            if not ready:
                raise RefusedError(503, "NotReady", "The worker is starting or stopping.")
            if ready[0].failure:
                raise RefusedError(503, "MissError", ready[0].failure)
            check(job, options)
            pictures, record = await answer(ready[0], job)
        except RefusedError as refused:
            metrics.requests.labels(str(refused.status)).inc()
            headers = {"Retry-After": "1"} if refused.status == 503 else None
            return JSONResponse({"error": refused.error, "reason": refused.reason}, refused.status, headers)
        metrics.requests.labels("200").inc()
        headers = {}
        if record is not None:
            metrics.waiting.observe(record.seconds["waiting"])
            metrics.drawing.observe(record.seconds["drawing"])
            headers = {"X-Seed": str(record.seeds["root"]), "X-Record": record.digest.hex}
        if isinstance(job.prompt, str):
            return Response(pictures[0], media_type="image/png", headers=headers)
        return Response(zipped(pictures), media_type="application/zip", headers=headers)

    return app


def check(job: Job, options: Options) -> None:
    """Limits of this server; what the pipeline itself does not take is told by the pipeline."""
    prompts = job.prompt if isinstance(job.prompt, list) else [job.prompt]
    if not 1 <= len(prompts) <= options.max_prompts:
        raise RefusedError(422, "TooManyPrompts", f"{len(prompts)} prompts; give 1 to {options.max_prompts}.")
    if (job.num_inference_steps or 1) > options.max_steps:
        raise RefusedError(422, "TooManySteps", f"{job.num_inference_steps} steps; give {options.max_steps} at most.")
    pixels = (job.height or 1) * (job.width or 1)
    if pixels > options.max_pixels:
        raise RefusedError(
            422, "TooLarge", f"{job.width}x{job.height} pixels; give {options.max_pixels} in all at most."
        )


async def answer(painter: Painter, job: Job) -> tuple[list[bytes], Any]:
    """Draw in one of the threads. A generation cannot be stopped: one that took too long goes on behind the answer."""
    from pipevault import errors

    options = painter.options
    if painter.in_flight >= options.threads + options.max_queue:
        raise RefusedError(503, "Busy", f"{painter.in_flight} requests are being served.")
    painter.in_flight += 1
    run: Callable[..., Any] = copy_context().run
    future = asyncio.get_running_loop().run_in_executor(painter.threads, run, painter.draw, job)
    future.add_done_callback(lambda _: left(painter))
    try:
        return await asyncio.wait_for(asyncio.shield(future), options.timeout_s)
    except TimeoutError as error:
        if isinstance(error, errors.TurnTimeoutError):
            raise RefusedError(503, type(error).__name__, str(error)) from error
        raise RefusedError(504, "Timeout", f"The picture took longer than {options.timeout_s:g} s.") from error
    except (errors.UnfrozenCallError, errors.MissError) as error:
        raise RefusedError(503, type(error).__name__, str(error)) from error
    except (errors.BadCallError, errors.SettingsError, ValueError, TypeError) as error:
        raise RefusedError(422, type(error).__name__, str(error)) from error
    except errors.PipevaultError as error:
        raise RefusedError(500, type(error).__name__, str(error)) from error


def left(painter: Painter) -> None:
    painter.in_flight -= 1


def zipped(pictures: list[bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for index, picture in enumerate(pictures):
            archive.writestr(f"{index}.png", picture)
    return buffer.getvalue()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a folder, a repository id, or demo")
    parser.add_argument("--dir", help="the vault (default: the one in force, see `pipevault where`)")
    parser.add_argument("--mode", choices=("require", "compile"), default=Options.mode)
    parser.add_argument("--level", default=Options.level)
    parser.add_argument("--plain", action="store_true", help="plain diffusers, for comparison")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--workers", type=int, default=1, help="processes")
    for name in ("threads", "max_queue", "max_prompts", "max_pixels", "max_steps"):
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=getattr(Options, name))
    parser.add_argument("--timeout-s", type=float, default=Options.timeout_s)
    given = vars(parser.parse_args())
    host, port, workers = given.pop("host"), given.pop("port"), given.pop("workers")
    os.environ[OPTIONS_VARIABLE] = json.dumps(asdict(Options(**given)))
    with tempfile.TemporaryDirectory() as folder:
        if workers > 1:
            os.environ[METRICS_VARIABLE] = folder
        uvicorn.run(
            f"{Path(__file__).stem}:create_app",
            factory=True,
            app_dir=str(Path(__file__).parent),
            host=host,
            port=port,
            workers=workers,
            timeout_graceful_shutdown=60,
            log_level="warning",
        )


if __name__ == "__main__":
    main()
