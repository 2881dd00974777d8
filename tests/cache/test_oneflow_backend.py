"""Backend ``oneflow``: onediffx's compile_pipe, a run, save_pipe and load_pipe, with a stand-in for its modules."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import onediffx
import pytest
import torch
from onediff.infer_compiler.backends import registry
from torch import nn

import pipevault
from helpers.oneflow_stand_in import StandIn, StandInGraph, stand_in_backend
from helpers.pipelines import Denoiser, PlainPipeline, draw
from pipevault.compat import oneflow
from pipevault.compat.onediffx import load_parts, save_parts
from pipevault.errors import (
    BadCallError,
    CannotFreezeError,
    ChangedPartError,
    CorruptEntryError,
    LockTimeoutError,
    MissError,
    NothingFrozenError,
    SettingsError,
    UnusableBackendError,
    VaultFullError,
)
from pipevault.graphs.part import FrozenPart
from pipevault.store.bundle import export_bundle, import_bundle
from pipevault.store.layout import Layout
from pipevault.store.locks.leases import live_leases
from pipevault.store.vault import Vault

WARM_UP = "ONEFLOW_CONV2D_KERNEL_ENABLE_TUNING_WARMUP"


@pytest.fixture(autouse=True)
def _stand_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(registry._BACKENDS, "oneflow", stand_in_backend())
    monkeypatch.setattr(StandIn, "builds", 0)
    monkeypatch.setattr(StandIn, "calls", [])
    before = {name: value for name, value in os.environ.items() if name.startswith("ONEFLOW_")}
    yield
    for name in [name for name in os.environ if name.startswith("ONEFLOW_")]:
        del os.environ[name]
    os.environ.update(before)


def use(monkeypatch: pytest.MonkeyPatch, kind: type[StandIn]) -> None:
    monkeypatch.setitem(registry._BACKENDS, "oneflow", stand_in_backend(kind))


def cache_of(folder: Path, **settings: Any) -> pipevault.PipelineCache:
    return pipevault.PipelineCache(folder / "vault", backend="oneflow", **settings)


def loaded(folder: Path, **settings: Any) -> PlainPipeline:
    return cache_of(folder, **settings).load(PlainPipeline())


class TestMissAndHit:
    def test_a_miss_compiles_runs_saves_and_loads_what_it_saved(self, tmp_path: Path) -> None:
        pipe = loaded(tmp_path)
        steps = list(dict.fromkeys(StandIn.calls))
        assert steps == ["compile", "run", "save", "load"]
        outcome = pipevault.outcome(pipe)
        assert (outcome.status, outcome.stored, outcome.parts["transformer"].status) == ("miss", True, "frozen")
        assert isinstance(pipe.transformer, Denoiser)
        assert StandIn.builds == 1

    def test_a_hit_builds_nothing_and_draws_the_same_bits_from_the_first_call_on(self, tmp_path: Path) -> None:
        expected = draw(loaded(tmp_path))
        StandIn.builds = 0
        pipe = loaded(tmp_path, mode="require")
        assert pipevault.outcome(pipe).status == "hit"
        assert torch.equal(draw(pipe), expected)
        assert torch.equal(draw(pipe), expected)
        assert StandIn.builds == 0
        assert not torch.equal(draw(PlainPipeline()), expected)

    def test_seeds_and_records_work(self, tmp_path: Path) -> None:
        pipe: Any = loaded(tmp_path)
        first, again = pipe("a cat", seed=3), pipe("a cat", seed=3)
        assert torch.equal(first, again)
        assert pipevault.record_of(again).seeds["root"] == 3

    def test_require_without_an_entry(self, tmp_path: Path) -> None:
        loaded(tmp_path)
        with pytest.raises(MissError, match=r"nothing that oneflow compiled .*call\.batch_size"):
            cache_of(tmp_path, mode="require").load(PlainPipeline(), batch_size=2)

    def test_explain_and_key(self, tmp_path: Path) -> None:
        cache, pipe = cache_of(tmp_path), PlainPipeline()
        assert cache.explain(pipe).status == "miss"
        cache.load(pipe)
        assert cache.explain(pipevault.unload(pipe)).status == "hit"
        assert cache.key(pipe).factors["toolchain"]["oneflow"] == "none"

    def test_a_damaged_entry_is_a_miss_and_heals(self, tmp_path: Path) -> None:
        loaded(tmp_path)
        [artifact] = [path for path in (tmp_path / "vault" / "artifacts").rglob("*") if path.is_file()]
        artifact.chmod(0o600)
        artifact.write_bytes(b"x" * artifact.stat().st_size)
        outcome = pipevault.outcome(loaded(tmp_path))
        assert outcome.status == "miss"
        assert "damaged" in outcome.reason
        assert pipevault.outcome(loaded(tmp_path, mode="require")).status == "hit"

    def test_a_vault_that_is_full(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(self: Vault, *arguments: Any) -> None:
            raise VaultFullError("no space left", self.root)

        monkeypatch.setattr(Vault, "publish", fail)
        pipe = loaded(tmp_path)
        outcome = pipevault.outcome(pipe)
        assert (outcome.status, outcome.stored, outcome.problems) == ("miss", False, ("not stored: no space left",))
        assert torch.equal(draw(pipe), draw(pipe))
        assert StandIn.builds == 1

    def test_another_process_that_compiles_the_same(self, tmp_path: Path) -> None:
        cache = cache_of(tmp_path, lock_timeout_s=0)
        with cache.vault.lock(cache.key(PlainPipeline()).digest, timeout_s=1):
            with pytest.raises(LockTimeoutError):
                cache.load(PlainPipeline())
            other = cache_of(tmp_path, lock_timeout_s=0, on_lock_timeout="compile")
            assert pipevault.outcome(other.load(PlainPipeline())).status == "miss"

    def test_it_travels_in_a_bundle(self, tmp_path: Path) -> None:
        cache = cache_of(tmp_path)
        pipe = cache.load(PlainPipeline())
        expected = draw(pipe)
        key = pipevault.outcome(pipe).key
        assert key is not None
        export_bundle(cache.vault, [key], tmp_path / "entry.pvb")
        other = cache_of(tmp_path / "other")
        import_bundle(other.vault, tmp_path / "entry.pvb")
        assert torch.equal(draw(loaded(tmp_path / "other", mode="require")), expected)


class TestVariables:
    def test_run_time_tuning_is_pinned_and_every_variable_is_a_factor(self, tmp_path: Path) -> None:
        key = cache_of(tmp_path).key(PlainPipeline())
        variables = key.factors["backend"]["variables"]
        assert {name: variables[name] for name in oneflow.PINNED} == dict.fromkeys(oneflow.PINNED, "0")
        assert variables["ONEFLOW_MLIR_CSE"] == "1"
        assert not any(name.startswith("ONEFLOW_") for name in os.environ)
        loaded(tmp_path)
        assert os.environ[WARM_UP] == "0"
        assert cache_of(tmp_path).key(PlainPipeline()) == key

    def test_another_value_is_another_key(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        loaded(tmp_path)
        monkeypatch.setenv(WARM_UP, "1")
        with pytest.raises(MissError, match=f"backend.variables.{WARM_UP}: '0' in the vault, '1' here"):
            loaded(tmp_path, mode="require")

    def test_options_are_onediffs(self, tmp_path: Path) -> None:
        variables = cache_of(tmp_path, build_config={"mlir_cse": False}).key(PlainPipeline()).factors["backend"]
        assert variables["variables"]["ONEFLOW_MLIR_CSE"] == "0"
        with pytest.raises(SettingsError, match="Did you mean use_graph"):
            cache_of(tmp_path, build_config={"use_graf": True})
        with pytest.raises(SettingsError, match="the vault keeps them"):
            cache_of(tmp_path, build_config={"graph_file": "graph"})
        with pytest.raises(SettingsError, match="compile_profile 'max' is one of backend 'inductor'"):
            cache_of(tmp_path, compile_profile="max")
        with pytest.raises(SettingsError, match="takes the live weights"):
            cache_of(tmp_path, weights="baked")


class TestWhatIsAnError:
    def test_a_run_after_which_nothing_has_a_graph(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(StandInGraph, "is_compiled", False)
        pipe, eager = PlainPipeline(), PlainPipeline().transformer
        with pytest.raises(NothingFrozenError, match="there is nothing to save"):
            cache_of(tmp_path).load(pipe)
        assert type(pipe.transformer) is type(eager)
        with pytest.raises(SettingsError, match="was not loaded"):
            pipevault.outcome(pipe)

    def test_a_save_that_writes_nothing(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(StandIn, "save_graph", lambda self, path: None)
        with pytest.raises(NothingFrozenError, match="save_pipe wrote nothing for transformer"):
            loaded(tmp_path)

    def test_a_load_that_leaves_no_graph(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        loaded(tmp_path)
        monkeypatch.setattr(StandIn, "load_graph", lambda self, path: None)
        pipe = PlainPipeline()
        with pytest.raises(CorruptEntryError, match="load_pipe left transformer without a graph"):
            cache_of(tmp_path).load(pipe)
        assert type(pipe.transformer) is Denoiser

    @pytest.mark.parametrize("method", ["load_graph", "save_graph"])
    def test_a_part_that_lacks_a_method(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
        monkeypatch.delattr(StandIn, method)
        with pytest.raises(CannotFreezeError, match=f"transformer cannot be kept: .* has no {method}"):
            loaded(tmp_path)
        assert "run" not in StandIn.calls

    def test_a_part_that_is_no_deployable_module(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(registry._BACKENDS, "oneflow", lambda module, options=None: nn.Identity())
        with pytest.raises(CannotFreezeError, match="which is not a DeployableModule"):
            loaded(tmp_path)

    def test_an_output_that_is_not_the_eager_one(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(StandInGraph, "build", lambda self: setattr(self, "factor", 1.5))
        with pytest.raises(NothingFrozenError, match="does not draw what the eager PlainPipeline does"):
            loaded(tmp_path)
        assert cache_of(tmp_path).explain(PlainPipeline()).status == "miss"

    def test_parts_that_are_missing_in_a_folder(self, tmp_path: Path) -> None:
        pipe = onediffx.compile_pipe(PlainPipeline(), backend="oneflow", options=oneflow.compile_options({}))
        parts = {"transformer": pipe.transformer}
        with pytest.raises(NothingFrozenError, match="None of transformer has a graph"):
            save_parts(parts, tmp_path)
        with pytest.raises(CorruptEntryError, match="has no graph of transformer"):
            load_parts(parts, tmp_path, ["transformer"])
        draw(pipe)
        assert save_parts(parts, tmp_path) == ("transformer",)
        with pytest.raises(CorruptEntryError, match="has no graph of unet"):
            load_parts(parts, tmp_path, ["transformer", "unet"])

    def test_several_shapes(self, tmp_path: Path) -> None:
        with pytest.raises(BadCallError, match="takes one call shape, not 2"):
            cache_of(tmp_path).load(PlainPipeline(), shapes=[{"batch_size": 1}, {"batch_size": 2}])
        with pytest.raises(BadCallError, match="'oneflow' keeps single sizes"):
            cache_of(tmp_path).load(PlainPipeline(), batch_size=(1, 2))

    def test_a_part_that_was_changed(self, tmp_path: Path) -> None:
        pipe = loaded(tmp_path)
        pipe.transformer._torch_module.mix.register_forward_hook(lambda *arguments: None)
        with pytest.raises(ChangedPartError, match="hook"):
            draw(pipe)

    def test_a_part_that_was_replaced(self, tmp_path: Path) -> None:
        pipe = loaded(tmp_path)
        pipe.transformer = Denoiser().eval()
        with pytest.raises(ChangedPartError, match="replaced by another Denoiser"):
            draw(pipe)


class TestGivingBack:
    def test_unload(self, tmp_path: Path) -> None:
        pipe = loaded(tmp_path)
        eager = pipevault.unload(pipe)
        assert type(eager) is PlainPipeline
        assert torch.equal(draw(eager), draw(PlainPipeline()))

    @pytest.mark.parametrize("backend", ["oneflow", "inductor"])
    def test_a_load_that_fails_leaves_the_one_before(self, tmp_path: Path, backend: str) -> None:
        pipe = loaded(tmp_path)
        compiled, told, expected = pipe.transformer, pipevault.status(pipe), draw(pipe)
        with pytest.raises(MissError):
            pipevault.PipelineCache(tmp_path / "vault", backend=backend, mode="require").load(pipe, batch_size=2)
        assert pipe.transformer is compiled
        assert pipevault.status(pipe) == told
        assert live_leases(Layout(tmp_path / "vault")).keys() == {told.key}
        assert torch.equal(draw(pipe), expected)
        assert type(pipevault.unload(pipe).transformer) is Denoiser
        assert not live_leases(Layout(tmp_path / "vault"))

    def test_a_load_that_fails_leaves_the_graphs_of_this_package(self, tmp_path: Path, plain_vault: Path) -> None:
        from helpers.pipelines import FAST_BUILD

        vault = shutil.copytree(plain_vault, tmp_path / "plain")
        pipe = pipevault.PipelineCache(vault, mode="require", build_config=FAST_BUILD).load(PlainPipeline())
        frozen, told, expected = pipe.transformer, pipevault.status(pipe), draw(pipe)
        with pytest.raises(MissError):
            cache_of(tmp_path, mode="require").load(pipe)
        assert pipe.transformer is frozen
        assert pipevault.status(pipe) == told
        assert torch.equal(draw(pipe), expected)
        assert live_leases(Layout(vault))

    def test_another_backend_afterwards(self, tmp_path: Path, plain_vault: Path) -> None:
        from helpers.pipelines import FAST_BUILD

        pipe = loaded(tmp_path)
        vault = shutil.copytree(plain_vault, tmp_path / "plain")
        pipevault.PipelineCache(vault, mode="require", build_config=FAST_BUILD).load(pipe, batch_size=1)
        assert isinstance(pipe.transformer, FrozenPart)
        assert pipevault.outcome(loaded_again := cache_of(tmp_path).load(pipe)).status == "hit"
        assert not isinstance(loaded_again.transformer, FrozenPart)


class TestWhatCannotBeUsedHere:
    def test_oneflow_that_is_not_installed(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delitem(registry._BACKENDS, "oneflow")
        with pytest.raises(UnusableBackendError, match="OneFlow, which is not installed") as caught:
            cache_of(tmp_path)
        assert caught.value.backend == "oneflow"
        assert not (tmp_path / "vault").exists()

    def test_a_oneflow_that_is_too_old(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delitem(registry._BACKENDS, "oneflow")
        (tmp_path / "oneflow").mkdir()
        (tmp_path / "oneflow" / "__init__.py").write_text("raise RuntimeError('imported')")
        monkeypatch.syspath_prepend(str(tmp_path))
        with pytest.raises(UnusableBackendError, match=r"needs the module oneflow/framework/args_tree\.py"):
            cache_of(tmp_path)

    def test_nexfort_beside_this_torch(self, tmp_path: Path) -> None:
        with pytest.raises(UnusableBackendError, match=r"'nexfort' needs torch 2\.4, and this is torch") as caught:
            pipevault.PipelineCache(tmp_path / "vault", backend="nexfort")
        assert caught.value.backend == "nexfort"
        assert "nexfort" not in sys.modules
        assert not (tmp_path / "vault").exists()

    @pytest.mark.parametrize(("version", "usable"), [("2.4.0+cu121", True), ("2.4.1", True), ("2.40.0", False)])
    def test_versions_of_torch_for_nexfort(self, monkeypatch: pytest.MonkeyPatch, version: str, usable: bool) -> None:
        from pipevault.compat import nexfort

        fake: Any = ModuleType("torch")
        fake.__version__ = version
        monkeypatch.setitem(sys.modules, "torch", fake)
        with pytest.raises(UnusableBackendError, match="is not installed" if usable else "needs torch 2"):
            nexfort.require_nexfort()

    def test_mode_off_needs_no_backend(self, tmp_path: Path) -> None:
        pipe = pipevault.PipelineCache(tmp_path / "vault", backend="nexfort", mode="off").load(PlainPipeline())
        assert pipevault.outcome(pipe).status == "off"
