"""Code run in a fresh interpreter, for what must not depend on the process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
SOURCE = TESTS.parent / "src"


def run_python(code: str, *, cwd: Path, **variables: str) -> str:
    """Standard output of ``code``; ``variables`` go on top of the environment."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join((str(SOURCE), str(TESTS))),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        **variables,
    }
    command = [sys.executable, "-c", code]
    finished = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=cwd, check=False)
    assert finished.returncode == 0, finished.stderr
    return finished.stdout.strip()
