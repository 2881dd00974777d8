"""What every kind of tier must do: one suite, run over all of them."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from helpers.mounts import as_user_without_permission, with_own_tmpfs
from helpers.store_entries import Entry, leftovers, make_entry, read_artifacts, search, whole
from pipevault.digest import digest_bytes
from pipevault.errors import CorruptEntryError, VaultNotWritableError
from pipevault.settings import Settings, Tier
from pipevault.store.tiers import TierHit, Tiers
from pipevault.store.vault import Vault

Prepare = Callable[[Vault], None]
Check = Callable[[Path], None]
DISK_SIZE = "2m"


@dataclass(frozen=True)
class Kind:
    """A kind of tier. ``run(folder, prepare, check)`` makes one below ``folder``, which ``prepare`` fills, and calls
    ``check`` with its path, perhaps in another process.
    """

    name: str
    run: Callable[[Path, Prepare, Check], None]
    writable: bool = True
    allow_group_write: bool = False

    def tiers(self, root: Path, own: Path | None = None) -> Tiers:
        """``root`` as a tier behind the vault ``own``; without one, behind a folder that is never made."""
        own = root.with_name("none") if own is None else own
        tier = Tier(root, copy=own.exists())
        return Tiers(Settings(own, tiers=(tier,), allow_group_write=self.allow_group_write))

    def found(self, root: Path, entry: Entry) -> tuple[Tiers, TierHit]:
        tiers = self.tiers(root)
        found, problems = search(tiers, entry.key)
        assert problems == []
        assert found is not None
        assert found.manifest == entry.manifest
        return tiers, found


def local(folder: Path, prepare: Prepare, check: Check) -> None:
    prepare(Vault.open(folder / "vault"))
    check(folder / "vault")


def copied(folder: Path, prepare: Prepare, check: Check) -> None:
    prepare(Vault.open(folder / "vault"))
    subprocess.run(["cp", "-r", str(folder / "vault"), str(folder / "copy")], check=True)
    shutil.rmtree(folder / "vault")
    check(folder / "copy")


def reached_through_a_link(folder: Path, prepare: Prepare, check: Check) -> None:
    prepare(Vault.open(folder / "vault"))
    (folder / "link").symlink_to("vault")
    check(folder / "link")


def writable_for_its_group(folder: Path, prepare: Prepare, check: Check) -> None:
    prepare(Vault.open(folder / "vault"))
    for path in [folder / "vault", *(folder / "vault").rglob("*")]:
        path.chmod(path.stat().st_mode | 0o020)
    check(folder / "vault")


def on_tmpfs(folder: Path, prepare: Prepare, check: Check) -> None:
    with_own_tmpfs(folder / "disk", DISK_SIZE, lambda: local(folder / "disk", prepare, check))


def on_a_read_only_mount(folder: Path, prepare: Prepare, check: Check) -> None:
    def run() -> None:
        prepare(Vault.open(folder / "disk" / "vault"))
        subprocess.run(["mount", "-o", "remount,ro", str(folder / "disk")], check=True)
        check(folder / "disk" / "vault")

    with_own_tmpfs(folder / "disk", DISK_SIZE, run)


def without_permission_to_write(folder: Path, prepare: Prepare, check: Check) -> None:
    prepare(Vault.open(folder / "vault"))
    as_user_without_permission(folder, lambda: check(folder / "vault"))


KINDS = (
    Kind("local", local),
    Kind("copied", copied),
    Kind("link", reached_through_a_link),
    Kind("group", writable_for_its_group, allow_group_write=True),
    Kind("tmpfs", on_tmpfs),
    Kind("read-only mount", on_a_read_only_mount, writable=False),
    Kind("no permission", without_permission_to_write, writable=False),
)


@pytest.fixture(params=KINDS, ids=lambda kind: kind.name)
def kind(request: pytest.FixtureRequest) -> Kind:
    chosen: Kind = request.param
    return chosen


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """One below which any user may look (pytest's own is closed to others)."""
    made = Path(tempfile.mkdtemp())
    made.chmod(0o755)
    monkeypatch.setenv("XDG_STATE_HOME", str(made / "state"))
    yield made
    shutil.rmtree(made)


@pytest.fixture
def fill(entry: Entry) -> Prepare:
    def prepare(vault: Vault) -> None:
        vault.publish(entry.manifest, entry.files)

    return prepare


def snapshot(root: Path) -> dict[Path, tuple[int, float]]:
    return {path: (path.lstat().st_size, path.lstat().st_mtime) for path in sorted(root.rglob("*"))}


def test_an_entry_is_found_and_its_bytes_are_handed_out(kind: Kind, folder: Path, fill: Prepare, entry: Entry) -> None:
    def check(root: Path) -> None:
        tiers, found = kind.found(root, entry)
        assert (found.tier.dir, found.vault.writable) == (root, kind.writable)
        read = read_artifacts(tiers, found)
        assert set(read) == {ref.digest.hex for ref in entry.manifest.artifacts}
        assert all(digest_bytes(data).hex == digest for digest, data in read.items())

    kind.run(folder, fill, check)


def test_an_entry_that_is_not_there_is_no_problem(kind: Kind, folder: Path, fill: Prepare, entry: Entry) -> None:
    other = make_entry(folder / "source", "other", {"x": b"x"})

    def check(root: Path) -> None:
        tiers = kind.tiers(root)
        assert search(tiers, other.key) == (None, [])
        assert list(tiers.newest(10)) == [entry.manifest]

    kind.run(folder, fill, check)


def test_reading_changes_nothing(kind: Kind, folder: Path, fill: Prepare, entry: Entry) -> None:
    def check(root: Path) -> None:
        before = snapshot(root.resolve())
        tiers, found = kind.found(root, entry)
        read_artifacts(tiers, found)
        assert snapshot(root.resolve()) == before

    kind.run(folder, fill, check)


def test_it_is_written_or_refuses_to_be(kind: Kind, folder: Path, fill: Prepare, entry: Entry) -> None:
    other = make_entry(folder / "source", "other", {"x": b"x"})

    def check(root: Path) -> None:
        _, found = kind.found(root, entry)
        if kind.writable:
            found.vault.publish(other.manifest, other.files)
            assert whole(found.vault, other.manifest)
        else:
            before = snapshot(root)
            with pytest.raises(VaultNotWritableError):
                found.vault.publish(other.manifest, other.files)
            assert snapshot(root) == before
        assert whole(found.vault, entry.manifest)
        assert leftovers(found.vault) == []

    kind.run(folder, fill, check)


def test_a_damaged_artifact_is_noticed_and_set_aside_where_that_is_possible(
    kind: Kind, folder: Path, fill: Prepare, entry: Entry
) -> None:
    damaged = entry.manifest.artifacts[0].digest

    def prepare(vault: Vault) -> None:
        fill(vault)
        path = vault.layout.artifact_file(damaged)
        data = path.read_bytes()
        path.chmod(0o644)
        path.write_bytes(data[:100] + bytes([data[100] ^ 1]) + data[101:])

    def check(root: Path) -> None:
        tiers, found = kind.found(root, entry)
        with pytest.raises(CorruptEntryError, match="damaged") as caught:
            read_artifacts(tiers, found)
        assert caught.value.path == found.vault.layout.artifact_file(damaged)
        moved = tiers.quarantine(found.vault, found.tier, caught.value.path, "damaged")
        assert (moved is not None) == kind.writable
        assert caught.value.path.exists() == (not kind.writable)

    kind.run(folder, prepare, check)


def test_a_use_is_noted_or_quietly_not(kind: Kind, folder: Path, fill: Prepare, entry: Entry) -> None:
    def check(root: Path) -> None:
        tiers, found = kind.found(root, entry)
        before = snapshot(root.resolve())
        lease = tiers.hold(found)
        layout = found.vault.layout
        assert layout.use_file(entry.key).exists() == kind.writable
        assert lease.held == kind.writable
        if not kind.writable:
            assert snapshot(root.resolve()) == before
        lease.release()
        assert not layout.leases_dir.exists() or list(layout.leases_dir.iterdir()) == []

    kind.run(folder, fill, check)


def test_an_entry_is_copied_from_it(kind: Kind, folder: Path, fill: Prepare, entry: Entry) -> None:
    def check(root: Path) -> None:
        own = Vault.open(Path(tempfile.mkdtemp()))
        tiers = kind.tiers(root, own.root)
        found = tiers.lookup(entry.key)
        assert found is not None
        assert tiers.copy_nearer(found).vault.root == own.root
        assert whole(own, entry.manifest)
        assert os.listdir(own.layout.tmp_dir) == []
        shutil.rmtree(own.root)

    kind.run(folder, fill, check)


def test_a_group_that_may_write_is_not_trusted_without_the_setting(folder: Path, fill: Prepare, entry: Entry) -> None:
    def check(root: Path) -> None:
        tiers = Kind("group", writable_for_its_group).tiers(root)
        found, problems = search(tiers, entry.key)
        assert found is None
        assert "can be written by its group" in problems[0]

    writable_for_its_group(folder, fill, check)
