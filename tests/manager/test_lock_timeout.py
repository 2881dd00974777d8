"""A miss while another process holds the key's lock: an error, or a compilation of its own where asked for."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

import pipevault
from pipelines import PlainPipeline
from pipevault.cache.outcome import Outcome
from pipevault.digest import Digest
from pipevault.errors import CannotFreezeError, LockTimeoutError
from pipevault.manager.cache import PipelineCache
from pipevault.store.vault import Vault


@pytest.fixture
def frozen(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Freezing takes no time and publishes nothing; what was frozen."""
    done: list[str] = []

    def freeze(cache: PipelineCache, pipe: Any, names: Any, shape: Any, key: Any, *rest: Any) -> Outcome:
        done.append(key.digest.hex)
        return Outcome(status="miss", key=key.digest)

    monkeypatch.setattr(PipelineCache, "_freeze_and_publish", freeze)
    return done


def key_of(cache: PipelineCache) -> Digest:
    return cache.key(PlainPipeline()).digest


def test_an_error_unless_asked_otherwise(tmp_path: Path, frozen: list[str]) -> None:
    cache = PipelineCache(tmp_path / "vault", lock_timeout_s=0)
    with cache.vault.lock(key_of(cache), timeout_s=0), pytest.raises(LockTimeoutError, match="on_lock_timeout"):
        cache.load(PlainPipeline(), batch_size=1)
    assert frozen == []


def test_a_compilation_of_its_own(
    tmp_path: Path, frozen: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PIPEVAULT_ON_LOCK_TIMEOUT", "compile")
    cache = PipelineCache(tmp_path / "vault", lock_timeout_s=0)
    key = key_of(cache)
    with cache.vault.lock(key, timeout_s=0), caplog.at_level(logging.WARNING, "pipevault"):
        pipe = cache.load(PlainPipeline(), batch_size=1)
        assert cache.vault.layout.holder_file(key).exists()
    assert pipevault.outcome(pipe).status == "miss"
    assert frozen == [key.hex]
    assert "Freezing it here too" in caplog.text


def test_a_failure_leaves_the_lock_free_and_is_not_remembered(
    tmp_path: Path, frozen: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = PipelineCache(tmp_path / "vault", lock_timeout_s=0)

    def fail(*arguments: Any) -> Outcome:
        raise CannotFreezeError("as planned")

    stand_in = PipelineCache._freeze_and_publish
    monkeypatch.setattr(PipelineCache, "_freeze_and_publish", fail)
    with pytest.raises(CannotFreezeError):
        cache.load(PlainPipeline(), batch_size=1)
    monkeypatch.setattr(PipelineCache, "_freeze_and_publish", stand_in)
    cache.load(PlainPipeline(), batch_size=1)
    assert len(frozen) == 1
    vault: Vault = cache.vault
    assert list(vault.manifests()) == []
    assert not vault.layout.holder_file(key_of(cache)).exists()
