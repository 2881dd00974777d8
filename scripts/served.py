"""The example server as a process, over a tiny model and a vault that was prewarmed by the command line."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

ROOT = Path(__file__).parents[1]
START_S = 120.0
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    # As FAST_BUILD, for processes: the vault and its readers must agree on it.
    "AOT_INDUCTOR_COMPILE_WRAPPER_OPT_LEVEL": "O0",
}


def environment() -> dict[str, str]:
    return {**{k: v for k, v in os.environ.items() if not k.startswith("PIPEVAULT_")}, **ENVIRONMENT}


def prewarm(model: str, vault: Path, *options: str) -> None:
    command = [sys.executable, "-m", "pipevault", "prewarm", model, "--dir", str(vault), *options]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


@contextmanager
def server(model: str, vault: Path | None, *options: str) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """The address of a server that answers, and its process."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    where = [] if vault is None else ["--dir", str(vault)]
    command = [sys.executable, str(ROOT / "examples" / "server.py"), model, *where, "--port", str(port), *options]
    process = subprocess.Popen(command, env=environment())
    address = f"http://127.0.0.1:{port}"
    try:
        wait_until_up(address, process)
        yield address, process
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def wait_until_up(address: str, process: subprocess.Popen[bytes]) -> None:
    deadline_s = time.monotonic() + START_S
    while time.monotonic() < deadline_s:
        assert process.poll() is None, "the server ended"
        try:
            if httpx.get(f"{address}/healthz", timeout=5).json():
                return
        except httpx.TransportError:
            time.sleep(0.1)
    raise AssertionError("the server does not answer")


def ask(address: str, **job: Any) -> httpx.Response:
    return httpx.post(f"{address}/generate", json=job, timeout=120)
