"""``examples/server.py`` as a process of its own, for tests and measurements."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil

SERVER = Path(__file__).resolve().parents[1] / "examples" / "server.py"
START_TIMEOUT_S = 180.0
STOP_TIMEOUT_S = 120.0


@dataclass(frozen=True)
class Served:
    """A server that answered when it was handed out. ``log``: the file that holds all that it printed."""

    url: str
    process: subprocess.Popen[bytes]
    log: Path

    def workers(self) -> list[int]:
        """Return the process ids of the workers that live, of a server with several."""
        children = psutil.Process(self.process.pid).children()
        return [child.pid for child in children if "spawn_main" in " ".join(_command(child))]

    def stop(self) -> int:
        """Send SIGTERM, wait for the end, and return the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(STOP_TIMEOUT_S)


@contextmanager
def served(
    *arguments: str | Path,
    log: Path,
    workers: int = 1,
    environment: Mapping[str, str] | None = None,
    script: Path = SERVER,
) -> Iterator[Served]:
    """Start a server on a free port, and yield it once all its workers answer; stop it at the end."""
    command = [sys.executable, str(script), *map(str, arguments), "--port", "0", "--workers", str(workers)]
    outside = {name: value for name, value in os.environ.items() if not name.startswith("PIPEVAULT_")}
    variables = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **outside, **(environment or {})}
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=variables)
    try:
        yield Served(_wait_until_ready(process, log, workers), process, log)
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                for child in psutil.Process(process.pid).children(recursive=True):
                    child.kill()
                process.kill()
                process.wait()


def _wait_until_ready(process: subprocess.Popen[bytes], log: Path, workers: int) -> str:
    deadline_s = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline_s:
        text = log.read_text("utf-8", "replace")
        if process.poll() is not None:
            raise RuntimeError(f"The server ended with exit code {process.returncode}:\n{text}")
        address = re.search(r"running on (http://\S+)", text)
        if address and text.count("Application startup complete") >= workers:
            httpx.get(f"{address[1]}/healthz", timeout=STOP_TIMEOUT_S)
            return address[1]
        time.sleep(0.1)
    raise RuntimeError(f"The server was not ready after {START_TIMEOUT_S:.0f} s:\n{log.read_text('utf-8', 'replace')}")


def _command(process: psutil.Process) -> list[str]:
    try:
        return list(process.cmdline())
    except psutil.Error:  # it ended meanwhile
        return []
