"""Real limits: a small disk, a read-only mount, missing permissions, a limit on file size."""

from __future__ import annotations

import resource
import shutil
import subprocess
from pathlib import Path

import pytest

from helpers.mounts import as_user_without_permission, in_child, with_own_tmpfs
from helpers.store_entries import Entry, leftovers, make_entry, whole
from pipevault.errors import VaultFullError, VaultNotWritableError
from pipevault.store.places import iter_foreign
from pipevault.store.vault import Vault

NOBODY = 65534


def refuses_every_write(vault: Vault, there: Entry, new: Entry) -> None:
    assert not vault.writable
    assert whole(vault, there.manifest)
    assert list(vault.manifests()) == [there.manifest]
    with pytest.raises(VaultNotWritableError, match="read-only"):
        vault.publish(new.manifest, new.files)
    with pytest.raises(VaultNotWritableError, match="read-only"):
        vault.remove(vault.plan_removal([there.key]))
    with pytest.raises(VaultNotWritableError), vault.staging():
        pass
    with pytest.raises(VaultNotWritableError), vault.lock(new.key, timeout_s=0):
        pass
    assert vault.quarantine(vault.layout.manifest_file(there.key), "bad") is None
    assert whole(vault, there.manifest)


def test_a_small_disk(tmp_path: Path) -> None:
    small = make_entry(tmp_path / "source", "small", {"x": b"x" * 5000})
    large = make_entry(tmp_path / "source", "large", {"y": b"y" * 5000, "z": b"z" * 300_000})
    disk = tmp_path / "disk"

    def run() -> None:
        vault = Vault.open(disk / "vault")
        vault.publish(small.manifest, small.files)
        with pytest.raises(VaultFullError, match="free space"):
            vault.publish(large.manifest, large.files)
        assert vault.lookup(large.key) is None
        assert whole(vault, small.manifest)
        assert leftovers(vault) == []
        with vault.lock(large.key, timeout_s=0):
            pass

    with_own_tmpfs(disk, "128k", run)


def test_a_disk_too_full_for_a_vault(tmp_path: Path) -> None:
    disk = tmp_path / "disk"

    def run() -> None:
        with pytest.raises(OSError, match="space"):
            (disk / "filler").write_bytes(bytes(1 << 20))
        with pytest.raises(VaultFullError):
            Vault.open(disk / "vault")

    with_own_tmpfs(disk, "16k", run)


def test_a_read_only_mount(tmp_path: Path, entry: Entry) -> None:
    new = make_entry(tmp_path / "source", "new", {"x": b"x"})
    disk = tmp_path / "disk"

    def run() -> None:
        vault = Vault.open(disk / "vault")
        vault.publish(entry.manifest, entry.files)
        assert vault.writable
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        # One that was opened before learns it from the first write.
        with pytest.raises(VaultNotWritableError):
            vault.publish(new.manifest, new.files)
        assert vault.quarantine(vault.layout.manifest_file(entry.key), "bad") is None
        refuses_every_write(Vault.open(disk / "vault"), entry, new)
        with pytest.raises(VaultNotWritableError):
            Vault.open(disk / "another")

    with_own_tmpfs(disk, "1m", run)


def test_a_limit_on_file_size(vault: Vault, tmp_path: Path) -> None:
    large = make_entry(tmp_path / "source", "large", {"y": b"y" * 300_000})

    def run() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))
        with pytest.raises(VaultFullError):
            vault.publish(large.manifest, large.files)

    assert in_child(run) == 0
    assert vault.lookup(large.key) is None
    assert leftovers(vault) == []


def test_permission_denied(open_folder: Path) -> None:
    there = make_entry(open_folder / "source", "there", {"x": b"x"})
    new = make_entry(open_folder / "source", "new", {"y": b"y"})
    Vault.open(open_folder / "vault").publish(there.manifest, there.files)
    as_user_without_permission(open_folder, lambda: refuses_every_write(Vault.open(open_folder / "vault"), there, new))


def test_a_folder_in_which_no_vault_can_be_made(open_folder: Path) -> None:
    def run() -> None:
        with pytest.raises(VaultNotWritableError, match="Fix the permissions"):
            Vault.open(open_folder / "vault")

    as_user_without_permission(open_folder, run)


@pytest.mark.root
def test_a_folder_that_may_not_be_read(open_folder: Path) -> None:
    Vault.open(open_folder / "vault").root.chmod(0o700)

    def run() -> None:
        with pytest.raises(VaultNotWritableError, match="Fix the permissions"):
            Vault.open(open_folder / "vault")

    as_user_without_permission(open_folder, run)


def test_the_folder_is_deleted_while_in_use(vault: Vault, entry: Entry) -> None:
    vault.publish(entry.manifest, entry.files)
    shutil.rmtree(vault.root)
    assert vault.lookup(entry.key) is None
    assert list(vault.manifests()) == []
    assert list(iter_foreign(vault.layout)) == []
    assert vault.quarantine(vault.layout.manifest_file(entry.key), "bad") is None
