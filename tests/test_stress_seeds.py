"""The short mode of ``scripts/stress_seeds.py``: its promises are kept, whatever its times are."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[1] / "scripts" / "stress_seeds.py"


def test_threads_and_records_under_load() -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-W", "ignore", str(SCRIPT), "--quick", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    figures = json.loads(done.stdout)
    assert len(figures) == 3
    assert all(figure["is_kept"] for figure in figures)
    assert "wrong bytes" in figures[0]["what"]
    assert figures[0]["measured"].startswith("0, 0 in ")
