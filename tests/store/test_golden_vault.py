"""Vaults that earlier releases wrote: those of a format that is read must be read by every later release, and those of
one that is not are refused and left alone. ``scripts/make_golden_vault.py`` made them.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from helpers.bundles import everything_below
from helpers.store_entries import search, whole
from pipevault.cache.search import check_parts
from pipevault.digest import Digest
from pipevault.errors import BundleError, CorruptEntryError, NewerBundleError, OldVaultError, VaultError
from pipevault.settings import Settings, Tier
from pipevault.store.bundle import bundle_keys, import_bundle
from pipevault.store.check import verify
from pipevault.store.manifest import Manifest
from pipevault.store.marker import VAULT_VERSION
from pipevault.store.places import iter_foreign
from pipevault.store.retention.pins import pins
from pipevault.store.retention.prune import carry_out, plan_prune
from pipevault.store.retention.usage import last_use_s
from pipevault.store.stats.summary import summary
from pipevault.store.tiers import Tiers
from pipevault.store.trust.signature import check_signature
from pipevault.store.trust.signing_keys import load_trusted
from pipevault.store.vault import Vault

HERE = Path(__file__).parent
OLD = ["golden_vault_1"]
"""Of a format that is no longer read."""
VERSIONS = sorted(path.name for path in HERE.glob("golden_vault_*") if path.is_dir() and path.name not in OLD)


def copied(name: str, folder: Path) -> Path:
    """A copy, with the permissions of a vault, which git does not keep."""
    shutil.copytree(HERE / name, folder)
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
    return folder


@pytest.fixture(params=VERSIONS)
def golden(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return copied(request.param, tmp_path / request.param)


@pytest.fixture(params=OLD)
def old(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return copied(request.param, tmp_path / request.param)


def expected(golden: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((HERE / f"{golden.name}.json").read_bytes())
    return document


def test_there_is_one_for_this_version() -> None:
    assert f"golden_vault_{VAULT_VERSION}" in VERSIONS


def test_its_entries_are_whole(golden: Path) -> None:
    vault = Vault.open(golden, create=False)
    found = {manifest.key.digest.hex: manifest for manifest in vault.manifests() if isinstance(manifest, Manifest)}
    graphs, plan = expected(golden)["graphs"], expected(golden)["plan"]
    assert found.keys() == {plan, *graphs}
    assert all(whole(vault, manifest) for manifest in found.values())
    assert {found[key].key.kind for key in graphs} == {"graph"}
    assert found[plan].key.kind == "plan"
    assert [key.hex for key in found[plan].needs] == graphs
    assert sorted(found[plan].parts["unet"]["graphs"]) == graphs
    for manifest in found.values():
        check_parts(vault, manifest)
    assert {len(found[key].artifacts) for key in graphs} == {1}
    assert list(iter_foreign(vault.layout)) == []


def test_a_graph_whose_manifest_leaves_a_file_out_is_damaged(golden: Path) -> None:
    vault = Vault.open(golden, create=False)
    graphs = [entry for entry in vault.manifests() if isinstance(entry, Manifest) and entry.key.kind == "graph"]
    assert graphs
    for graph in graphs:
        with pytest.raises(CorruptEntryError, match="does not list 1 files of its graphs"):
            check_parts(vault, replace(graph, artifacts=()))


def test_its_shelf(golden: Path) -> None:
    shelf = Digest(expected(golden)["shelf"])
    assert [key.hex for key in Vault.open(golden, create=False).shelf(shelf)] == expected(golden)["graphs"]


def test_its_pin_use_signatures_and_counts(golden: Path) -> None:
    vault, plan = Vault.open(golden, create=False), Digest(expected(golden)["plan"])
    assert pins(vault.layout) == {"prod": plan}
    assert last_use_s(vault.layout, plan) is not None
    trusted = load_trusted([expected(golden)["public_key"]])
    for manifest in vault.manifests():
        assert isinstance(manifest, Manifest)
        assert check_signature(vault.layout, manifest, policy="require", trusted=trusted) is None
    assert "62.5" in json.dumps(summary(vault.layout).to_json())


def test_its_pin_keeps_everything(golden: Path) -> None:
    vault = Vault.open(golden, create=False)
    assert carry_out(vault, plan_prune(vault, max_size=0, older_than_s=0, unused=True)).entries == ()


def test_verify_finds_nothing_wrong(golden: Path) -> None:
    assert verify(Vault.open(golden, create=False)).bad == ()


def test_its_bundle_can_be_imported(golden: Path, tmp_path: Path) -> None:
    vault = Vault.open(tmp_path / "other")
    imported = import_bundle(vault, HERE / f"{golden.name}.pvb")
    assert [key.hex for key in imported] == sorted([expected(golden)["plan"], *expected(golden)["graphs"]])


class TestOld:
    @pytest.mark.parametrize("create", [True, False])
    def test_a_vault_is_refused_and_left_alone(self, old: Path, create: bool) -> None:
        before = everything_below(old)
        with pytest.raises(
            OldVaultError, match=r"version 1, which pipevault 0\.1 wrote.*Give another folder, or"
        ) as caught:
            Vault.open(old, create=create)
        assert caught.value.path == old
        assert isinstance(caught.value, VaultError)
        assert everything_below(old) == before

    def test_a_tier_is_told_of_and_passed_over(self, old: Path, golden: Path, tmp_path: Path) -> None:
        before = everything_below(old)
        tiers = Tiers(Settings(dir=tmp_path / "own", tiers=(Tier(old), Tier(golden))))
        found, [problem] = search(tiers, Digest(expected(golden)["plan"]))
        assert found is not None
        assert found.tier.dir == golden
        assert f"tier {old}" in problem
        assert "pipevault 0.1" in problem
        keys, problems = tiers.shelf(Digest(expected(golden)["shelf"]))
        assert [key.hex for key in keys] == expected(golden)["graphs"]
        assert problems == (problem,)
        assert everything_below(old) == before

    def test_a_bundle_is_refused(self, old: Path, tmp_path: Path) -> None:
        vault = Vault.open(tmp_path / "other")
        for read in (bundle_keys, lambda path: import_bundle(vault, path)):
            with pytest.raises(BundleError, match=r"older form.*export again") as caught:
                read(HERE / f"{old.name}.pvb")
            assert not isinstance(caught.value, NewerBundleError)
        assert list(vault.manifests()) == []
