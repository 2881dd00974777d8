"""A miss while another process holds the lock of the plan or of a graph: an error, or a compilation of its own where
asked for.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

import pipevault
from helpers.pipelines import FAST_BUILD, PlainPipeline, draw
from pipevault.cache.outcome import PartOutcome
from pipevault.cache.pipeline_cache import PipelineCache
from pipevault.cache.rehearsal import Rehearsal
from pipevault.digest import Digest
from pipevault.errors import CannotFreezeError, LockTimeoutError
from pipevault.graphs.part import FrozenPart
from pipevault.graphs.signature import describe_call
from pipevault.key import Key
from pipevault.store.stats.summary import summary
from pipevault.store.vault import Vault

pytestmark = pytest.mark.compile


@pytest.fixture
def frozen(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Freezing takes no time and publishes no graphs; which pipelines were frozen."""
    done: list[Any] = []

    def freeze(pipe: Any, states: Any, shape: Any, **options: Any) -> Rehearsal:
        done.append(pipe)
        return Rehearsal({name: PartOutcome("frozen", "", 1) for name in states}, {}, {}, None)

    monkeypatch.setattr("pipevault.cache.session.rehearse", freeze)
    return done


def key_of(cache: PipelineCache) -> Digest:
    return cache.key(PlainPipeline()).digest


def test_an_error_unless_asked_otherwise(tmp_path: Path, frozen: list[Any]) -> None:
    cache = PipelineCache(tmp_path / "vault", lock_timeout_s=0)
    pipe = PlainPipeline()
    with cache.vault.lock(key_of(cache), timeout_s=0), pytest.raises(LockTimeoutError, match="on_lock_timeout"):
        cache.load(pipe, batch_size=1)
    assert frozen == []
    assert not isinstance(pipe.transformer, FrozenPart)


def test_a_compilation_of_its_own(
    tmp_path: Path, frozen: list[Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PIPEVAULT_ON_LOCK_TIMEOUT", "compile")
    cache = PipelineCache(tmp_path / "vault", lock_timeout_s=0)
    key = key_of(cache)
    with cache.vault.lock(key, timeout_s=0), caplog.at_level(logging.WARNING, "pipevault"):
        pipe = cache.load(PlainPipeline(), batch_size=1)
        assert cache.vault.layout.holder_file(key).exists()
    assert pipevault.outcome(pipe).key == key
    assert frozen == [pipe]
    assert "Freezing it here too" in caplog.text


def test_a_failure_leaves_the_lock_free_and_is_not_remembered(
    tmp_path: Path, frozen: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = PipelineCache(tmp_path / "vault", lock_timeout_s=0)

    def fail(*arguments: Any, **options: Any) -> Rehearsal:
        raise CannotFreezeError("as planned")

    vault: Vault = cache.vault
    with monkeypatch.context() as patch:
        patch.setattr("pipevault.cache.session.rehearse", fail)
        with pytest.raises(CannotFreezeError):
            cache.load(PlainPipeline(), batch_size=1)
    assert list(vault.manifests()) == []
    assert not vault.layout.holder_file(key_of(cache)).exists()
    cache.load(PlainPipeline(), batch_size=1)
    assert len(frozen) == 1
    assert not vault.layout.holder_file(key_of(cache)).exists()


class TestGraphs:
    """The lock of a single graph, which a call without a plan takes too."""

    @staticmethod
    def graph_lock(cache: PipelineCache) -> Digest:
        pipe = PlainPipeline()
        call = describe_call((torch.randn(1, 8, 8), torch.tensor(0.0)), {})
        return Key({**cache.part_key(pipe, "transformer").factors, "signature": call.signature.to_json()}).digest

    @pytest.mark.parametrize("shape", [{"batch_size": 1}, {}])
    def test_an_error_unless_asked_otherwise(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shape: dict[str, Any]
    ) -> None:
        monkeypatch.setattr("pipevault.graphs.inductor.build_graph", lambda *a, **k: pytest.fail("it was compiled"))
        cache = PipelineCache(tmp_path / "vault", lock_timeout_s=0, build_config=FAST_BUILD)
        with (
            cache.vault.lock(self.graph_lock(cache), timeout_s=0),
            pytest.raises(LockTimeoutError, match="on_lock_timeout"),
        ):
            draw(cache.load(PlainPipeline(), **shape))
        assert not cache.vault.layout.holder_file(key_of(cache)).exists(), "the lock of the plan stayed"
        assert list(cache.vault.manifests()) == []

    def test_a_compilation_of_its_own(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        cache = PipelineCache(tmp_path / "vault", lock_timeout_s=0, on_lock_timeout="compile", build_config=FAST_BUILD)
        with cache.vault.lock(self.graph_lock(cache), timeout_s=0), caplog.at_level(logging.WARNING, "pipevault"):
            pipe = cache.load(PlainPipeline(), batch_size=1)
        assert pipevault.outcome(pipe).status == "miss"
        assert "Freezing it here too" in caplog.text
        counts = summary(cache.vault.layout).total
        assert (counts.hits, dict(counts.misses), counts.compiled) == (0, {"absent": 1}, 1)
