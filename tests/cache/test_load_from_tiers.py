"""Loading a pipeline from several vaults: hits in any of them, faults in any of them, what is told and counted."""

from __future__ import annotations

import copy
import gc
import logging
import pickle
import shutil
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import pipevault
from helpers.mounts import silent
from helpers.pipelines import FAST_BUILD, PlainPipeline, draw
from pipevault.cache.loaded import HeldLeases
from pipevault.digest import Digest
from pipevault.errors import (
    MissError,
    NotAVaultError,
    SettingsError,
    SignatureError,
    UnsafeVaultError,
    VaultFullError,
)
from pipevault.graphs.part import FrozenPart
from pipevault.settings import Tier
from pipevault.store.locks.leases import live_leases
from pipevault.store.manifest import Manifest
from pipevault.store.stats.summary import summary
from pipevault.store.tiers import TierHit
from pipevault.store.trust.signing_keys import read_private_key, write_key_pair
from pipevault.store.vault import Vault

pytestmark = pytest.mark.usefixtures("_no_compiling")


@pytest.fixture
def _no_compiling(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("something was compiled")

    monkeypatch.setattr("pipevault.graphs.inductor.build_graph", refuse)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


@pytest.fixture
def own(tmp_path: Path) -> Path:
    return Vault.open(tmp_path / "own").root


@pytest.fixture
def shared(plain_vault: Path, tmp_path: Path) -> Path:
    """Holds a plan and its graph."""
    return shutil.copytree(plain_vault, tmp_path / "shared")


def cache(root: Path, *tiers: Path | Tier, mode: str = "require", **options: Any) -> pipevault.PipelineCache:
    return pipevault.PipelineCache(root, mode=mode, tiers=tiers, build_config=FAST_BUILD, **options)


def load(root: Path, *tiers: Path | Tier, **options: Any) -> tuple[PlainPipeline, pipevault.Outcome]:
    pipe = cache(root, *tiers, **options).load(PlainPipeline(), batch_size=1)
    return pipe, pipevault.outcome(pipe)


def entry(root: Path, kind: str) -> Manifest:
    manifests = list(Vault.open(root).manifests())
    (found,) = [one for one in manifests if isinstance(one, Manifest) and one.key.kind == kind]
    return found


def key_of(root: Path, kind: str) -> Digest:
    return entry(root, kind).key.digest


def all_keys(root: Path) -> set[Digest]:
    return {key_of(root, "plan"), key_of(root, "graph")}


def artifact_of(root: Path) -> Path:
    return Vault.open(root).layout.artifact_file(entry(root, "graph").artifacts[0].digest)


def manifest_of(root: Path, kind: str) -> Path:
    return Vault.open(root).layout.manifest_file(key_of(root, kind))


def damage(path: Path) -> None:
    path.chmod(0o644)
    path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:])


class TestHits:
    @pytest.mark.compile
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
        assert all_keys(own) == all_keys(shared)

    def test_a_graph_may_be_farther_than_its_plan(self, own: Path, shared: Path) -> None:
        load(own, shared)
        graph = key_of(own, "graph")
        vault = Vault.open(own)
        vault.remove(vault.plan_removal([graph]))
        assert cache(own, shared).explain(PlainPipeline()).tier == str(shared)
        _, outcome = load(own, shared)
        assert (outcome.status, outcome.tier, outcome.problems) == ("hit", str(shared), ())
        assert key_of(own, "graph") == graph

    @pytest.mark.parametrize("mode", ["compile", "require"])
    def test_without_a_shape_the_shelves_of_all_tiers_are_attached(self, own: Path, shared: Path, mode: str) -> None:
        pipe = cache(own, shared, mode=mode).load(PlainPipeline())
        outcome = pipevault.outcome(pipe)
        assert (outcome.status, outcome.tier, outcome.problems) == ("hit", str(shared), ())
        assert list(Vault.open(own).manifests()) == [], "nothing is opened before it is used"
        torch.testing.assert_close(draw(pipe), draw(PlainPipeline()))
        assert key_of(own, "graph") == key_of(shared, "graph")

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
        assert all_keys(tmp_path / "worker") == all_keys(shared)

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
    @pytest.mark.compile
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
        with silent(slow):
            _, outcome = load(own, slow, shared, tier_timeout_s=0.2)
            assert (outcome.status, outcome.tier) == ("hit", str(shared))
            assert len(outcome.problems) == 1
            assert "did not answer" in outcome.problems[0]
            _, again = load(tmp_path / "none", slow, shared, tier_timeout_s=3600)
            assert "is left out" in again.problems[0]
            with pytest.raises(MissError, match="is left out"):
                load(tmp_path / "nothing", slow)

    def test_a_tier_that_hangs_while_it_is_read(self, own: Path, shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        let_go = threading.Event()
        real = Vault.read_entry

        def hang(vault: Vault, key: Any) -> Any:
            return let_go.wait() if vault.root == shared else real(vault, key)

        monkeypatch.setattr(Vault, "read_entry", hang)
        with pytest.raises(MissError, match="did not answer"):
            load(own, shared, tier_timeout_s=0.2)
        let_go.set()

    @pytest.mark.parametrize("mode", ["compile", "require"])
    @pytest.mark.parametrize("what", ["artifact", "graph", "plan"])
    def test_damage_in_the_nearest_tier_falls_through_and_is_healed(
        self, own: Path, plain_vault: Path, shared: Path, mode: str, what: str
    ) -> None:
        near = shutil.copytree(plain_vault, own, dirs_exist_ok=True)
        damage(artifact_of(near) if what == "artifact" else manifest_of(near, what))
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
        assert all_keys(own) == all_keys(shared), "what stands there now is no vault"
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
        assert key_of(shared, "plan").short in str(caught.value)

    def test_no_tier_has_entries(self, own: Path, tmp_path: Path) -> None:
        Vault.open(tmp_path / "second")
        with pytest.raises(MissError, match="no tier has an entry for this model yet"):
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
        assert (missed.status, missed.tier, missed.nearest) == ("miss", "", key_of(shared, "plan"))
        assert len(missed.problems) == 1


class TestSignatures:
    @pytest.fixture
    def public_key(self, tmp_path: Path) -> str:
        (tmp_path / "keys").mkdir(mode=0o700)
        return write_key_pair(tmp_path / "keys" / "key").text

    def sign(self, root: Path, tmp_path: Path, *kinds: str) -> None:
        vault = Vault.open(root)
        for kind in kinds:
            vault.sign(entry(root, kind), read_private_key(tmp_path / "keys" / "key"))

    @pytest.mark.parametrize("mode", ["compile", "require"])
    def test_without_a_signature_no_artifact_is_opened(
        self, shared: Path, public_key: str, mode: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(Vault, "owned_path", lambda vault, ref: pytest.fail("an artifact was opened"))
        with pytest.raises(SignatureError, match="no signature"):
            load(shared, mode=mode, signature="require", trusted_keys=[public_key])

    @pytest.mark.parametrize("mode", ["compile", "require"])
    @pytest.mark.parametrize("shape", [{}, {"batch_size": 1}])
    def test_a_signed_plan_does_not_vouch_for_its_graphs(
        self,
        shared: Path,
        public_key: str,
        tmp_path: Path,
        mode: str,
        shape: dict[str, Any],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        self.sign(shared, tmp_path, "plan")
        monkeypatch.setattr(Vault, "owned_path", lambda vault, ref: pytest.fail("an artifact was opened"))
        with pytest.raises(SignatureError):
            cache(shared, mode=mode, signature="require", trusted_keys=[public_key]).load(PlainPipeline(), **shape)
        assert live_leases(Vault.open(shared).layout).keys() == set()

    def test_a_tier_without_a_signature_is_an_error_where_nothing_else_may_be_used(
        self, own: Path, shared: Path, public_key: str
    ) -> None:
        tier = Tier(shared, signature="require")
        with pytest.raises(SignatureError):
            load(own, tier, trusted_keys=[public_key])

    def test_signed_entries_load_and_are_copied_with_what_signs_them(
        self, own: Path, shared: Path, public_key: str, tmp_path: Path
    ) -> None:
        self.sign(shared, tmp_path, "plan", "graph")
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
        assert live_leases(layout).keys() == all_keys(shared)
        reader.load(pipe, batch_size=1)
        reader.load(pipe)
        assert len(list(layout.leases_dir.iterdir())) == 2
        other = reader.load(PlainPipeline(), batch_size=1)
        assert len(list(layout.leases_dir.iterdir())) == 4
        cache(shared, mode="off").load(pipe, batch_size=1)
        assert len(list(layout.leases_dir.iterdir())) == 2
        del other
        gc.collect()
        assert live_leases(layout).keys() == set()

    def test_without_a_shape_a_graph_is_held_from_its_first_use(self, shared: Path) -> None:
        layout = Vault.open(shared).layout
        pipe = cache(shared).load(PlainPipeline())
        assert live_leases(layout).keys() == set()
        draw(pipe)
        assert live_leases(layout).keys() == {key_of(shared, "graph")}
        assert layout.use_file(key_of(shared, "graph")).exists()
        pipevault.unload(pipe)
        assert live_leases(layout).keys() == set()

    def test_pipelines_that_share_a_part_hold_its_graphs_each(self, shared: Path) -> None:
        layout = Vault.open(shared).layout
        first, second = PlainPipeline(), PlainPipeline()
        second.transformer = first.transformer
        reader = cache(shared)
        reader.load(first, batch_size=1)
        second.transformer = first.transformer
        reader.load(second, batch_size=1)
        assert len(list(layout.leases_dir.iterdir())) == 4
        pipevault.unload(first)
        assert live_leases(layout).keys() == all_keys(shared)
        pipevault.unload(second)
        assert live_leases(layout).keys() == set()

    def test_a_load_that_fails_keeps_nothing(self, shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        with pytest.raises(MissError):
            cache(shared).load(PlainPipeline(), shapes=[{"height": 8}, {"height": 16}])
        damage(artifact_of(shared))
        with pytest.raises(MissError):
            load(shared)
        assert live_leases(Vault.open(shared).layout).keys() == set()

    def test_a_copy_of_a_pipeline_holds_no_lease(self, shared: Path) -> None:
        pipe, _ = load(shared)
        held = HeldLeases(vars(pipe)["_pipevault"].leases.leases)
        for copied in (copy.deepcopy(held), pickle.loads(pickle.dumps(held))):
            copied.release()
        assert live_leases(Vault.open(shared).layout).keys() == all_keys(shared)

    def test_the_use_is_recorded(self, own: Path, shared: Path) -> None:
        load(own, shared)
        assert all(Vault.open(own).layout.use_file(key).exists() for key in all_keys(own))

    def test_events_are_counted_in_the_vault_of_dir(self, own: Path, shared: Path) -> None:
        load(own, shared)
        load(own)
        with pytest.raises(MissError):
            cache(own).load(PlainPipeline(), height=16)
        counts = summary(Vault.open(own).layout)
        assert (counts.total.hits, dict(counts.total.misses)) == (4, {"call": 1}), "a plan and a graph, twice"
        assert counts.entries[key_of(own, "graph")].saved_s > 0
        assert summary(Vault.open(shared).layout).total.hits == 0

    def test_a_hit_without_a_plan_counts_no_miss(self, shared: Path) -> None:
        vault = Vault.open(shared)
        vault.remove(vault.plan_removal([key_of(shared, "plan")]))
        before = summary(vault.layout).total
        _, outcome = load(shared)
        assert (outcome.status, outcome.tier) == ("hit", str(shared))
        counts = summary(vault.layout).total
        assert (counts.hits - before.hits, counts.misses) == (1, before.misses)
        _, outcome = load(shared, mode="compile")
        assert (outcome.status, outcome.tier) == ("hit", str(shared))
        assert key_of(shared, "plan"), "it was not published again"
        counts = summary(vault.layout).total
        assert (counts.hits - before.hits, counts.misses) == (2, before.misses)
        assert counts.published - before.published == 1

    def test_a_plan_that_needs_what_is_gone_is_replaced(self, shared: Path, plain_vault: Path) -> None:
        """No hit lasts on a plan whose graphs the call does not use any more."""
        vault = Vault.open(shared)
        plan = entry(shared, "plan")
        vault.remove(vault.plan_removal([plan.key.digest]))
        gone = Digest("0" * 48 + plan.needs[0].hex[48:])
        parts = {"transformer": {**plan.parts["transformer"], "graphs": [gone.hex]}}
        vault.publish(replace(plan, parts=parts, needs=(gone,)), {})
        assert load(shared)[1].status == "hit", "the graph of the call is there"
        _, outcome = load(shared, mode="compile")
        assert outcome.status == "hit"
        assert gone.short in outcome.reason
        assert entry(shared, "plan").needs == plan.needs
        assert load(shared)[1].problems == ()

    def test_max_size_is_kept_after_a_copy(self, own: Path, shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        asked: list[Path] = []

        def limit(found: TierHit, max_size: int | None) -> tuple[str, ...]:
            asked.append(found.vault.root)
            return ()

        monkeypatch.setattr("pipevault.store.tiers._limit_size", limit)
        load(own, shared, max_size="1GB")
        load(own, max_size="1GB")
        assert asked == [own, own], "once for the plan and once for the graph"

    def test_a_size_that_cannot_be_kept_is_told(self, own: Path, shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(found: TierHit, max_size: int | None) -> tuple[str, ...]:
            raise VaultFullError("cannot be listed", found.vault.root)

        monkeypatch.setattr("pipevault.store.tiers._limit_size", fail)
        _, outcome = load(own, shared, max_size="1GB")
        assert (outcome.status, outcome.problems) == ("hit", ("max_size could not be kept: cannot be listed",))
