"""``examples/server.py`` as a process, asked by real clients."""

from __future__ import annotations

import io
import os
import signal
import sys
import time
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import pipevault
from helpers.pipelines import FAST_BUILD, stable_diffusion

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

httpx = pytest.importorskip("httpx")
pytest.importorskip("fastapi")

from served import Served, served  # type: ignore[import-not-found, unused-ignore]  # noqa: E402

pytestmark = pytest.mark.slow

SERVE = ROOT / "tests" / "helpers" / "serve.py"
WAIT_S = 120.0


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    stable_diffusion(folder / "tokenizer").save_pretrained(folder / "model")
    return folder / "model"


@pytest.fixture(scope="module")
def server(model: Path, frozen_vault: Path) -> Iterator[Served]:
    """Two workers that must never compile."""
    log = model.parent / "server.log"
    with served(model, "--dir", frozen_vault, "--max-pixels", "4096", log=log, workers=2, script=SERVE) as server:
        yield server


@pytest.fixture(scope="module")
def direct(model: Path, frozen_vault: Path) -> Any:
    """The pipeline that the server loads, in this process."""
    from pipevault.opening import open_pipeline

    cache = pipevault.PipelineCache(frozen_vault, mode="require", build_config=FAST_BUILD)
    return cache.load(open_pipeline(str(model)))


def ask(server: Served, **body: Any) -> Any:
    body = {"prompt": "a cat", "steps": 3, **body}
    return httpx.post(f"{server.url}/generate", json=body, timeout=WAIT_S)


def pixels(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)))


def record_in(data: bytes, folder: Path) -> pipevault.RunRecord:
    (folder / "answer.png").write_bytes(data)
    return pipevault.read_record(folder / "answer.png")


def metric(server: Served, line: str) -> float:
    text = httpx.get(f"{server.url}/metrics", timeout=WAIT_S).text
    return sum(float(each.rsplit(" ", 1)[1]) for each in text.splitlines() if each.startswith(f"{line} "))


def test_a_picture_is_that_of_a_direct_call_and_holds_its_record(
    server: Served, direct: Any, frozen_vault: Path, tmp_path: Path
) -> None:
    response = ask(server, seed=7)
    assert (response.status_code, response.headers["content-type"]) == (200, "image/png")
    wanted = direct("a cat", num_inference_steps=3, seed=7)
    assert np.array_equal(pixels(response.content), np.asarray(wanted.images[0]))
    record = record_in(response.content, tmp_path)
    assert record.outcome == "hit"
    assert record.results["pixels"] == pipevault.record_of(wanted).results["pixels"]
    assert record.digest.hex == response.headers["x-pipevault-record"]
    assert response.headers["x-pipevault-seed"] == str(record.seeds["root"]) == "7"
    assert pipevault.replay(tmp_path / "answer.png", direct, dir=frozen_vault).equal


def test_a_seed_that_is_left_out_is_drawn_and_told(server: Served, tmp_path: Path) -> None:
    first, second = ask(server), ask(server)
    seeds = [int(response.headers["x-pipevault-seed"]) for response in (first, second)]
    assert seeds[0] != seeds[1]
    assert np.array_equal(pixels(ask(server, seed=seeds[0]).content), pixels(first.content))


def test_clients_that_ask_for_one_seed_at_once_get_one_picture(server: Served, direct: Any) -> None:
    with ThreadPoolExecutor(8) as pool:
        responses = list(pool.map(lambda number: ask(server, seed=number % 2), range(16)))
    assert [response.status_code for response in responses] == [200] * 16
    wanted = [np.asarray(direct("a cat", num_inference_steps=3, seed=seed).images[0]) for seed in (0, 1)]
    assert not np.array_equal(wanted[0], wanted[1])
    assert all(np.array_equal(pixels(each.content), wanted[number % 2]) for number, each in enumerate(responses))


def test_what_is_not_frozen_is_refused_with_the_reason(server: Served) -> None:
    before = metric(server, 'pipevault_server_requests_total{outcome="UnfrozenCallError"}')
    response = ask(server, seed=7, prompt=["a cat", "a dog"])
    assert (response.status_code, response.headers["content-type"]) == (503, "application/json")
    assert "retry-after" not in response.headers
    answer = response.json()
    assert answer["error"] == "UnfrozenCallError"
    assert "frozen" in answer["message"]
    assert metric(server, 'pipevault_server_requests_total{outcome="UnfrozenCallError"}') == before + 1
    assert ask(server, seed=7).status_code == 200


BAD = {
    "no seed": ({"seed": -4}, "BadSeedError", "The seed -4 is out of range"),
    "no size": ({"height": 17, "width": 16}, "ValueError", "divisible by 8"),
    "half a size": ({"height": 16}, "InvalidRequestError", "both height and width"),
    "too many pixels": ({"height": 80, "width": 80}, "InvalidRequestError", "6400 pixels in each image"),
    "too many steps": ({"steps": 101}, "InvalidRequestError", "101 steps"),
    "too many images": ({"prompt": ["a"] * 9}, "InvalidRequestError", "9 images"),
    "a long prompt": ({"prompt": "a" * 10_001}, "InvalidRequestError", "at most 10000 characters"),
    "no prompts": ({"prompt": []}, "InvalidRequestError", "at least 1 item"),
    "another type": ({"steps": "many"}, "InvalidRequestError", "body.steps: Input should be a valid integer"),
    "an unknown field": ({"size": 3}, "InvalidRequestError", "body.size: Extra inputs are not permitted"),
}


@pytest.mark.parametrize(("body", "error", "message"), BAD.values(), ids=BAD.keys())
def test_bad_input_is_refused_with_what_is_wrong(
    server: Served, body: dict[str, Any], error: str, message: str
) -> None:
    response = ask(server, **body)
    assert (response.status_code, response.json()["error"]) == (422, error)
    assert message in response.json()["message"]


@pytest.mark.parametrize(
    ("content", "status"),
    [
        (b'{"prompt": "a", "guidance_scale": NaN}', 422),
        (b'{"prompt": "\\ud800", "\\ud800": 1}', 422),
        (b"{", 422),
        (b"[" * 100_000, 400),
        (b" " * (2 << 20), 413),
    ],
    ids=["not finite", "no unicode", "no JSON", "deep", "large"],
)
def test_a_hostile_body_is_refused_in_json(server: Served, content: bytes, status: int) -> None:
    headers = {"Content-Type": "application/json"}
    response = httpx.post(f"{server.url}/generate", content=content, headers=headers, timeout=WAIT_S)
    assert response.status_code == status
    assert response.json()["message"]


def test_metrics_of_all_workers_are_counted_together(server: Served) -> None:
    names = (
        'pipevault_server_requests_total{outcome="ok"}',
        'pipevault_server_generations_total{vault="hit"}',
        'pipevault_server_seconds_count{phase="drawing"}',
        'pipevault_server_seconds_count{phase="waiting"}',
    )
    before = [metric(server, name) for name in names]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda seed: ask(server, seed=seed), range(10)))
    assert [metric(server, name) for name in names] == [value + 10 for value in before]


def test_a_client_that_goes_away_and_a_worker_that_is_killed_change_nothing(server: Served, direct: Any) -> None:
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{server.url}/generate", json={"prompt": "a cat", "steps": 100}, timeout=0.05)
    before = server.workers()
    assert len(before) == 2
    os.kill(before[0], signal.SIGKILL)
    wanted = np.asarray(direct("a cat", num_inference_steps=3, seed=3).images[0])
    deadline_s = time.monotonic() + WAIT_S
    while len(now := server.workers()) < 2 or before[0] in now:
        assert time.monotonic() < deadline_s
        try:
            response = ask(server, seed=3)
        except httpx.TransportError:  # it was that worker's
            continue
        assert np.array_equal(pixels(response.content), wanted)
    assert before[1] in now


@pytest.fixture(scope="module")
def eager_server(model: Path) -> Iterator[Served]:
    """One worker without a vault, that has little patience."""
    limits = ("--threads", "2", "--max-queue", "1", "--max-steps", "1000", "--timeout-s", "2")
    arguments = (model, "--mode", "compile", "--dir", model.parent / "vault", *limits)
    environment = {"PIPEVAULT_ON_UNFROZEN": "eager", "PIPEVAULT_TURN_TIMEOUT_S": "0.3"}
    with served(*arguments, log=model.parent / "eager.log", environment=environment, script=SERVE) as server:
        yield server


def test_several_prompts_come_as_a_zip_with_records(eager_server: Served, tmp_path: Path) -> None:
    response = ask(eager_server, prompt=["a cat", "a dog"], seed=7)
    one = ask(eager_server, prompt=["a cat"], seed=7)
    assert one.headers["content-type"] == "image/png"
    digests = response.headers["x-pipevault-record"].split(", ")
    with zipfile.ZipFile(io.BytesIO(response.content)) as archive:
        assert archive.namelist() == ["image-0.png", "image-1.png", "image-0.png.json", "image-1.png.json"]
        records = [record_in(archive.read(f"image-{index}.png"), tmp_path) for index in range(2)]
    assert [record.digest.hex for record in records] == digests
    assert [record.sample for record in records] == [0, 1]


def test_what_waits_too_long_is_refused(eager_server: Served) -> None:
    """One request draws, one waits for its turn, one for a thread, and there is no room for a fourth."""
    ask(eager_server, steps=1)  # the first of its kind takes longer
    with ThreadPoolExecutor(8) as pool:
        slow = pool.submit(ask, eager_server, steps=500)
        time.sleep(0.3)
        answers = list(pool.map(lambda _: ask(eager_server, steps=1), range(5)))
    assert {response.status_code for response in answers} == {429, 503}
    assert {response.headers["retry-after"] for response in answers} == {"1"}
    assert {response.json()["error"] for response in answers} == {"QueueFullError", "TurnTimeoutError"}
    assert slow.result().status_code == 504
    assert "not ready after 2 s" in slow.result().json()["message"]


def test_an_empty_vault_is_told(model: Path, tmp_path: Path) -> None:
    with served(model, "--dir", tmp_path / "vault", log=tmp_path / "log") as server:
        health, answer = httpx.get(f"{server.url}/healthz", timeout=WAIT_S), ask(server)
    assert (health.status_code, answer.status_code, answer.json()["error"]) == (503, 503, "MissError")
    assert health.json() == {"ready": False, "reason": answer.json()["message"]}


def test_sigterm_lets_what_runs_end_and_refuses_what_is_new(model: Path, tmp_path: Path) -> None:
    """With plain diffusers, so that what it draws is looked at too."""
    with served(model, "--plain", log=tmp_path / "log", script=SERVE) as server, ThreadPoolExecutor(2) as pool:
        quick = ask(server, seed=7)
        assert "x-pipevault-record" not in quick.headers
        running = pool.submit(ask, server, seed=7, steps=100)
        time.sleep(0.3)
        stopped = pool.submit(server.stop)
        answers = set()
        while not stopped.done():
            try:
                answers.add(httpx.get(f"{server.url}/healthz", timeout=WAIT_S).status_code)
                answers.add(ask(server).status_code)
            except httpx.TransportError:  # nothing listens any more
                break
        assert running.result().status_code == 200
        assert 503 in answers
        assert stopped.result() in (0, -signal.SIGTERM)
    from pipevault.opening import open_pipeline

    wanted = open_pipeline(str(model))("a cat", num_inference_steps=3, generator=pipevault.generators(7, 1)).images[0]
    assert np.array_equal(pixels(quick.content), np.asarray(wanted))
