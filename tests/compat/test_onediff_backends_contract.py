"""What pipevault relies on in OneDiff for its own backends, without OneFlow or nexfort."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pipevault.compat import nexfort, oneflow
from pipevault.errors import SettingsError


def test_onediff_sets_the_variables_that_are_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    from onediff.infer_compiler.backends.env_var import set_oneflow_default_env_vars

    for name in [name for name in os.environ if name.startswith("ONEFLOW_")]:
        monkeypatch.delenv(name)
    set_oneflow_default_env_vars()
    try:
        assert {name: os.environ[name] for name in oneflow.PINNED} == dict.fromkeys(oneflow.PINNED, "1")
        tuning = {name for name in os.environ if name.startswith("ONEFLOW_") and "TUNING" in name}
        assert tuning == set(oneflow.PINNED)
    finally:
        for name in [name for name in os.environ if name.startswith("ONEFLOW_")]:
            del os.environ[name]


def test_reading_the_variables_changes_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONEFLOW_MLIR_CSE", "0")
    before = dict(os.environ)
    found = oneflow.variables({"mlir_prefer_nhwc": False, "kernel_enable_cuda_graph": True})
    assert dict(os.environ) == before
    assert found["ONEFLOW_MLIR_CSE"] == "0"
    assert found["ONEFLOW_MLIR_PREFER_NHWC"] == "0"
    assert found["ONEFLOW_KERNEL_ENABLE_CUDA_GRAPH"] == "1"


def test_options_of_onediff_for_oneflow() -> None:
    assert oneflow.compile_options({"dynamic": False}).dynamic is False
    with pytest.raises(SettingsError, match=r"no option .quantize.\. Options: dynamic"):
        oneflow.compile_options({"quantize": True})


@pytest.mark.parametrize(
    ("given", "mode"),
    [
        ({}, "O2:cache-all"),
        ({"mode": "max-autotune"}, "max-autotune:cache-all"),
        ({"mode": "cache-all:O2"}, "cache-all:O2"),
    ],
)
def test_the_mode_of_nexfort_always_keeps_what_is_compiled(given: dict[str, str], mode: str) -> None:
    assert nexfort.compile_options(given)["mode"] == mode


def test_the_files_of_a_cache_of_nexfort(tmp_path: Path) -> None:
    for name in ("compiledgraph/fx1/entry", "ab/cab.so", "locks/cab.lock", "compiledgraph/fx2/other"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert nexfort.cached_graphs(tmp_path) == {"fx1"}
    assert list(nexfort.cached_files(tmp_path)) == ["ab/cab.so", "compiledgraph/fx1/entry", "compiledgraph/fx2/other"]
