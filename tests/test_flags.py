from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from pipevault.determinism.flags import code_flags


def test_a_switch_that_changes_code_changes_the_flags() -> None:
    before = code_flags()
    torch.use_deterministic_algorithms(True)
    try:
        assert code_flags() != before
    finally:
        torch.use_deterministic_algorithms(False)
    from torch._inductor import config

    with config.patch(max_autotune=True):
        assert code_flags()["inductor_config"] != before["inductor_config"]
    assert code_flags() == before


def test_the_attention_backend_of_diffusers_counts() -> None:
    attention = pytest.importorskip("diffusers.models.attention_dispatch")
    before = code_flags()
    with attention.attention_backend("_native_math"):
        assert code_flags()["attention"]["diffusers"] == "_native_math"
    assert code_flags() == before


PRINT = "from pipevault.determinism.flags import code_flags; print(code_flags())"


def run(**environment: str) -> str:
    import os

    return subprocess.run(
        [sys.executable, "-c", PRINT], env={**os.environ, **environment}, capture_output=True, text=True, check=True
    ).stdout


def test_inductor_variables_count_and_places_do_not() -> None:
    plain = run()
    assert run(TORCHINDUCTOR_MAX_AUTOTUNE="1") != plain
    for hash_seed in ("1", "2", "3"):
        assert run(PYTHONHASHSEED=hash_seed) == plain
    assert run(TORCHINDUCTOR_CACHE_DIR="/elsewhere", HOME="/elsewhere", USER="somebody") == plain
