"""The example server, as a process and with real clients."""

from __future__ import annotations

import io
import shutil
import signal
import sys
import threading
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
import pipevault
from pipelines import stable_diffusion
from pipevault.determinism.describe import pixels_sha256
from served import ask, prewarm, server

CALL: dict[str, Any] = {"prompt": "a cat", "num_inference_steps": 2}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    stable_diffusion(folder / "tokenizer").save_pretrained(folder / "model", safe_serialization=True)
    return folder / "model"


@pytest.fixture(scope="module")
def vault(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("served") / "vault"
    prewarm(str(model), root, "--size", "16x16")
    return root


@pytest.fixture(scope="module")
def address(model: Path, vault: Path) -> Iterator[str]:
    with server(str(model), vault, "--threads", "4", "--max-prompts", "2", "--max-steps", "50") as (address, _):
        yield address


def picture(data: bytes) -> Image.Image:
    with Image.open(io.BytesIO(data)) as image:
        image.load()
        return image


def test_a_picture_with_its_record(address: str, tmp_path: Path) -> None:
    answer = ask(address, **CALL, seed=7)
    assert (answer.status_code, answer.headers["content-type"]) == (200, "image/png")
    (tmp_path / "a.png").write_bytes(answer.content)
    record = pipevault.read_record(tmp_path / "a.png")
    assert record.seeds["root"] == 7
    assert record.results["pixels"] == [pixels_sha256(picture(answer.content))]
    assert answer.headers["x-seed"] == "7"
    assert answer.headers["x-record"] == record.of_sample(None).digest.hex
    assert set(record.graphs) == {"text_encoder", "unet", "vae.decoder"}


def test_many_clients_and_seeds(address: str) -> None:
    seeds = [1, 2, 3] * 6
    alone = {seed: pixels_sha256(picture(ask(address, **CALL, seed=seed).content)) for seed in {*seeds}}
    assert len({*alone.values()}) == 3
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda seed: ask(address, **CALL, seed=seed), seeds))
    assert [answer.status_code for answer in answers] == [200] * len(seeds)
    assert [pixels_sha256(picture(answer.content)) for answer in answers] == [alone[seed] for seed in seeds]


def test_without_a_seed_one_is_drawn_and_told(address: str) -> None:
    one, other = ask(address, **CALL), ask(address, **CALL)
    assert one.headers["x-seed"] != other.headers["x-seed"]
    again = ask(address, **CALL, seed=int(one.headers["x-seed"]))
    assert pixels_sha256(picture(again.content)) == pixels_sha256(picture(one.content))


def test_what_is_not_frozen_is_refused_with_the_reason(address: str) -> None:
    answer = ask(address, prompt=["a", "b"], num_inference_steps=2, seed=1)
    assert answer.status_code == 503
    assert answer.json()["error"] == "UnfrozenCallError"
    assert "signature that no frozen graph has" in answer.json()["reason"]


@pytest.mark.parametrize(
    ("job", "match"),
    [
        ({"prompt": "a", "seed": -7}, "greater than or equal to 0"),
        ({"prompt": "a", "seed": 2**64}, "less than"),
        ({"prompt": 5}, "valid string"),
        ({}, "Field required"),
        ({"prompt": "a", "level": "strict"}, "Extra inputs"),
        ({"prompt": ["a"] * 3}, "3 prompts"),
        ({"prompt": []}, "0 prompts"),
        ({"prompt": "a", "num_inference_steps": 51}, "51 steps"),
        ({"prompt": "a", "height": 4096, "width": 4096}, "pixels"),
        ({"prompt": "a", "height": 17, "width": 17}, "divisible by 8"),
    ],
)
def test_bad_input(address: str, job: dict[str, Any], match: str) -> None:
    answer = ask(address, **job)
    assert answer.status_code == 422
    assert match in answer.text


def test_metrics_and_health(address: str) -> None:
    ask(address, **CALL, seed=1)
    assert httpx.get(f"{address}/healthz").json() == {"ready": True, "reason": ""}
    text = httpx.get(f"{address}/metrics").text
    assert 'pipevault_requests_total{status="200"}' in text
    assert "pipevault_waiting_seconds_count" in text
    assert "pipevault_drawing_seconds_sum" in text


def test_an_empty_vault_is_told_and_a_server_that_is_told_to_stop_finishes(model: Path, tmp_path: Path) -> None:
    with server(str(model), tmp_path / "empty") as (address, process):
        health = httpx.get(f"{address}/healthz")
        assert health.status_code == 503
        assert "no usable graphs" in health.json()["reason"]
        assert "no usable graphs" in ask(address, **CALL).json()["reason"]
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0 or process.returncode == -signal.SIGTERM


def test_time_outs_a_full_queue_and_a_stop_in_between(model: Path, vault: Path) -> None:
    options = ("--threads", "1", "--max-queue", "1", "--timeout-s", "0.2", "--max-steps", "5000")
    with server(str(model), vault, *options) as (address, process):
        long: dict[str, Any] = {"prompt": "a", "num_inference_steps": 900, "seed": 1}
        with ThreadPoolExecutor(6) as pool:
            answers = [answer.status_code for answer in pool.map(lambda _: ask(address, **long), range(6))]
        assert set(answers) <= {503, 504}
        assert 503 in answers
        assert 504 in answers
        threading.Timer(0.3, lambda: process.send_signal(signal.SIGTERM)).start()
        assert process.wait(60) in (0, -signal.SIGTERM)


def test_two_workers_share_the_vault_and_count_together(model: Path, vault: Path, tmp_path: Path) -> None:
    shutil.copytree(vault, tmp_path / "vault")
    with server(str(model), tmp_path / "vault", "--workers", "2", "--threads", "2") as (address, _):
        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(lambda seed: ask(address, **CALL, seed=seed % 2), range(16)))
        assert [answer.status_code for answer in answers] == [200] * 16
        assert len({pixels_sha256(picture(answer.content)) for answer in answers}) == 2
        assert 'pipevault_requests_total{status="200"} 16.0' in httpx.get(f"{address}/metrics").text


def test_a_batch_is_a_zip(model: Path) -> None:
    with server(str(model), None, "--plain") as (address, _):
        answer = ask(address, prompt=["a", "b"], num_inference_steps=1, seed=1)
        assert answer.headers["content-type"] == "application/zip"
        with zipfile.ZipFile(io.BytesIO(answer.content)) as archive:
            assert archive.namelist() == ["0.png", "1.png"]
            assert picture(archive.read("1.png")).size == (16, 16)
