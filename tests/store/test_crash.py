"""A process that dies between any two changes of the file system, and a disk that fills up at any of them."""

from __future__ import annotations

import shutil
from contextlib import suppress
from pathlib import Path

import pytest
from fault_steps import GROWING_CALLS, disk_full, killed_at_each_step, strike_at
from store_entries import Entry, leftovers, make_entry, whole

from pipevault.errors import CorruptEntryError, VaultFullError
from pipevault.store.vault import Vault

SHARED = b"shared" * 500


@pytest.fixture
def new(tmp_path: Path) -> Entry:
    return make_entry(tmp_path / "source", "new", {"unet/0.pt2": SHARED, "vae/0.pt2": b"own" * 999})


@pytest.fixture
def old(vault: Vault, tmp_path: Path) -> Entry:
    """An entry that is in the vault already and shares an artifact with ``new``."""
    old = make_entry(tmp_path / "source", "old", {"unet/0.pt2": SHARED})
    vault.publish(old.manifest, old.files)
    return old


def copy_of(vault: Vault, folder: Path) -> Vault:
    return Vault.open(shutil.copytree(vault.root, folder))


def test_killed_while_publishing(vault: Vault, old: Entry, new: Entry, tmp_path: Path) -> None:
    target = tmp_path / "target"
    copy_of(vault, target)
    outcomes = []
    for _ in killed_at_each_step(lambda: Vault.open(target).publish(new.manifest, new.files)):
        survivor = Vault.open(target)
        outcomes.append(whole(survivor, new.manifest))
        assert whole(survivor, old.manifest)
        assert list(survivor.foreign_files()) == []
        survivor.publish(new.manifest, new.files)
        assert whole(survivor, new.manifest)
        shutil.rmtree(target)
        copy_of(vault, target)
    assert outcomes == sorted(outcomes)
    assert outcomes[0] is False
    assert outcomes[-1] is True
    assert len(outcomes) > 20


def test_killed_while_creating_a_vault(tmp_path: Path) -> None:
    root = tmp_path / "vault"
    for _ in killed_at_each_step(lambda: Vault.open(root)):
        assert list(Vault.open(root).foreign_files()) == []
        shutil.rmtree(root)


@pytest.mark.parametrize("damage", ["artifact", "manifest", "missing artifact"])
def test_killed_while_healing(vault: Vault, new: Entry, tmp_path: Path, damage: str) -> None:
    vault.publish(new.manifest, new.files)
    path = {
        "artifact": vault.layout.artifact_file(new.manifest.artifacts[0].digest),
        "manifest": vault.layout.manifest_file(new.key),
        "missing artifact": vault.layout.artifact_file(new.manifest.artifacts[1].digest),
    }[damage]
    path.unlink()
    if damage != "missing artifact":
        path.write_bytes(b"damaged")
    target = tmp_path / "target"
    copy_of(vault, target)
    for _ in killed_at_each_step(lambda: Vault.open(target).publish(new.manifest, new.files)):
        survivor = Vault.open(target)
        with suppress(CorruptEntryError):  # the old damage, still noticed
            whole(survivor, new.manifest)
        assert list(survivor.foreign_files()) == []
        survivor.publish(new.manifest, new.files)
        assert whole(survivor, new.manifest)
        shutil.rmtree(target)
        copy_of(vault, target)


def test_killed_while_removing(vault: Vault, old: Entry, new: Entry, tmp_path: Path) -> None:
    vault.publish(new.manifest, new.files)
    target = tmp_path / "target"
    copy_of(vault, target)

    def remove() -> None:
        opened = Vault.open(target)
        opened.remove(opened.plan_removal([new.key]))

    for _ in killed_at_each_step(remove):
        survivor = Vault.open(target)
        assert whole(survivor, old.manifest)
        assert whole(survivor, new.manifest) or survivor.lookup(new.key) is None
        shutil.rmtree(target)
        copy_of(vault, target)


def test_killed_while_holding_the_lock(vault: Vault, new: Entry) -> None:
    def hold_and_publish() -> None:
        with vault.lock(new.key, timeout_s=0):
            vault.publish(new.manifest, new.files)

    for _ in killed_at_each_step(hold_and_publish):
        with vault.lock(new.key, timeout_s=0):
            assert vault.lookup(new.key) in (None, new.manifest)
        assert list(vault.foreign_files()) == []


def test_a_disk_that_fills_up_at_any_step(vault: Vault, old: Entry, new: Entry, tmp_path: Path) -> None:
    for step in range(1000):
        target = copy_of(vault, tmp_path / f"target{step}")
        with suppress(VaultFullError), strike_at(step, disk_full, GROWING_CALLS):
            target.publish(new.manifest, new.files)
            assert whole(target, new.manifest)
            assert step > 10
            return
        assert leftovers(target) == []
        assert whole(target, old.manifest)
        assert whole(target, new.manifest) or target.lookup(new.key) is None
        target.publish(new.manifest, new.files)
        assert whole(target, new.manifest)
        shutil.rmtree(target.root)
    pytest.fail("it never got through")


def test_a_full_disk_does_not_stop_quarantine_from_getting_out_of_the_way(vault: Vault, old: Entry) -> None:
    path = vault.layout.artifact_file(old.manifest.artifacts[0].digest)
    vault.layout.quarantine_dir.mkdir()
    with strike_at(0, disk_full, ("mkdir", "open", "write")):
        moved = vault.quarantine(path, "damaged")
    assert moved is not None
    assert not path.exists()
    with strike_at(0, disk_full, GROWING_CALLS):
        assert vault.quarantine(vault.layout.manifest_file(old.key), "damaged") is None
    assert vault.layout.manifest_file(old.key).exists()
