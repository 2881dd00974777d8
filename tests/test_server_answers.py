"""How ``examples/server.py`` answers, in this process and with a stand-in that draws: errors, counters, the queue."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("httpx")
pytest.importorskip("fastapi")
pytest.importorskip("prometheus_client")

from starlette.testclient import TestClient

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

import server  # type: ignore[import-not-found, unused-ignore]

Draw = Callable[[Any], Any]


@contextmanager
def client(monkeypatch: pytest.MonkeyPatch, draw: Draw, *options: str) -> Iterator[TestClient]:
    monkeypatch.setattr(sys, "argv", ["server.py", "demo", "--plain", *options])
    monkeypatch.setattr(server, "open_plain", lambda _: draw)
    monkeypatch.setattr(server, "stop_on_signal", lambda _: None)
    with TestClient(server.create_app()) as client:
        yield client


def drawn(wanted: Any) -> Any:
    return server.Drawn({"image-0.png": b"a picture"}, 7)


def counted(client: TestClient, outcome: str) -> float:
    start = f'pipevault_server_requests_total{{outcome="{outcome}"}} '
    return sum(float(line.removeprefix(start)) for line in client.get("/metrics").text.splitlines() if start in line)


@pytest.mark.parametrize(
    ("body", "status", "outcome"),
    [
        (b'{"prompt": "a"}', 200, "ok"),
        (b'{"prompt": "\\ud800"}', 422, "InvalidRequestError"),
        (b'{"prompt": "a", "guidance_scale": NaN}', 422, "InvalidRequestError"),
        (b'{"prompt": "a", "guidance_scale": 1e999}', 422, "InvalidRequestError"),
        (b'{"prompt": 3}', 422, "InvalidRequestError"),
        (b'{"prompt": "a", "height": 8}', 422, "InvalidRequestError"),
        (b" " * (2 << 20), 413, "HTTP413"),
    ],
    ids=["good", "no unicode", "not a number", "infinite", "another type", "half a size", "large"],
)
def test_each_answer_is_json_or_a_picture_and_is_counted(
    monkeypatch: pytest.MonkeyPatch, body: bytes, status: int, outcome: str
) -> None:
    with client(monkeypatch, drawn) as asked:
        answer = asked.post("/generate", content=body, headers={"Content-Type": "application/json"})
        assert answer.status_code == status
        assert (answer.headers["x-pipevault-seed"] == "7") if status == 200 else (answer.json()["error"] == outcome)
        assert counted(asked, outcome) == 1


def test_an_unforeseen_error_of_a_pipeline_is_an_answer_and_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(wanted: Any) -> Any:
        return [][wanted.steps]  # as a scheduler does that has fewer steps

    with client(monkeypatch, fail, "--max-steps", "1000") as asked:
        answer = asked.post("/generate", json={"prompt": "a", "steps": 1000})
        assert (answer.status_code, answer.json()["error"]) == (500, "IndexError")
        assert "list index" not in answer.text  # what went wrong inside is for the log
        assert counted(asked, "IndexError") == 1


def test_what_timed_out_in_the_queue_is_never_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    started, go_on = threading.Event(), threading.Event()
    prompts: list[str] = []

    def slow(wanted: Any) -> Any:
        prompts.append(wanted.prompt)
        if wanted.prompt == "first":
            started.set()
            go_on.wait(60)
        return drawn(wanted)

    with client(monkeypatch, slow, "--threads", "1", "--timeout-s", "1") as asked, ThreadPoolExecutor(2) as pool:
        first = pool.submit(asked.post, "/generate", json={"prompt": "first"})
        assert started.wait(60)
        second = asked.post("/generate", json={"prompt": "second"})
        assert (second.status_code, second.json()["error"]) == (504, "TimedOutError")
        assert first.result().status_code == 504
        go_on.set()
        assert asked.post("/generate", json={"prompt": "third"}).status_code == 200
        assert counted(asked, "TimedOutError") == 2
    assert prompts == ["first", "third"]
