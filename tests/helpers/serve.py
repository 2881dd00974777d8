"""Runs examples/server.py as ``python tests/helpers/serve.py MODEL …``, with the build options of the tests' vaults."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS), str(TESTS.parent / "examples")]

import server  # noqa: E402

import pipevault  # noqa: E402
from helpers.pipelines import FAST_BUILD  # noqa: E402

# Here and not below, for each worker imports this file too.
pipevault.PipelineCache = partial(pipevault.PipelineCache, build_config=FAST_BUILD)  # type: ignore[misc, assignment]

if __name__ == "__main__":
    server.main()
