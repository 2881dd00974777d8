"""Loading a pipeline from several vaults: hits in any of them, faults in any of them, what is told and counted."""

from __future__ import annotations

import copy
import gc
import logging
import os
import pickle
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

import pipevault
from pipelines import FAST_BUILD, PlainPipeline, draw
from pipevault.errors import (
    MissError,
    NotAVaultError,
    SettingsError,
    SignatureError,
    UnsafeVaultError,
    VaultFullError,
)
from pipevault.graphs.part import FrozenPart
from pipevault.manager.leases import HeldLeases
from pipevault.settings import Tier
from pipevault.store.leases import leased_keys
from pipevault.store.signing_keys import read_private_key, write_key_pair
from pipevault.store.stats import summary
from pipevault.store.tiers import Found
from pipevault.store.vault import Vault

pytestmark = pytest.mark.usefixtures("_no_compiling")


@pytest.fixture
def _no_compiling(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("something was compiled")

    monkeypatch.setattr("pipevault.graphs.state.build_graph", refuse)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


@pytest.fixture
def own(tmp_path: Path) -> Path:
    return Vault.open(tmp_path / "own").root


@pytest.fixture
def shared(plain_vault: Path, tmp_path: Path) -> Path:
    """Holds the entry."""
    return shutil.copytree(plain_vault, tmp_path / "shared")


def cache(root: Path, *tiers: Path | Tier, mode: str = "require", **options: Any) -> pipevault.PipelineCache:
    return pipevault.PipelineCache(root, mode=mode, tiers=tiers, build_config=FAST_BUILD, **options)


def load(root: Path, *tiers: Path | Tier, **options: Any) -> tuple[PlainPipeline, pipevault.Outcome]:
    pipe = cache(root, *tiers, **options).load(PlainPipeline(), batch_size=1)
    return pipe, pipevault.outcome(pipe)


def only_key(root: Path) -> Any:
    (manifest,) = Vault.open(root).manifests()
    return manifest.key.digest


def artifact_of(root: Path) -> Path:
    vault = Vault.open(root)
    (manifest,) = vault.manifests()
    return vault.layout.artifact_file(manifest.artifacts[0].digest)


def damage(path: Path) -> None:
    path.chmod(0o644)
    path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:])


class TestHits:
    @pytest.mark.parametrize("mode", ["compile", "require"])
    def test_in_the_second_tier_copied_and_loaded_from_there(self, own: Path, shared: Path, mode: str) -> None:
        pipe, outcome = load(own, shared, mode=mode)
        assert (outcome.status, outcome.tier, outcome.problems) == ("hit", str(shared), ())
        assert isinstance(pipe.transformer, FrozenPart)
        torch.testing.assert_close(draw(pipe), draw(PlainPipeline()))
        shutil.rmtree(shared)
        _, again = load(own, mode=mode)
        assert (again.status, again.tier) == ("hit", str(own))

    def test_in_the_third_tier(self, own: Path, shared: Path, tmp_path: Path) -> None:
        Vault.open(tmp_path / "second")
        _, outcome = load(own, tmp_path / "second", shared)
        assert (outcome.status, outcome.tier) == ("hit", str(shared))
        assert only_key(own) == only_key(shared)

    def test_not_copied(self, own: Path, shared: Path) -> None:
        _, outcome = load(own, Tier(shared, copy=False))
        assert (outcome.status, outcome.tier, outcome.problems) == ("hit", str(shared), ())
        assert list(Vault.open(own).manifests()) == []

    def test_from_a_tier_before_the_vault_that_is_written(self, own: Path, shared: Path) -> None:
        _, outcome = load(own, shared, own)
        assert outcome.tier == str(shared)
        assert list(Vault.open(own).manifests()) == []

    def test_a_worker_without_a_vault_of_its_own_gets_one_for_the_copy(self, shared: Path, tmp_path: Path) -> None:
        load(tmp_path / "worker", shared)
        assert only_key(tmp_path / "worker") == only_key(shared)

    def test_the_outcome_as_json(self, own: Path, shared: Path, tmp_path: Path) -> None:
        _, outcome = load(own, tmp_path / "absent", shared)
        document = outcome.to_json()
        assert document["tier"] == str(shared)
        assert len(document["problems"]) == 1

    def test_several_shapes_share_what_they_tell(self, own: Path, shared: Path, tmp_path: Path) -> None:
        pipe = cache(own, tmp_path / "absent", shared).load(PlainPipeline(), shapes=[{"height": 8}, {"width": 8}])
        outcome = pipevault.outcome(pipe)
        assert [entry.tier for entry in outcome.entries] == [str(shared), str(own)]
        assert outcome.tier == ""
        assert len(outcome.problems) == 1

    def test_from_pretrained_takes_tiers(self, own: Path, shared: Path) -> None:
        class Pretrained(PlainPipeline):
            @classmethod
            def from_pretrained(cls, path: Any) -> PlainPipeline:
                return PlainPipeline()

        pipe = pipevault.from_pretrained(
            Pretrained, "model", dir=own, mode="require", tiers=[{"dir": str(shared)}], build_config=FAST_BUILD
        )
        assert pipevault.outcome(pipe).tier == str(shared)

    def test_bad_tiers_are_an_error_at_once(self, own: Path) -> None:
        with pytest.raises(SettingsError, match="twice"):
            cache(own, own, own)
        with pytest.raises(SettingsError, match="max_size"):
            cache(own, max_size="-1")


class TestFaults:
    @pytest.mark.parametrize("mode", ["compile", "require"])
    def test_broken_tiers_are_passed_over_and_told_of(
        self, own: Path, shared: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, mode: str
    ) -> None:
        (tmp_path / "file").write_text("")
        with caplog.at_level(logging.WARNING, "pipevault"):
            _, outcome = load(own, tmp_path / "file", tmp_path / "absent", shared, mode=mode)
        assert (outcome.status, outcome.tier) == ("hit", str(shared))
        assert [problem.split(": ")[0] for problem in outcome.problems] == [
            f"tier {tmp_path / 'file'}",
            f"tier {tmp_path / 'absent'}",
        ]
        assert [record.getMessage() for record in caplog.records] == list(outcome.problems)

    def test_a_slow_tier(self, own: Path, shared: Path, tmp_path: Path) -> None:
        slow = tmp_path / "slow"
        slow.mkdir()
        os.mkfifo(slow / "vault.json")
        _, outcome = load(own, slow, shared, tier_timeout_s=0.2)
        assert (outcome.status, outcome.tier) == ("hit", str(shared))
        assert "did not answer" in outcome.problems[0]
        _, again = load(tmp_path / "none", slow, shared, tier_timeout_s=3600)
        assert "is left out" in again.problems[0]
        with pytest.raises(MissError, match="is left out"):
            load(tmp_path / "nothing", slow)

    def test_a_tier_that_hangs_while_it_is_read(self, own: Path, shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        let_go = threading.Event()
        real = Vault.lookup

        def hang(vault: Vault, key: Any) -> Any:
            return let_go.wait() if vault.root == shared else real(vault, key)

        monkeypatch.setattr(Vault, "lookup", hang)
        with pytest.raises(MissError, match="did not answer"):
            load(own, shared, tier_timeout_s=0.2)
        let_go.set()

    @pytest.mark.parametrize("mode", ["compile", "require"])
    @pytest.mark.parametrize("what", ["artifact", "manifest"])
    def test_damage_in_the_nearest_tier_falls_through_and_is_healed(
        self, own: Path, plain_vault: Path, shared: Path, mode: str, what: str
    ) -> None:
        near = shutil.copytree(plain_vault, own, dirs_exist_ok=True)
        damage(artifact_of(near) if what == "artifact" else Vault.open(near).layout.manifest_file(only_key(near)))
        _, outcome = load(near, shared, mode=mode)
        assert (outcome.status, outcome.tier) == ("hit", str(shared))
        assert "damaged" in outcome.problems[0]
        assert any((near / "quarantine").glob("*.reason.txt"))
        _, again = load(near)
        assert (again.status, again.tier, again.problems) == ("hit", str(near), ())

    def test_damage_in_a_farther_tier_is_set_aside_there(self, own: Path, plain_vault: Path, shared: Path) -> None:
        third = shutil.copytree(plain_vault, own.with_name("third"))
        damage(artifact_of(shared))
        _, outcome = load(own, shared, third, mode="compile")
        assert outcome.tier == str(third)
        assert any((shared / "quarantine").iterdir())
        assert summary(Vault.open(own).layout).total.quarantined == 1

    def test_mode_require_leaves_a_farther_tier_as_it_is(self, own: Path, shared: Path) -> None:
        damage(artifact_of(shared))
        with pytest.raises(MissError, match="is damaged") as caught:
            load(own, shared)
        assert str(caught.value).count("is damaged") == 1
        assert not (shared / "quarantine").exists()

    def test_a_vault_that_is_full_while_it_is_copied_to(
        self, own: Path, shared: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def full_disk(self: Vault, manifest: Any, files: Any) -> None:
            raise VaultFullError("no space left", self.root)

        monkeypatch.setattr(Vault, "publish", full_disk)
        pipe, outcome = load(own, shared)
        assert (outcome.status, outcome.tier) == ("hit", str(shared))
        assert "could not be copied" in outcome.problems[0]
        assert "no space left" in outcome.problems[0]
        torch.testing.assert_close(draw(pipe), draw(PlainPipeline()))

    def test_the_folder_is_deleted_while_in_use(self, own: Path, shared: Path) -> None:
        reader = cache(own, shared, mode="compile")
        pipe = reader.load(PlainPipeline(), batch_size=1)
        expected = draw(pipe)
        shutil.rmtree(own)
        assert torch.equal(draw(pipe), expected)
        reader.load(pipe, batch_size=1)
        assert pipevault.outcome(pipe).tier == str(shared)
        assert only_key(own) == only_key(shared), "what stands there now is no vault"
        shutil.rmtree(own)
        shutil.rmtree(shared)
        with pytest.raises(MissError, match="no vault"):
            cache(own, shared).load(pipe, batch_size=1)

    def test_a_vault_of_its_own_that_cannot_be_used_stops_no_hit(self, shared: Path, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        _, outcome = load(tmp_path / "file", shared)
        assert (outcome.status, outcome.tier) == ("hit", str(shared))
        assert len(outcome.problems) == 1
        with pytest.raises(NotAVaultError):
            load(tmp_path / "file", tmp_path / "absent")

    def test_what_others_may_write_is_not_loaded(self, own: Path, shared: Path) -> None:
        shared.chmod(0o777)
        with pytest.raises(MissError, match="can be written by others"):
            load(own, shared)
        with pytest.raises(UnsafeVaultError):
            load(shared)
        shared.chmod(0o775)
        assert load(own, shared, allow_group_write=True)[1].status == "hit"


class TestMisses:
    def test_all_tiers_are_named_and_the_nearest_entry_may_be_in_any(self, own: Path, shared: Path) -> None:
        with pytest.raises(MissError, match=rf"The tiers {own}, {shared} hold[\s\S]*call\.height") as caught:
            cache(own, shared).load(PlainPipeline(), height=16)
        assert only_key(shared).short in str(caught.value)

    def test_no_tier_has_entries(self, own: Path, tmp_path: Path) -> None:
        Vault.open(tmp_path / "second")
        with pytest.raises(MissError, match="no tier has entries"):
            load(own, tmp_path / "second")

    def test_explain_tells_the_tier_and_changes_nothing(self, own: Path, shared: Path, tmp_path: Path) -> None:
        reader = cache(own, tmp_path / "absent", shared)
        explanation = reader.explain(PlainPipeline())
        assert (explanation.status, explanation.tier) == ("hit", str(shared))
        assert str(shared) in explanation.reason
        assert explanation.parts["transformer"].status == "frozen"
        assert len(explanation.problems) == 1
        assert list(Vault.open(own).manifests()) == []
        missed = reader.explain(PlainPipeline(), height=16)
        assert (missed.status, missed.tier, missed.nearest) == ("miss", "", only_key(shared))
        assert len(missed.problems) == 1


class TestSignatures:
    @pytest.fixture
    def public_key(self, tmp_path: Path) -> str:
        (tmp_path / "keys").mkdir(mode=0o700)
        return write_key_pair(tmp_path / "keys" / "key").text

    def sign(self, root: Path, tmp_path: Path) -> None:
        vault = Vault.open(root)
        (manifest,) = vault.manifests()
        vault.sign(manifest, read_private_key(tmp_path / "keys" / "key"))

    @pytest.mark.parametrize("mode", ["compile", "require"])
    def test_without_a_signature_no_artifact_is_opened(
        self, shared: Path, public_key: str, mode: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(Vault, "owned_path", lambda vault, ref: pytest.fail("an artifact was opened"))
        with pytest.raises(SignatureError, match="no signature"):
            load(shared, mode=mode, signature="require", trusted_keys=[public_key])

    def test_a_tier_without_a_signature_is_an_error_where_nothing_else_may_be_used(
        self, own: Path, shared: Path, public_key: str
    ) -> None:
        tier = Tier(shared, signature="require")
        with pytest.raises(SignatureError):
            load(own, tier, trusted_keys=[public_key])

    def test_signed_entries_load_and_are_copied_with_what_signs_them(
        self, own: Path, shared: Path, public_key: str, tmp_path: Path
    ) -> None:
        self.sign(shared, tmp_path)
        settings = {"signature": "require", "trusted_keys": [public_key]}
        assert load(own, shared, **settings)[1].tier == str(shared)
        assert load(own, **settings)[1].tier == str(own)

    def test_warn_loads_and_tells(self, shared: Path, public_key: str) -> None:
        _, outcome = load(shared, signature="warn", trusted_keys=[public_key])
        assert outcome.status == "hit"
        assert "no signature" in outcome.problems[0]

    def test_nothing_is_frozen_that_could_not_be_loaded(self, own: Path, public_key: str) -> None:
        with pytest.raises(SignatureError, match="pipevault sign"):
            load(own, mode="compile", signature="require", trusted_keys=[public_key])


class TestHooks:
    def test_a_lease_ends_with_the_pipeline(self, shared: Path) -> None:
        layout = Vault.open(shared).layout
        reader = cache(shared)
        pipe = reader.load(PlainPipeline(), batch_size=1)
        assert leased_keys(layout) == {only_key(shared)}
        reader.load(pipe, batch_size=1)
        assert len(list(layout.leases_dir.iterdir())) == 1
        other = reader.load(PlainPipeline(), batch_size=1)
        assert len(list(layout.leases_dir.iterdir())) == 2
        cache(shared, mode="off").load(pipe, batch_size=1)
        assert len(list(layout.leases_dir.iterdir())) == 1
        del other
        gc.collect()
        assert leased_keys(layout) == set()

    def test_a_load_that_fails_keeps_nothing(self, shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        with pytest.raises(MissError):
            cache(shared).load(PlainPipeline(), shapes=[{"height": 8}, {"height": 16}])
        damage(artifact_of(shared))
        with pytest.raises(MissError):
            load(shared)
        assert leased_keys(Vault.open(shared).layout) == set()

    def test_a_copy_of_a_pipeline_holds_no_lease(self, shared: Path) -> None:
        pipe, _ = load(shared)
        held = HeldLeases(vars(pipe)["_pipevault"].leases._leases)
        for copied in (copy.deepcopy(held), pickle.loads(pickle.dumps(held))):
            copied.release()
        assert leased_keys(Vault.open(shared).layout) == {only_key(shared)}

    def test_the_use_is_recorded(self, own: Path, shared: Path) -> None:
        load(own, shared)
        assert Vault.open(own).layout.use_file(only_key(own)).exists()

    def test_events_are_counted_in_the_vault_of_dir(self, own: Path, shared: Path) -> None:
        load(own, shared)
        load(own)
        with pytest.raises(MissError):
            cache(own).load(PlainPipeline(), height=16)
        counts = summary(Vault.open(own).layout)
        assert (counts.total.hits, dict(counts.total.misses)) == (2, {"call": 1})
        assert counts.entries[only_key(own)].saved_s > 0
        assert summary(Vault.open(shared).layout).total.hits == 0

    def test_max_size_is_kept_after_a_copy(self, own: Path, shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        asked: list[Path] = []

        def limit(found: Found, max_size: int | None) -> tuple[str, ...]:
            asked.append(found.vault.root)
            return ()

        monkeypatch.setattr("pipevault.store.tiers._limit_size", limit)
        load(own, shared, max_size="1GB")
        load(own, max_size="1GB")
        assert asked == [own]

    def test_a_size_that_cannot_be_kept_is_told(self, own: Path, shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(found: Found, max_size: int | None) -> tuple[str, ...]:
            raise VaultFullError("cannot be listed", found.vault.root)

        monkeypatch.setattr("pipevault.store.tiers._limit_size", fail)
        _, outcome = load(own, shared, max_size="1GB")
        assert (outcome.status, outcome.problems) == ("hit", ("max_size could not be kept: cannot be listed",))
