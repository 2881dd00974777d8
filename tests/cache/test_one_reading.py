"""How often a hit reads what it loads."""

from __future__ import annotations

import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import pipevault
from helpers.pipelines import FAST_BUILD, PlainPipeline, draw
from pipevault.digest import Digest
from pipevault.errors import UnfrozenCallError
from pipevault.store.locks.leases import live_leases
from pipevault.store.manifest import Manifest
from pipevault.store.trust.signing_keys import write_key_pair
from pipevault.store.vault import Vault


@pytest.fixture(autouse=True)
def _no_compiling(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("pipevault.graphs.inductor.build_graph", lambda *_, **__: pytest.fail("something was compiled"))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


@pytest.fixture
def shared(plain_vault: Path, tmp_path: Path) -> Path:
    """Holds a plan and its graph."""
    return shutil.copytree(plain_vault, tmp_path / "shared")


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Counter[Digest]:
    """How often the manifest of each key was read."""
    counted: Counter[Digest] = Counter()
    real = Vault.read_entry

    def counting(vault: Vault, key: Digest) -> Any:
        counted[key] += 1
        return real(vault, key)

    monkeypatch.setattr(Vault, "read_entry", counting)
    return counted


def cache(root: Path, **options: Any) -> pipevault.PipelineCache:
    return pipevault.PipelineCache(root, **{"mode": "require", "build_config": FAST_BUILD, **options})


def manifests(root: Path) -> dict[str, Manifest]:
    return {entry.key.kind: entry for entry in Vault.open(root).manifests() if isinstance(entry, Manifest)}


class TestOneReading:
    @pytest.mark.parametrize("mode", ["compile", "require"])
    def test_a_hit_reads_each_manifest_once(self, shared: Path, reads: Counter[Digest], mode: str) -> None:
        found = manifests(shared)
        cache(shared, mode=mode).load(PlainPipeline(), batch_size=1)
        assert reads == {entry.key.digest: 1 for entry in found.values()}

    def test_so_does_a_graph_that_is_opened_later(self, shared: Path, reads: Counter[Digest]) -> None:
        graph = manifests(shared)["graph"].key.digest
        pipe = cache(shared).load(PlainPipeline())
        draw(pipe)
        assert reads == {graph: 1}
        assert live_leases(Vault.open(shared).layout).keys() == {graph}

    def test_an_entry_that_was_removed_meanwhile_is_a_miss(self, shared: Path) -> None:
        pipe = cache(shared).load(PlainPipeline())
        vault = Vault.open(shared)
        vault.remove(vault.plan_removal([manifests(shared)["graph"].key.digest]))
        with pytest.raises(UnfrozenCallError):
            draw(pipe)
        assert live_leases(vault.layout).keys() == set()

    def test_one_that_was_published_again_unchanged_is_read_again(self, shared: Path, reads: Counter[Digest]) -> None:
        graph = manifests(shared)["graph"]
        pipe = cache(shared).load(PlainPipeline())
        path = Vault.open(shared).layout.manifest_file(graph.key.digest)
        (shared / "again").write_bytes(path.read_bytes())
        (shared / "again").replace(path)
        draw(pipe)
        assert reads == {graph.key.digest: 2}

    def test_one_that_was_frozen_again_is_noticed_and_then_used(
        self, shared: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        graph = manifests(shared)["graph"]
        pipe = cache(shared).load(PlainPipeline())
        [(name, part)] = graph.parts.items()
        [document] = part["graphs"]
        other = {**document, "machine": {**document["machine"], "frozen": "again"}}
        path = Vault.open(shared).layout.manifest_file(graph.key.digest)
        path.unlink()
        path.write_bytes(replace(graph, parts={name: {**part, "graphs": [other]}}).to_bytes())
        torch.testing.assert_close(draw(pipe), draw(PlainPipeline()))
        assert "frozen again meanwhile" in caplog.text

    def test_a_signature_that_is_required_by_now_is_asked_for(self, shared: Path, tmp_path: Path) -> None:
        """The second load takes over what the first one has read."""
        (tmp_path / "keys").mkdir(mode=0o700)
        public = write_key_pair(tmp_path / "keys" / "key").text
        pipe = cache(shared, signature="off").load(PlainPipeline())
        cache(shared, signature="require", trusted_keys=[public]).load(pipe)
        with pytest.raises(UnfrozenCallError):
            draw(pipe)
