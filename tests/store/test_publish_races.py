"""An entry is published while another that shares an artifact is removed."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from helpers.store_entries import Entry, leftovers, make_entry, whole
from pipevault.errors import CorruptEntryError, VaultError, VaultFullError
from pipevault.store import publish
from pipevault.store.vault import Vault

SHARED = b"shared" * 500


@pytest.fixture
def new(vault: Vault, tmp_path: Path) -> Entry:
    """Not published; its first artifact is in the vault already, as part of another entry."""
    old = make_entry(tmp_path / "source", "old", {"unet/0.pt2": SHARED})
    vault.publish(old.manifest, old.files)
    return make_entry(tmp_path / "source", "new", {"unet/0.pt2": SHARED, "vae/0.pt2": b"own" * 999})


def shared_file(vault: Vault, entry: Entry) -> Path:
    return vault.layout.artifact_file(entry.manifest.artifacts[0].digest)


def before_publishing(
    monkeypatch: pytest.MonkeyPatch, target: Path, action: Callable[[], None], *, after: bool = False
) -> None:
    """Do ``action`` right before (or after) the file at ``target`` is published."""
    original = publish.publish_file  # type: ignore[attr-defined]

    def publish_file(source: Path, place: Path) -> None:
        if place == target and not after:
            action()
        original(source, place)
        if place == target and after:
            action()

    monkeypatch.setattr(publish, "publish_file", publish_file)


def test_an_artifact_that_is_reused_becomes_young(vault: Vault, new: Entry) -> None:
    """Removal leaves young artifacts alone."""
    path = shared_file(vault, new)
    os.utime(path, times=(1e9, 1e9))
    inode = path.stat().st_ino
    start_s = time.time() - 60
    vault.publish(new.manifest, new.files)
    assert path.stat().st_mtime > start_s
    assert path.stat().st_ino == inode


def test_a_new_artifact_is_as_young_as_its_publication(
    vault: Vault, new: Entry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not as old as its copy, which may have taken long to make."""
    original = publish.copy_file  # type: ignore[attr-defined]

    def slow_copy(source: Path, target: Path, *, mode: int) -> object:
        result = original(source, target, mode=mode)
        os.utime(target, times=(1e9, 1e9))
        return result

    monkeypatch.setattr(publish, "copy_file", slow_copy)
    vault.publish(new.manifest, new.files)
    assert vault.layout.artifact_file(new.manifest.artifacts[1].digest).stat().st_mtime > 1e9 + 60


@pytest.mark.parametrize("after", [False, True])
def test_one_that_vanishes_is_put_back(vault: Vault, new: Entry, monkeypatch: pytest.MonkeyPatch, after: bool) -> None:
    path = shared_file(vault, new)
    before_publishing(monkeypatch, vault.layout.manifest_file(new.key), path.unlink, after=after)
    vault.publish(new.manifest, new.files)
    assert whole(vault, new.manifest)
    assert leftovers(vault) == []


def test_one_that_was_staged_in_vain_is_put_back(vault: Vault, new: Entry, monkeypatch: pytest.MonkeyPatch) -> None:
    """Absent when it was staged, there when it was to be placed, gone again: the first copy is still staged."""
    path = shared_file(vault, new)
    away = path.with_name("away")
    path.rename(away)
    original = publish._place
    monkeypatch.setattr(publish, "_place", lambda *args: (away.exists() and away.rename(path), original(*args))[1])
    before_publishing(monkeypatch, vault.layout.manifest_file(new.key), path.unlink)
    vault.publish(new.manifest, new.files)
    assert whole(vault, new.manifest)


def test_what_nobody_has_takes_the_entry_along(vault: Vault, new: Entry, monkeypatch: pytest.MonkeyPatch) -> None:
    path = shared_file(vault, new)
    before_publishing(monkeypatch, vault.layout.manifest_file(new.key), path.unlink)
    own = {digest: file for digest, file in new.files.items() if digest != new.manifest.artifacts[0].digest}
    with pytest.raises(CorruptEntryError, match="No file was given"):
        vault.publish(new.manifest, own)
    assert vault.lookup(new.key) is None
    [reason] = vault.layout.quarantine_dir.glob("*.reason.txt")
    assert "removed while the entry was published" in reason.read_text()
    assert leftovers(vault) == []


def test_a_file_that_cannot_be_read_again(vault: Vault, new: Entry, monkeypatch: pytest.MonkeyPatch) -> None:
    shared = shared_file(vault, new)

    def remove_both() -> None:
        shared.unlink()
        new.files[new.manifest.artifacts[0].digest].unlink()

    before_publishing(monkeypatch, vault.layout.manifest_file(new.key), remove_both)
    with pytest.raises((VaultError, OSError)):
        vault.publish(new.manifest, new.files)
    assert vault.lookup(new.key) is None


def test_a_disk_that_is_full_by_then(vault: Vault, new: Entry, monkeypatch: pytest.MonkeyPatch) -> None:
    shared = shared_file(vault, new)

    def fail(source: Path, target: Path, *, mode: int) -> object:
        raise VaultFullError("full", target)

    def remove() -> None:
        shared.unlink()
        monkeypatch.setattr(publish, "copy_file", fail)

    before_publishing(monkeypatch, vault.layout.manifest_file(new.key), remove)
    with pytest.raises(VaultFullError):
        vault.publish(new.manifest, new.files)
    assert vault.lookup(new.key) is None


def test_a_vault_whose_artifacts_may_not_be_touched(vault: Vault, new: Entry, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: Path) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "utime", fail)
    vault.publish(new.manifest, new.files)
    assert whole(vault, new.manifest)


def test_a_vault_that_is_deleted_meanwhile(vault: Vault, new: Entry, monkeypatch: pytest.MonkeyPatch) -> None:
    before_publishing(monkeypatch, vault.layout.manifest_file(new.key), lambda: shutil.rmtree(vault.root))
    with pytest.raises(VaultError):
        vault.publish(new.manifest, new.files)
