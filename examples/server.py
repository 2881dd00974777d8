#!/usr/bin/env python3
"""Serve a diffusers pipeline over HTTP from a vault: one seed, one picture, whichever thread or worker draws it.

Run: ``python examples/server.py demo --dir /mnt/shared/vault --workers 2 --threads 4 --port 8000``, then::

    curl --json '{"prompt": "a handwritten seven", "seed": 7, "steps": 12}' localhost:8000/generate -o seven.png
    pipevault replay seven.png --dir /mnt/shared/vault

``POST /generate`` answers with a PNG that holds its run record, and a list of prompts with a ZIP of them as
``pipevault.save`` writes them; ``GET /healthz`` and ``GET /metrics`` are for those who watch it. A refusal is JSON:
``{"error": "UnfrozenCallError", "message": "…"}``. docs/server.md has the rest.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import json
import logging
import os
import secrets
import signal
import sys
import tempfile
import threading
import zipfile
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, TypeAlias

import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

import pipevault
from pipevault.errors import LockTimeoutError, MissError, RecordError, TurnTimeoutError, UnfrozenCallError
from pipevault.opening import open_pipeline

logger = logging.getLogger("uvicorn.error")

MAX_BODY_BYTES = 1 << 20
SECONDS_BUCKETS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)


class RefusedError(Exception):
    """A request that is not served. ``retry_after_s``: when it may be, if it is sent again as it is."""

    status = 500
    retry_after_s: int | None = None


class InvalidRequestError(RefusedError):
    status = 422


class QueueFullError(RefusedError):
    status, retry_after_s = 429, 1


class StoppingError(RefusedError):
    status, retry_after_s = 503, 5


class TimedOutError(RefusedError):
    status = 504


STATUSES: tuple[tuple[type[Exception], int, int | None], ...] = (
    (UnfrozenCallError, 503, None),  # both: the same request will find a graph only after a prewarm
    (MissError, 503, None),
    (TurnTimeoutError, 503, 1),
    (LockTimeoutError, 503, 60),
    (RecordError, 500, None),
    (ValueError, 422, None),  # BadCallError, BadSeedError, …, and those of diffusers for what it does not accept
)
"""Status and ``Retry-After`` of errors of a generation; the first that fits counts, and none is a 500."""


Prompt: TypeAlias = Annotated[str, Field(max_length=10_000)]


class Wanted(BaseModel):
    """The body of a request. What is left out is up to the pipeline; a seed that is left out is drawn."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    prompt: Prompt | Annotated[list[Prompt], Field(min_length=1)]
    seed: int | None = None
    steps: Annotated[int, Field(ge=1)] | None = None
    guidance_scale: float | None = None
    height: Annotated[int, Field(ge=1)] | None = None
    width: Annotated[int, Field(ge=1)] | None = None

    @property
    def count(self) -> int:
        return 1 if isinstance(self.prompt, str) else len(self.prompt)

    def arguments(self) -> dict[str, Any]:
        """Those of the pipeline's call."""
        named = {
            "prompt": self.prompt,
            "num_inference_steps": self.steps,
            "guidance_scale": self.guidance_scale,
            "height": self.height,
            "width": self.width,
        }
        return {name: value for name, value in named.items() if value is not None}


@dataclass(frozen=True)
class Drawn:
    """Files by name, the PNGs first; and what the headers say. ``record`` is missing for plain diffusers."""

    files: dict[str, bytes]
    seed: int
    record: pipevault.RunRecord | None = None

    def response(self) -> Response:
        """Return one picture as a PNG, several as a ZIP; ``X-Pipevault-Record`` has the digest of each one's record."""
        pictures = [name for name in self.files if name.endswith(".png")]
        headers = {"X-Pipevault-Seed": str(self.seed)}
        if self.record is not None:
            digests = [self.record.of_sample(index).digest.hex for index in range(len(pictures))]
            headers["X-Pipevault-Record"] = ", ".join(digests)
        if len(pictures) == 1:
            return Response(self.files[pictures[0]], media_type="image/png", headers=headers)
        packed = io.BytesIO()
        with zipfile.ZipFile(packed, "w") as archive:
            for name, data in self.files.items():
                archive.writestr(name, data)
        return Response(packed.getvalue(), media_type="application/zip", headers=headers)


Draw: TypeAlias = Callable[[Wanted], Drawn]


def open_vaulted(options: argparse.Namespace) -> Draw:
    """Return what draws with the frozen graphs of the vault. Any number of threads may call it."""
    cache = pipevault.PipelineCache(options.dir, mode=options.mode, level=options.level)
    shapes = [{"height": height, "width": width} for width, height in options.size]
    pipe = cache.load(open_pipeline(options.model), shapes=shapes or None)
    logger.info("%s is ready: %s", options.model, pipevault.outcome(pipe).status)

    def draw(wanted: Wanted) -> Drawn:
        output = pipe(seed=wanted.seed, **wanted.arguments())
        record = pipevault.record_of(output)
        with tempfile.TemporaryDirectory(prefix="pipevault-server-") as folder:
            written = pipevault.save(output, Path(folder) / "image.png")
            files = {path.name: path.read_bytes() for path in sorted(written, key=lambda path: path.suffix != ".png")}
        return Drawn(files, record.seeds["root"], record)

    return draw


def open_plain(options: argparse.Namespace) -> Draw:
    """Return what draws with diffusers alone, from the same generators: something to compare with."""
    pipe, one_at_a_time = open_pipeline(options.model), threading.Lock()

    def draw(wanted: Wanted) -> Drawn:
        seed = secrets.randbits(63) if wanted.seed is None else wanted.seed
        generator = pipevault.generators(seed, wanted.count)
        with one_at_a_time:  # a pipeline's scheduler has state
            images = pipe(generator=generator, **wanted.arguments()).images
        files: dict[str, bytes] = {}
        for index, image in enumerate(images):
            image.save(data := io.BytesIO(), "PNG")
            files[f"image-{index}.png"] = data.getvalue()
        return Drawn(files, seed)

    return draw


class Metrics:
    """Counters of all workers: in the files of ``PROMETHEUS_MULTIPROC_DIR`` where that is set."""

    def __init__(self) -> None:
        from prometheus_client import CollectorRegistry, Counter, Histogram, multiprocess

        shared = "PROMETHEUS_MULTIPROC_DIR" in os.environ
        own = CollectorRegistry()
        self._registry = CollectorRegistry() if shared else own
        if shared:
            multiprocess.MultiProcessCollector(self._registry)  # type: ignore[no-untyped-call]
        name = "pipevault_server_requests"
        self.requests = Counter(name, "Requests to /generate, by outcome: ok or an error", ["outcome"], registry=own)
        name = "pipevault_server_generations"
        self.generations = Counter(name, "Generations, by what the load found", ["vault"], registry=own)
        name = "pipevault_server_seconds"
        self.seconds = Histogram(name, "Seconds of a generation", ["phase"], registry=own, buckets=SECONDS_BUCKETS)

    def count(self, record: pipevault.RunRecord | None) -> None:
        """Count a picture that was drawn."""
        self.requests.labels("ok").inc()
        if record is not None:
            self.generations.labels(record.outcome).inc()
            for phase, seconds in record.seconds.items():
                self.seconds.labels(phase).observe(seconds)

    def text(self) -> bytes:
        from prometheus_client import generate_latest

        return generate_latest(self._registry)


class Service:
    """The pipeline of a worker, its threads, and the requests that wait for them."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.metrics = Metrics()
        self.stopping = False
        self.missing: MissError | None = None
        self._admitted = 0
        self._pool = ThreadPoolExecutor(options.threads, "draw")
        self._draw: Draw | None = None
        self._when_idle: Callable[[], None] | None = None

    async def load(self) -> None:
        open_it = open_plain if self.options.plain else open_vaulted
        try:
            self._draw = await asyncio.get_running_loop().run_in_executor(self._pool, open_it, self.options)
        except MissError as error:  # it lives, and says what it lacks: one that ended would end the other workers too
            self.missing = error

    def health(self) -> dict[str, Any]:
        reason = "stopping" if self.stopping else "" if self.missing is None else str(self.missing)
        return {"ready": not reason, "reason": reason}

    async def generate(self, wanted: Wanted) -> Drawn:
        """Draw in a thread of the pool. Raises :class:`RefusedError` and what a generation raises."""
        if self._draw is None:
            assert self.missing is not None
            raise self.missing
        self._check_limits(wanted)
        if self.stopping:
            raise StoppingError("This server is stopping. Send the request to another one.")
        if self._admitted >= self.options.threads + self.options.max_queue:
            raise QueueFullError(
                f"{self._admitted} requests are being drawn or wait for a thread (--max-queue). Try later."
            )
        loop = asyncio.get_running_loop()
        work: Future[Drawn] = self._pool.submit(self._draw, wanted)
        self._admitted += 1
        work.add_done_callback(lambda _: loop.call_soon_threadsafe(self._release))
        waiting = asyncio.wrap_future(work)
        await asyncio.wait([waiting], timeout=self.options.timeout_s)
        if not waiting.done():
            waiting.cancel()  # if it is drawing already it goes on, and keeps its place until it is done
            raise TimedOutError(f"The picture was not ready after {self.options.timeout_s:g} s (--timeout-s).")
        return waiting.result()

    def _check_limits(self, wanted: Wanted) -> None:
        if (wanted.height is None) != (wanted.width is None):
            raise InvalidRequestError("Give both height and width, or neither.")
        for what, value, name in (
            ("images", wanted.count, "max_batch"),
            ("steps", wanted.steps or 0, "max_steps"),
            ("pixels in each image", (wanted.height or 0) * (wanted.width or 0), "max_pixels"),
        ):
            if value > (limit := getattr(self.options, name)):
                raise InvalidRequestError(f"{value} {what} were asked for; this server draws up to {limit}.")

    def _release(self) -> None:
        self._admitted -= 1
        if self._admitted == 0 and self._when_idle is not None:
            self._when_idle()

    def stop(self, when_idle: Callable[[], None]) -> None:
        """Refuse what is new, and call ``when_idle`` once all that was admitted is drawn."""
        self.stopping, self._when_idle = True, when_idle
        if self._admitted == 0:
            when_idle()


class LimitedBody:
    """Refuses a body that is too large before it is in memory."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        size_bytes = 0

        async def limited() -> Message:
            nonlocal size_bytes
            message = await receive()
            size_bytes += len(message.get("body", b""))
            if size_bytes > MAX_BODY_BYTES:
                raise HTTPException(413, f"A request has up to {MAX_BODY_BYTES} bytes.")
            return message

        await self._app(scope, limited, send)


def refused(error: Exception) -> tuple[str, Response]:
    """Return the name of ``error`` for the metrics, and the answer."""
    name, message, retry_after_s = type(error).__name__, str(error), None
    if isinstance(error, RefusedError):
        status, retry_after_s = error.status, error.retry_after_s
    elif isinstance(error, RequestValidationError):  # without what was sent, which need not be valid JSON
        name, status = "InvalidRequestError", 422
        message = "; ".join(f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors())
    elif isinstance(error, HTTPException):
        name, status, message = f"HTTP{error.status_code}", error.status_code, error.detail
    else:
        fitting = ((status, after_s) for kind, status, after_s in STATUSES if isinstance(error, kind))
        status, retry_after_s = next(fitting, (500, None))
    if status == 500:
        logger.error("A generation failed", exc_info=error)
        message = "The picture could not be drawn; the log of the server says why."
    headers = {} if retry_after_s is None else {"Retry-After": str(retry_after_s)}
    body = json.dumps({"error": name, "message": message})
    return name, Response(body, status, headers, media_type="application/json")


def create_app() -> FastAPI:
    """Make the application of a worker, which is started with the command line of its parent."""
    service = Service(parse_arguments(sys.argv[1:]))

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await service.load()  # nothing listens before
        stop_on_signal(service)
        yield

    app = FastAPI(title="pipevault", lifespan=lifespan)
    app.add_middleware(LimitedBody)

    @app.post("/generate")
    async def generate(wanted: Wanted) -> Response:
        try:
            drawn = await service.generate(wanted)
        except Exception as error:  # whatever a pipeline raises is an answer, and the worker goes on
            return refuse(error)
        service.metrics.count(drawn.record)
        return drawn.response()

    @app.get("/healthz")
    async def healthz() -> Response:
        health = service.health()
        return JSONResponse(health, 200 if health["ready"] else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4")

    def refuse(error: Exception) -> Response:
        name, response = refused(error)
        service.metrics.requests.labels(name).inc()
        return response

    async def refuse_early(request: Request, error: Exception) -> Response:
        return refuse(error) if request.url.path == "/generate" else refused(error)[1]

    for kind in (RequestValidationError, HTTPException):
        app.add_exception_handler(kind, refuse_early)
    return app


def stop_on_signal(service: Service) -> None:
    """At the first SIGTERM or SIGINT, let what runs end before the server closes its connections."""
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        close: Any = signal.getsignal(number)

        def stop(number: int, frame: FrameType | None, close: Any = close) -> None:
            if service.stopping:
                close(number, frame)
            else:
                loop.call_soon_threadsafe(service.stop, lambda: close(number, frame))

        signal.signal(number, stop)


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("model", metavar="MODEL", help="a folder, a repository id, or demo")
    parser.add_argument("--dir", metavar="VAULT", help="the vault (default: PIPEVAULT_DIR, else the user's)")
    parser.add_argument("--mode", choices=("require", "compile"), default="require", help="default: require")
    parser.add_argument("--level", help="determinism level (default: PIPEVAULT_LEVEL, else repeatable)")
    parser.add_argument("--size", type=size, action="append", default=[], metavar="WxH", help="to have at the start")
    parser.add_argument("--plain", action="store_true", help="serve plain diffusers, to compare")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--workers", type=int, default=1, help="processes, each with a pipeline of its own")
    parser.add_argument("--threads", type=int, default=4, help="of each worker; they take turns at its pipeline")
    parser.add_argument("--max-queue", type=int, default=32, help="requests of a worker that wait for a thread")
    parser.add_argument("--max-pixels", type=int, default=1024 * 1024)
    parser.add_argument("--max-steps", type=int, default=100)
    parser.add_argument("--max-batch", type=int, default=8)
    parser.add_argument("--timeout-s", type=float, default=300.0, help="for a request, its waiting included")
    return parser.parse_args(arguments)


def size(text: str) -> tuple[int, int]:
    """Return width and height of ``512x768``."""
    width, height = text.split("x")
    return int(width), int(height)


def main() -> None:
    options = parse_arguments(sys.argv[1:])
    here = Path(__file__)
    with tempfile.TemporaryDirectory(prefix="pipevault-metrics-") as folder:
        if options.workers > 1:
            os.environ.setdefault("PROMETHEUS_MULTIPROC_DIR", folder)
        uvicorn.run(
            f"{here.stem}:create_app",
            factory=True,
            app_dir=str(here.parent),
            host=options.host,
            port=options.port,
            workers=options.workers,
            access_log=False,
            # Long enough for a worker that imports torch on a busy machine; as long as this may it take until one
            # that is killed just while it is asked is replaced.
            timeout_worker_healthcheck=20,
        )


if __name__ == "__main__":
    main()
