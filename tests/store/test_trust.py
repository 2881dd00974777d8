"""Who may write what native code is loaded from."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from helpers.store_entries import Entry
from pipevault.errors import UnsafeVaultError
from pipevault.settings.ownership import Trust
from pipevault.store.trust.owners import check_ownership, check_root
from pipevault.store.vault import Vault


@pytest.fixture
def artifact(vault: Vault, entry: Entry) -> Path:
    vault.publish(entry.manifest, entry.files)
    return vault.verified_path(entry.manifest.artifacts[0])


def test_what_publish_writes_is_trusted_whatever_the_umask(tmp_path: Path, entry: Entry) -> None:
    before = os.umask(0)
    try:
        vault = Vault.open(tmp_path / "open vault")
        vault.publish(entry.manifest, entry.files)
        found = vault.lookup(entry.key)
    finally:
        os.umask(before)
    assert found == entry.manifest
    vault.verified_path(found.artifacts[0])


@pytest.mark.parametrize("levels_up", [0, 1, 2, 3])
@pytest.mark.parametrize(("mode", "who"), [(0o757, "others"), (0o775, "its group")])
def test_nobody_else_may_write_the_file_or_a_folder_up_to_the_root(
    vault: Vault, entry: Entry, artifact: Path, levels_up: int, mode: int, who: str
) -> None:
    place = [artifact, *artifact.parents][levels_up]
    place.chmod(mode)
    with pytest.raises(UnsafeVaultError, match=f"written by {who}") as caught:
        vault.verified_path(entry.manifest.artifacts[0])
    assert caught.value.path == place
    assert f"chmod go-w {place}" in str(caught.value)


def test_the_command_in_the_message_mends_it(vault: Vault, entry: Entry, artifact: Path) -> None:
    artifact.chmod(0o666)
    with pytest.raises(UnsafeVaultError) as caught:
        vault.verified_path(entry.manifest.artifacts[0])
    command = str(caught.value).rsplit(": ", 1)[1]
    assert os.system(command) == 0
    assert vault.verified_path(entry.manifest.artifacts[0]) == artifact


def test_group_write_can_be_allowed_but_not_world_write(vault: Vault, entry: Entry, artifact: Path) -> None:
    trusting = Vault.open(vault.root, trust=Trust(allow_group_write=True))
    artifact.chmod(0o664)
    assert trusting.verified_path(entry.manifest.artifacts[0]) == artifact
    artifact.chmod(0o666)
    with pytest.raises(UnsafeVaultError, match="chmod o-w"):
        trusting.verified_path(entry.manifest.artifacts[0])


def test_a_manifest_that_others_may_write(vault: Vault, entry: Entry, artifact: Path) -> None:
    vault.layout.manifest_file(entry.key).chmod(0o666)
    with pytest.raises(UnsafeVaultError, match="chmod"):
        vault.lookup(entry.key)


def test_an_unsafe_root_is_met_before_anything_is_frozen(vault: Vault, entry: Entry) -> None:
    vault.root.chmod(0o777)
    with pytest.raises(UnsafeVaultError) as caught:
        vault.lookup(entry.key)
    assert caught.value.path == vault.root
    with pytest.raises(UnsafeVaultError):
        check_root(vault.root)


@pytest.mark.parametrize("levels_up", [0, 1, 2, 3])
def test_files_of_another_user(
    vault: Vault, entry: Entry, artifact: Path, monkeypatch: pytest.MonkeyPatch, levels_up: int
) -> None:
    place = [artifact, *artifact.parents][levels_up]
    if os.geteuid() == 0:
        os.chown(place, 65534, -1)
    else:  # everything belongs to a user whom this process no longer is
        monkeypatch.setattr(os, "geteuid", lambda: 65534)
    with pytest.raises(UnsafeVaultError, match="belongs to user"):
        vault.verified_path(entry.manifest.artifacts[0])


@pytest.mark.root
def test_root_is_trusted_by_everyone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    check_ownership(tmp_path / "file", root=tmp_path)


def test_a_link_that_leads_outside(vault: Vault, entry: Entry, artifact: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    artifact.rename(outside)
    artifact.symlink_to(outside)
    with pytest.raises(UnsafeVaultError, match="leads outside the vault"):
        vault.verified_path(entry.manifest.artifacts[0])


def test_a_folder_that_is_a_link_to_outside(vault: Vault, entry: Entry, artifact: Path, tmp_path: Path) -> None:
    vault.layout.artifacts_dir.rename(tmp_path / "moved")
    vault.layout.artifacts_dir.symlink_to(tmp_path / "moved")
    with pytest.raises(UnsafeVaultError, match="leads outside the vault"):
        vault.verified_path(entry.manifest.artifacts[0])


def test_a_link_within_the_vault_is_followed_and_its_target_checked(vault: Vault, entry: Entry, artifact: Path) -> None:
    target = vault.root / "target"
    artifact.rename(target)
    artifact.symlink_to(target)
    assert vault.verified_path(entry.manifest.artifacts[0]) == artifact
    target.chmod(0o666)
    with pytest.raises(UnsafeVaultError) as caught:
        vault.verified_path(entry.manifest.artifacts[0])
    assert caught.value.path == target


def test_a_vault_reached_through_a_link(vault: Vault, entry: Entry, artifact: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(vault.root)
    linked = Vault.open(tmp_path / "link")
    assert linked.root == vault.root
    assert linked.verified_path(entry.manifest.artifacts[0]) == artifact
    check_ownership(tmp_path / "link" / "vault.json", root=tmp_path / "link")


def test_only_regular_files(vault: Vault, entry: Entry, artifact: Path) -> None:
    artifact.unlink()
    os.mkfifo(artifact)
    with pytest.raises(UnsafeVaultError, match="not a regular file"):
        vault.verified_path(entry.manifest.artifacts[0])


@pytest.mark.parametrize("path", ["../file", "vault/../../file"])
def test_a_path_outside_the_vault(vault: Vault, path: str) -> None:
    with pytest.raises(UnsafeVaultError, match="lies outside"):
        check_ownership(vault.root / path, root=vault.root)
