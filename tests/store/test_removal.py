"""Removing entries: the plan, what happens, and what is shared."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from helpers.store_entries import Entry, make_entry, whole
from pipevault.digest import Digest, digest_bytes
from pipevault.errors import UnknownKeyError, VaultError, VaultNotWritableError
from pipevault.store.retention.removal import ORPHAN_MIN_AGE_S, find_orphans
from pipevault.store.vault import Vault

SHARED, OWN = b"shared" * 100, b"own" * 50


@pytest.fixture
def pair(vault: Vault, tmp_path: Path) -> tuple[Entry, Entry]:
    """Two published entries that share an artifact; the first has one of its own too."""
    first = make_entry(tmp_path / "source", "a", {"unet/0.pt2": SHARED, "vae/0.pt2": OWN})
    second = make_entry(tmp_path / "source", "b", {"unet/0.pt2": SHARED})
    for entry in (first, second):
        vault.publish(entry.manifest, entry.files)
    return first, second


def used_bytes(vault: Vault) -> int:
    return sum(path.stat().st_size for path in vault.root.rglob("*") if path.is_file())


def test_a_plan_changes_nothing(vault: Vault, pair: tuple[Entry, Entry]) -> None:
    first, _ = pair
    before = used_bytes(vault)
    plan = vault.plan_removal([first.key])
    assert plan.keys == (first.key,)
    assert plan.artifacts == (digest_bytes(OWN),)
    assert plan.shared == (digest_bytes(SHARED),)
    assert used_bytes(vault) == before
    assert whole(vault, first.manifest)


def test_shared_artifacts_stay_and_the_bytes_are_true(vault: Vault, pair: tuple[Entry, Entry]) -> None:
    first, second = pair
    before = used_bytes(vault)
    plan = vault.plan_removal([first.key])
    report = vault.remove(plan)
    assert report.keys == (first.key,)
    assert report.artifacts == plan.artifacts
    assert report.shared == plan.shared
    assert report.size_bytes == plan.size_bytes == before - used_bytes(vault)
    assert vault.lookup(first.key) is None
    assert whole(vault, second.manifest)


def test_the_last_entry_takes_the_artifact_along(vault: Vault, pair: tuple[Entry, Entry]) -> None:
    keys = [entry.key for entry in pair]
    report = vault.remove(vault.plan_removal(keys))
    assert set(report.artifacts) == {digest_bytes(OWN), digest_bytes(SHARED)}
    assert report.shared == ()
    assert [path for path in vault.layout.artifacts_dir.rglob("*") if path.is_file()] == []


def test_an_artifact_that_was_claimed_since_the_plan_stays(
    vault: Vault, pair: tuple[Entry, Entry], tmp_path: Path
) -> None:
    plan = vault.plan_removal([pair[0].key])
    late = make_entry(tmp_path / "source", "late", {"vae/0.pt2": OWN})
    vault.publish(late.manifest, late.files)
    report = vault.remove(plan)
    assert report.artifacts == ()
    assert digest_bytes(OWN) in report.shared
    assert whole(vault, late.manifest)


def test_a_second_removal_frees_nothing(vault: Vault, pair: tuple[Entry, Entry]) -> None:
    plan = vault.plan_removal([pair[0].key])
    vault.remove(plan)
    report = vault.remove(plan)
    assert (report.keys, report.artifacts, report.size_bytes) == ((), (), 0)


def test_an_unknown_key(vault: Vault, pair: tuple[Entry, Entry]) -> None:
    with pytest.raises(UnknownKeyError):
        vault.plan_removal([pair[0].key, digest_bytes(b"unknown")])


def test_what_a_damaged_manifest_may_name_stays(vault: Vault, pair: tuple[Entry, Entry]) -> None:
    first, second = pair
    path = vault.layout.manifest_file(second.key)
    path.write_bytes(path.read_bytes().replace(b'"manifest_version":2', b'"manifest_version":3'))
    vault.remove(vault.plan_removal([first.key]))
    assert vault.layout.artifact_file(digest_bytes(SHARED)).exists()


def test_an_entry_with_a_damaged_manifest_can_be_removed(vault: Vault, pair: tuple[Entry, Entry]) -> None:
    first, _ = pair
    vault.layout.manifest_file(first.key).write_bytes(b"damaged")
    report = vault.remove(vault.plan_removal([first.key]))
    assert report.keys == (first.key,)
    assert report.size_bytes == len(b"damaged")


def test_manifests_go_before_artifacts(
    vault: Vault, pair: tuple[Entry, Entry], monkeypatch: pytest.MonkeyPatch
) -> None:
    removed: list[str] = []
    unlink = Path.unlink

    def recording_unlink(path: Path, missing_ok: bool = False) -> None:
        if path.is_relative_to(vault.root):
            removed.append(path.relative_to(vault.root).parts[0])
        unlink(path, missing_ok=missing_ok)

    monkeypatch.setattr(Path, "unlink", recording_unlink)
    vault.remove(vault.plan_removal([entry.key for entry in pair]))
    assert removed[:4] == ["tmp", "tmp", "artifacts", "artifacts"], "manifests are taken aside first"
    assert set(removed[4:]) == {"uses"}


def add_orphan(vault: Vault, data: bytes, *, age_s: float) -> Digest:
    digest = digest_bytes(data)
    path = vault.layout.artifact_file(digest)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    os.utime(path, times=(time.time() - age_s,) * 2)
    return digest


def orphans(vault: Vault) -> tuple[tuple[Digest, ...], tuple[Digest, ...]]:
    """Those that are old enough to go, and the others."""
    old, young = find_orphans(vault.layout)
    return old.artifacts, young.artifacts


class TestOrphans:
    def test_none_in_a_vault_without_artifacts(self, vault: Vault) -> None:
        assert orphans(vault) == ((), ())

    def test_what_an_entry_names_is_none_however_old(self, vault: Vault, pair: tuple[Entry, Entry]) -> None:
        assert orphans(vault) == ((), ())

    def test_only_the_old_one_goes(self, vault: Vault, pair: tuple[Entry, Entry]) -> None:
        old = add_orphan(vault, b"old" * 100, age_s=ORPHAN_MIN_AGE_S + 60)
        young = add_orphan(vault, b"young", age_s=ORPHAN_MIN_AGE_S - 60)
        ahead = add_orphan(vault, b"a clock that runs ahead", age_s=-7200)
        plan, rest = find_orphans(vault.layout)
        assert (set(rest.artifacts), rest.size_bytes) == ({young, ahead}, 28)
        assert (plan.keys, plan.artifacts, plan.shared, plan.size_bytes) == ((), (old,), (), 300)
        assert vault.layout.artifact_file(old).exists()
        report = vault.remove(plan)
        assert (report.keys, report.artifacts, report.size_bytes) == ((), (old,), 300)
        assert orphans(vault) == ((), rest.artifacts)
        assert all(whole(vault, entry.manifest) for entry in pair)

    def test_one_that_was_published_since_the_plan_stays(self, vault: Vault, tmp_path: Path) -> None:
        digest = add_orphan(vault, OWN, age_s=2 * ORPHAN_MIN_AGE_S)
        plan, _ = find_orphans(vault.layout)
        assert plan.artifacts == (digest,)
        late = make_entry(tmp_path / "source", "late", {"vae/0.pt2": OWN})
        vault.publish(late.manifest, late.files)
        assert vault.remove(plan).artifacts == ()
        assert whole(vault, late.manifest)

    def test_what_a_damaged_manifest_may_name_is_none(self, vault: Vault, pair: tuple[Entry, Entry]) -> None:
        for entry in pair:
            path = vault.layout.manifest_file(entry.key)
            path.write_bytes(path.read_bytes().replace(b'"manifest_version":2', b'"manifest_version":3'))
        assert orphans(vault) == ((), ())

    def test_foreign_files_links_and_folders_are_none(self, vault: Vault, tmp_path: Path) -> None:
        shard = vault.layout.artifact_file(digest_bytes(b"x")).parent
        shard.mkdir(parents=True)
        (shard / "notes.txt").write_text("")
        (vault.layout.artifacts_dir / "notes.txt").write_text("")
        vault.layout.artifact_file(digest_bytes(b"x")).symlink_to(tmp_path)
        Path(shard / (shard.name + "0" * 62)).mkdir()
        assert orphans(vault) == ((), ())

    def test_a_manifest_that_cannot_be_read_stops_it(self, vault: Vault, pair: tuple[Entry, Entry]) -> None:
        path = vault.layout.manifest_file(pair[0].key)
        path.unlink()
        path.mkdir()
        with pytest.raises(VaultError, match="could not be read"):
            find_orphans(vault.layout)


def test_a_removal_that_fails_half_way_gives_every_entry_back(
    vault: Vault, pair: tuple[Entry, Entry], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, rename, done = vault.plan_removal([entry.key for entry in pair]), os.rename, []

    def fail_at_the_second(source: Path, target: Path) -> None:
        done.append(source)
        if len(done) == 2:
            raise PermissionError(13, "Permission denied")
        rename(source, target)

    monkeypatch.setattr(os, "rename", fail_at_the_second)
    with pytest.raises(VaultNotWritableError):
        vault.remove(plan)
    monkeypatch.undo()
    assert all(whole(vault, entry.manifest) for entry in pair)


def test_what_cannot_be_removed_is_put_back(
    vault: Vault, pair: tuple[Entry, Entry], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, unlink, done = vault.plan_removal([entry.key for entry in pair]), Path.unlink, []

    def fail_at_the_second(path: Path, missing_ok: bool = False) -> None:
        if path.parent == vault.layout.tmp_dir:
            done.append(path)
            if len(done) == 2:
                raise PermissionError(13, "Permission denied")
        unlink(path, missing_ok=missing_ok)

    monkeypatch.setattr(Path, "unlink", fail_at_the_second)
    with pytest.raises(VaultNotWritableError):
        vault.remove(plan)
    monkeypatch.undo()
    assert [key for key in plan.keys if vault.lookup(key)] == [plan.keys[1]]
    assert os.listdir(vault.layout.tmp_dir) == []


def test_what_was_taken_aside_is_not_swept_as_a_leftover(vault: Vault, pair: tuple[Entry, Entry]) -> None:
    from pipevault.store.publish import own_place
    from pipevault.store.retention.leftovers import sweep
    from pipevault.store.retention.removal import take_aside

    with take_aside(vault.layout, pair[0].key) as aside:
        assert vault.lookup(pair[0].key) is None
        assert aside is not None
        assert aside not in [leftover.path for leftover in sweep(vault.layout)]
    assert whole(vault, pair[0].manifest)
    with take_aside(vault.layout, digest_bytes(b"absent")) as aside:
        assert aside is None
    left = own_place(vault.layout)  # as if the process had been killed
    vault.layout.manifest_file(pair[1].key).rename(left)
    assert left in [leftover.path for leftover in sweep(vault.layout)]


def test_what_was_frozen_again_meanwhile_is_not_put_back(vault: Vault, pair: tuple[Entry, Entry]) -> None:
    from pipevault.store.retention.removal import take_aside

    with take_aside(vault.layout, pair[0].key) as aside:
        assert aside is not None
        vault.publish(pair[0].manifest, pair[0].files)
        inode = vault.layout.manifest_file(pair[0].key).stat().st_ino
    assert vault.layout.manifest_file(pair[0].key).stat().st_ino == inode
    assert not aside.exists()
