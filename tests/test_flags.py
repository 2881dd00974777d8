from __future__ import annotations

import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

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


def run(cwd: Path | None = None, **environment: str) -> str:
    import os

    return subprocess.run(
        [sys.executable, "-c", PRINT],
        env={**os.environ, **environment},
        cwd=cwd,
        capture_output=True,
        text=True,
        check=True,
    ).stdout


def test_inductor_variables_count_and_places_do_not() -> None:
    plain = run()
    assert run(TORCHINDUCTOR_MAX_AUTOTUNE="1") != plain
    for hash_seed in ("1", "2", "3"):
        assert run(PYTHONHASHSEED=hash_seed) == plain
    assert run(TORCHINDUCTOR_CACHE_DIR="/elsewhere", HOME="/elsewhere", USER="somebody") == plain


def test_working_directory_does_not_count(tmp_path: Path) -> None:
    import os

    path = os.pathsep.join(str(Path(entry).resolve()) for entry in sys.path if entry)
    folders = [tmp_path / name for name in ("one", "two")]
    for folder in folders:
        folder.mkdir()
    one, two = (
        run(cwd=folder, PYTHONPATH=path, PYTHONHASHSEED=str(seed), TORCHINDUCTOR_CUTLASS_DIR=str(folder))
        for seed, folder in enumerate(folders)
    )
    assert one == two


@pytest.mark.parametrize(
    ("option", "places"),
    [
        ("aot_inductor.output_path", ("/venv/one", "/venv/two")),
        ("halide.cpu_target", ("/venv/one", "/venv/two")),
        ("cpp.cxx", ((None, "/venv/one/g++"), (None, "/venv/two/g++"))),
        ("triton.debug_dump_kernel_inputs", ({"folder": "/venv/one"}, {"folder": "/venv/two"})),
    ],
)
def test_absolute_paths_in_inductors_options_do_not_count(option: str, places: tuple[Any, Any]) -> None:
    from torch._inductor import config

    flags = []
    for place in places:
        with config.patch({option: place}):
            flags.append(code_flags())
    assert flags[0] == flags[1]
    assert "/venv" not in str(flags[0])


def test_changed_options_of_inductor_are_named() -> None:
    from torch._inductor import config

    before = code_flags()
    assert before["inductor_overrides"] == {}
    with config.patch({"max_autotune": True, "triton.unique_kernel_names": config.triton.unique_kernel_names}):
        flags = code_flags()
    assert flags["inductor_overrides"] == {"max_autotune": True}
    assert flags["inductor_config"] != before["inductor_config"]
    assert code_flags() == before


def other_attention(q: Any, k: Any, v: Any, **options: Any) -> Any:
    return v * GAIN


GAIN = 1.0


def attention_with(function: Any, monkeypatch: pytest.MonkeyPatch) -> str:
    with monkeypatch.context() as patched:
        patched.setattr(torch.nn.functional, "scaled_dot_product_attention", function)
        return str(code_flags()["attention"]["function"])


def test_replaced_attention_function_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    functions = [
        torch.nn.functional.scaled_dot_product_attention,
        other_attention,
        lambda q, k, v: v,
        lambda q, k, v: v + k,
        partial(other_attention, scale=1.0),
        partial(other_attention, scale=2.0),
    ]
    seen = [attention_with(function, monkeypatch) for function in functions]
    assert seen[0] == "torch"
    assert len(set(seen)) == len(functions)
    assert seen == [attention_with(function, monkeypatch) for function in functions]
    monkeypatch.setattr(sys.modules[__name__], "GAIN", 2.0)
    assert attention_with(other_attention, monkeypatch) != seen[1]


REPLACE = """
import torch
from pipevault.determinism.flags import code_flags
def attention(q, k, v, **options):
    return v if options.get("mode") in {"a", "b", "c"} else (lambda: k)()
torch.nn.functional.scaled_dot_product_attention = attention
print(code_flags()["attention"]["function"])
"""


def test_replaced_attention_function_has_one_name_in_all_processes() -> None:
    import os

    seen = {
        subprocess.run(
            [sys.executable, "-c", REPLACE],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(seen) == 1
    assert seen.pop().startswith("attention ")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_default_dtype_counts(dtype: torch.dtype) -> None:
    before = code_flags()
    assert before["default_dtype"] == "float32"
    torch.set_default_dtype(dtype)
    try:
        assert code_flags() == {**before, "default_dtype": str(dtype).removeprefix("torch.")}
    finally:
        torch.set_default_dtype(torch.float32)
    assert code_flags() == before


def test_the_default_device_counts_by_its_type() -> None:
    before = code_flags()
    assert before["default_device"] == "cpu"
    with torch.device("meta"):
        assert code_flags() == {**before, "default_device": "meta"}
    torch.set_default_device("cpu:0")
    try:
        assert code_flags() == before
    finally:
        torch.set_default_device(None)
