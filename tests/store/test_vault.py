"""Opening, looking up, verifying and publishing in one process."""

from __future__ import annotations

import json
import pickle
import shutil
import stat
from pathlib import Path

import pytest

from helpers.store_entries import Entry, leftovers, make_entry, make_key, whole
from pipevault.digest import digest_bytes
from pipevault.errors import (
    CorruptEntryError,
    DamagedVaultError,
    NewerVaultError,
    NotAVaultError,
    UnknownKeyError,
    UnsafeVaultError,
    VaultError,
)
from pipevault.store import marker
from pipevault.store.layout import Layout
from pipevault.store.manifest import ArtifactRef, Manifest
from pipevault.store.places import iter_foreign
from pipevault.store.vault import BrokenManifest, Vault

# --- opening


def test_an_absent_folder_becomes_a_vault(tmp_path: Path) -> None:
    vault = Vault.open(tmp_path / "a" / "b")
    assert vault.writable
    marker = json.loads((tmp_path / "a" / "b" / "vault.json").read_bytes())
    assert marker["pipevault_vault"] == 2
    assert marker["created_at"]
    assert list(vault.manifests()) == []


def test_an_empty_folder_becomes_a_vault_also_on_a_fresh_file_system(tmp_path: Path) -> None:
    (tmp_path / "lost+found").mkdir()
    assert list(iter_foreign(Vault.open(tmp_path).layout)) == []


def test_opening_again_changes_nothing(vault: Vault) -> None:
    before = vault.layout.vault_file.read_bytes()
    assert Vault.open(vault.root) == vault
    assert Vault.open(vault.root, create=False) == vault
    assert vault.layout.vault_file.read_bytes() == before


def test_a_vault_that_is_not_there_is_not_made_unasked(tmp_path: Path) -> None:
    with pytest.raises(NotAVaultError, match="no vault at"):
        Vault.open(tmp_path / "absent", create=False)
    assert not (tmp_path / "absent").exists()


@pytest.mark.parametrize("create", [True, False])
def test_a_folder_with_other_files(tmp_path: Path, create: bool) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(NotAVaultError, match=r"thesis\.tex"):
        Vault.open(tmp_path, create=create)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_folder_whose_tmp_is_not_ours(tmp_path: Path) -> None:
    (tmp_path / "tmp").mkdir()
    (tmp_path / "tmp" / "scratch").write_text("precious")
    with pytest.raises(NotAVaultError):
        Vault.open(tmp_path)


def test_a_folder_whose_tmp_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "tmp").write_text("precious")
    with pytest.raises(NotAVaultError, match="holds files"):
        Vault.open(tmp_path)


def test_a_vault_that_another_process_makes_and_fills_between_two_looks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, entry = tmp_path / "vault", make_entry(tmp_path / "source", "a", {"x": b"1"})
    look = marker.foreign_names

    def late(layout: Layout) -> list[str]:
        monkeypatch.setattr(marker, "foreign_names", look)
        Vault.open(root).publish(entry.manifest, entry.files)
        return look(layout)

    monkeypatch.setattr(marker, "foreign_names", late)
    assert whole(Vault.open(root), entry.manifest)


def test_a_link_in_a_vault_that_another_process_makes_between_two_looks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, look = tmp_path / "vault", marker.foreign_names

    def late(layout: Layout) -> list[str]:
        monkeypatch.setattr(marker, "foreign_names", look)
        layout.uses_dir.parent.mkdir()
        layout.uses_dir.symlink_to(tmp_path)
        layout.vault_file.write_text('{"pipevault_vault": 2}')
        return look(layout)

    monkeypatch.setattr(marker, "foreign_names", late)
    with pytest.raises(UnsafeVaultError, match="leads out of the vault"):
        Vault.open(root)


def test_a_folder_whose_tmp_is_a_link_becomes_no_vault(tmp_path: Path) -> None:
    root, outside = tmp_path / "vault", tmp_path / "outside"
    root.mkdir()
    outside.mkdir()
    (root / "tmp").symlink_to(outside)
    with pytest.raises(UnsafeVaultError, match="leads out of the vault"):
        Vault.open(root)
    assert not (root / "vault.json").exists()


def test_a_path_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(NotAVaultError, match="is a file"):
        Vault.open(tmp_path / "file")
    with pytest.raises(NotAVaultError, match="below one"):
        Vault.open(tmp_path / "file" / "below")


def test_a_loop_of_links(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(VaultError):
        Vault.open(tmp_path / "loop")


def test_a_newer_vault_is_refused(vault: Vault) -> None:
    vault.layout.vault_file.write_text('{"pipevault_vault": 3, "created_at": "later", "new": 1}')
    with pytest.raises(NewerVaultError, match="Upgrade pipevault"):
        Vault.open(vault.root)


@pytest.mark.parametrize("marker", ["", "{", "[]", "{}", '{"pipevault_vault": "1"}', '{"pipevault_vault": 0}'])
def test_a_marker_that_is_none(vault: Vault, marker: str) -> None:
    vault.layout.vault_file.write_text(marker)
    with pytest.raises(DamagedVaultError, match="restore the file"):
        Vault.open(vault.root)


def test_a_vault_can_be_pickled(vault: Vault) -> None:
    assert pickle.loads(pickle.dumps(vault)) == vault


def test_a_vault_can_be_copied(vault: Vault, entry: Entry, tmp_path: Path) -> None:
    vault.publish(entry.manifest, entry.files)
    shutil.copytree(vault.root, tmp_path / "copy")
    assert whole(Vault.open(tmp_path / "copy"), entry.manifest)


# --- publishing and reading


def test_what_was_published_is_found(vault: Vault, entry: Entry) -> None:
    assert vault.lookup(entry.key) is None
    assert vault.publish(entry.manifest, entry.files) == entry.manifest
    assert vault.lookup(entry.key) == entry.manifest
    for ref in entry.manifest.artifacts:
        path = vault.verified_path(ref)
        assert digest_bytes(path.read_bytes()) == ref.digest
        assert stat.S_IMODE(path.stat().st_mode) == 0o444
    assert leftovers(vault) == []
    assert list(iter_foreign(vault.layout)) == []


def test_the_callers_files_stay(vault: Vault, entry: Entry) -> None:
    vault.publish(entry.manifest, entry.files)
    assert all(path.exists() for path in entry.files.values())


def test_files_may_lie_in_the_vaults_staging_folder(vault: Vault, entry: Entry) -> None:
    with vault.staging() as folder:
        files = {digest: Path(shutil.copy(path, folder)) for digest, path in entry.files.items()}
        vault.publish(entry.manifest, files)
    assert not folder.exists()
    assert whole(vault, entry.manifest)


def test_a_whole_entry_is_immutable(vault: Vault, entry: Entry, tmp_path: Path) -> None:
    vault.publish(entry.manifest, entry.files)
    other = make_entry(tmp_path / "other", "a", {"unet/0.pt2": b"other bits"})
    assert other.key == entry.key
    assert vault.publish(other.manifest, other.files) == entry.manifest
    assert vault.lookup(entry.key) == entry.manifest
    assert not vault.layout.artifact_file(other.manifest.artifacts[0].digest).exists()


def test_an_entry_without_artifacts(vault: Vault) -> None:
    manifest = Manifest(make_key("empty"), {}, (), {}, "now")
    vault.publish(manifest, {})
    assert vault.lookup(manifest.key.digest) == manifest


def test_an_artifact_that_is_there_needs_no_file(vault: Vault, entry: Entry, tmp_path: Path) -> None:
    vault.publish(entry.manifest, entry.files)
    manifest = Manifest(make_key("b"), {}, entry.manifest.artifacts[:1], {}, "now")
    vault.publish(manifest, {})
    assert whole(vault, manifest)


def test_an_artifact_that_is_nowhere(vault: Vault, entry: Entry) -> None:
    with pytest.raises(CorruptEntryError, match="No file was given"):
        vault.publish(entry.manifest, dict(list(entry.files.items())[:1]))
    assert vault.lookup(entry.key) is None
    assert leftovers(vault) == []


def test_a_file_that_nobody_names(vault: Vault, entry: Entry, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not name"):
        vault.publish(entry.manifest, {**entry.files, digest_bytes(b"x"): tmp_path / "x"})


@pytest.mark.parametrize("change", [lambda data: data[:-1], lambda data: b"X" + data[1:], lambda data: b""])
def test_a_file_that_changed_since_it_was_described(vault: Vault, entry: Entry, change) -> None:  # type: ignore[no-untyped-def]
    source = entry.files[entry.manifest.artifacts[1].digest]
    source.write_bytes(change(source.read_bytes()))
    with pytest.raises(CorruptEntryError, match="It changed"):
        vault.publish(entry.manifest, entry.files)
    assert vault.lookup(entry.key) is None
    assert leftovers(vault) == []
    assert not vault.layout.artifacts_dir.exists()


def test_a_manifest_that_is_no_json_is_noticed_before_anything_is_written(vault: Vault) -> None:
    manifest = Manifest(make_key("a"), {"x": "\ud800"}, (), {}, "now")
    with pytest.raises(ValueError, match="surrogates"):
        vault.publish(manifest, {})
    assert not vault.layout.entries_dir.exists()


# --- damage


def damage_artifact(vault: Vault, ref: ArtifactRef, data: bytes | None) -> Path:
    path = vault.layout.artifact_file(ref.digest)
    path.unlink()
    if data is not None:
        path.write_bytes(data)
    return path


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda data: None, "is missing"),
        (lambda data: b"", "has 0 bytes instead of"),
        (lambda data: data[:-1], "bytes instead of"),
        (lambda data: data + b"\0", "bytes instead of"),
        (lambda data: data[:-1] + bytes([data[-1] ^ 1]), "have digest"),
    ],
)
def test_a_damaged_artifact_is_named_and_heals_when_frozen_again(  # type: ignore[no-untyped-def]
    vault: Vault, entry: Entry, damage, reason: str
) -> None:
    vault.publish(entry.manifest, entry.files)
    ref = entry.manifest.artifacts[0]
    bad = damage(vault.verified_path(ref).read_bytes())
    path = damage_artifact(vault, ref, bad)
    with pytest.raises(CorruptEntryError, match=reason) as caught:
        vault.verified_path(ref)
    assert ref.name in str(caught.value)
    assert caught.value.path == path

    vault.publish(entry.manifest, entry.files)
    assert whole(vault, entry.manifest)
    if bad is not None:
        assert bad in [file.read_bytes() for file in vault.layout.quarantine_dir.iterdir()]
    assert list(iter_foreign(vault.layout)) == []
    assert leftovers(vault) == []


def test_an_artifact_that_is_a_folder_heals(vault: Vault, entry: Entry) -> None:
    vault.publish(entry.manifest, entry.files)
    ref = entry.manifest.artifacts[0]
    damage_artifact(vault, ref, None).mkdir()
    with pytest.raises(VaultError):
        vault.verified_path(ref)
    vault.publish(entry.manifest, entry.files)
    assert whole(vault, entry.manifest)


@pytest.mark.parametrize(
    "data", [b"", b"no JSON", b"{}", b"\xff\xfe", b"[1, 2]"], ids=["empty", "text", "object", "bytes", "list"]
)
def test_a_manifest_that_is_none_heals(vault: Vault, entry: Entry, data: bytes) -> None:
    vault.publish(entry.manifest, entry.files)
    path = vault.layout.manifest_file(entry.key)
    path.write_bytes(data)
    with pytest.raises(CorruptEntryError) as caught:
        vault.lookup(entry.key)
    assert caught.value.path == path
    vault.publish(entry.manifest, entry.files)
    assert whole(vault, entry.manifest)
    assert data in [file.read_bytes() for file in vault.layout.quarantine_dir.iterdir()]


def test_the_manifest_of_another_key(vault: Vault, entry: Entry, tmp_path: Path) -> None:
    vault.publish(entry.manifest, entry.files)
    other = make_key("b").digest
    path = vault.layout.manifest_file(other)
    path.parent.mkdir(exist_ok=True)
    shutil.copy(vault.layout.manifest_file(entry.key), path)
    with pytest.raises(CorruptEntryError, match="belongs to key"):
        vault.lookup(other)


def test_a_manifest_that_cannot_be_read(vault: Vault, entry: Entry) -> None:
    vault.layout.entries_dir.write_text("a file where the folder should be")
    with pytest.raises(CorruptEntryError, match="cannot be read"):
        vault.lookup(entry.key)


def test_a_manifest_of_a_later_format_is_neither_used_nor_replaced(vault: Vault, entry: Entry) -> None:
    path = vault.layout.manifest_file(entry.key)
    path.parent.mkdir(parents=True)
    path.write_text('{"manifest_version": 3}')
    with pytest.raises(NewerVaultError):
        vault.lookup(entry.key)
    with pytest.raises(NewerVaultError):
        vault.publish(entry.manifest, entry.files)
    assert path.read_text() == '{"manifest_version": 3}'


def test_quarantine_keeps_the_file_with_the_reason(vault: Vault, entry: Entry) -> None:
    vault.publish(entry.manifest, entry.files)
    path = vault.layout.artifact_file(entry.manifest.artifacts[0].digest)
    data = path.read_bytes()
    moved = vault.quarantine(path, "one bit flipped")
    assert moved is not None
    assert moved.read_bytes() == data
    assert not path.exists()
    reason = vault.layout.reason_file(moved).read_text()
    assert reason == f"one bit flipped\n{path.relative_to(vault.root)}\n"
    assert vault.quarantine(path, "again") is None
    with pytest.raises(ValueError, match="not a file of the vault"):
        vault.quarantine(vault.root.parent / "file", "outside")


# --- listing and finding


def test_manifests_come_sorted_and_broken_ones_with_their_reason(vault: Vault, tmp_path: Path) -> None:
    entries = [make_entry(tmp_path / "source", name, {"x": name.encode()}) for name in "abcdef"]
    for entry in entries:
        vault.publish(entry.manifest, entry.files)
    broken, newer = entries[0], entries[1]
    vault.layout.manifest_file(broken.key).write_bytes(b"x")
    vault.layout.manifest_file(newer.key).write_bytes(b'{"manifest_version":9}')
    found = list(vault.manifests())
    keys = [item.key if isinstance(item, BrokenManifest) else item.key.digest for item in found]
    assert keys == sorted(entry.key for entry in entries)
    reasons = {item.key: item.reason for item in found if isinstance(item, BrokenManifest)}
    assert reasons.keys() == {broken.key, newer.key}
    assert "Upgrade" in reasons[newer.key]


def test_foreign_files_are_reported_and_harmless(vault: Vault, entry: Entry, tmp_path: Path) -> None:
    vault.publish(entry.manifest, entry.files)
    shard = vault.layout.manifest_file(entry.key).parent
    foreign = [
        vault.root / "README.txt",
        vault.layout.entries_dir / "notes",
        shard / ".DS_Store",
        shard / f"{entry.key}.json.bak",
        vault.layout.artifacts_dir / "zz",
        vault.layout.locks_dir / "x.lock",
        vault.layout.tmp_dir / "scratch",
        vault.layout.quarantine_dir / "x",
    ]
    for path in foreign:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("foreign")
    folder = vault.root / "folder"
    folder.mkdir()
    (folder / "file").write_text("reported through its folder")
    link = shard.parent / "00"
    if link != shard:
        link.symlink_to(tmp_path)
        foreign.append(link)
    assert sorted(iter_foreign(vault.layout)) == sorted([*foreign, folder])
    assert Vault.open(vault.root) == vault
    assert list(vault.manifests()) == [entry.manifest]
    assert whole(vault, entry.manifest)


def test_find_by_the_beginning_of_the_key(vault: Vault, tmp_path: Path) -> None:
    entries = [make_entry(tmp_path / "source", str(number), {"x": b""}) for number in range(17)]
    for entry in entries:
        vault.publish(entry.manifest, entry.files)
    by_first_digit: dict[str, list[str]] = {}
    for entry in entries:
        assert vault.find(entry.key.hex) == entry.manifest
        assert vault.find(entry.key.short.upper()) == entry.manifest
        by_first_digit.setdefault(entry.key.hex[0], []).append(entry.key.hex)
    digit, candidates = max(by_first_digit.items(), key=lambda item: len(item[1]))
    with pytest.raises(UnknownKeyError, match="Give more digits") as caught:
        vault.find(digit)
    assert caught.value.candidates == tuple(sorted(candidates))


@pytest.mark.parametrize("prefix", ["", "xyz", "../..", "0" * 65, "a*", "é"])
def test_what_is_no_beginning_of_a_key(vault: Vault, prefix: str) -> None:
    with pytest.raises(UnknownKeyError, match="is not a key"):
        vault.find(prefix)


@pytest.mark.parametrize("prefix", ["0", "00", "0" * 64])
def test_an_unknown_key(vault: Vault, prefix: str) -> None:
    with pytest.raises(UnknownKeyError, match="No entry") as caught:
        vault.find(prefix)
    assert caught.value.candidates == ()
