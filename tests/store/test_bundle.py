"""Bundles: what goes in comes out, the same entries make the same bytes, and nothing of a bad one is imported."""

from __future__ import annotations

import io
import os
import random
import shutil
import stat
import zipfile
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from helpers.bundles import bundle_bytes, everything_below, files_of
from helpers.fault_steps import GROWING_CALLS, disk_full, killed_at_each_step, strike_at
from helpers.store_entries import CREATED_AT, Entry, leftovers, make_entry, make_key, whole
from pipevault.digest import canonical_json, digest_bytes
from pipevault.errors import (
    BundleError,
    CannotSaveError,
    CorruptEntryError,
    NewerBundleError,
    NewerVaultError,
    NoBundleError,
    UnknownKeyError,
    UnsafeVaultError,
    VaultFullError,
    VaultNotWritableError,
)
from pipevault.files.claims import claim_folder
from pipevault.store.bundle import bundle_keys, export_bundle, import_bundle, zip_file
from pipevault.store.bundle.zip_file import MARKER
from pipevault.store.check import verify
from pipevault.store.manifest import ArtifactRef, Manifest
from pipevault.store.places import signature_files
from pipevault.store.trust.signature import check_signature
from pipevault.store.trust.signing_keys import PrivateKey
from pipevault.store.vault import Vault

OURS = PrivateKey(Ed25519PrivateKey.from_private_bytes(bytes(range(32))))
SHARED = b"shared" * 500


@pytest.fixture
def pair(vault: Vault, tmp_path: Path) -> tuple[Entry, Entry]:
    """Two published entries that share an artifact; the first is signed."""
    first = make_entry(tmp_path / "source", "a", {"unet/0.pt2": SHARED, "vae/0.pt2": b"own" * 50})
    second = make_entry(tmp_path / "source", "b", {"unet/0.pt2": SHARED, "empty": b""})
    for entry in (first, second):
        vault.publish(entry.manifest, entry.files)
    vault.sign(first.manifest, OURS)
    return first, second


@pytest.fixture
def bundle(vault: Vault, pair: tuple[Entry, Entry], tmp_path: Path) -> Path:
    path = tmp_path / "pair.zip"
    export_bundle(vault, [entry.key for entry in pair], path)
    return path


@pytest.fixture
def other(tmp_path: Path) -> Vault:
    return Vault.open(tmp_path / "other" / "vault")


class TestRoundTrip:
    def test_entries_and_signatures_arrive(self, bundle: Path, pair: tuple[Entry, Entry], other: Vault) -> None:
        assert import_bundle(other, bundle) == sorted(entry.key for entry in pair)
        for entry in pair:
            assert whole(other, entry.manifest)
            assert other.lookup(entry.key) == entry.manifest
        assert check_signature(other.layout, pair[0].manifest, policy="require", trusted=[OURS.public]) is None
        assert leftovers(other) == []
        assert verify(other, trusted=[OURS.public]).findings == ()

    def test_modes_are_those_of_a_vault(self, bundle: Path, pair: tuple[Entry, Entry], other: Vault) -> None:
        import_bundle(other, bundle)
        modes = {
            path.relative_to(other.root).parts[0]: stat.S_IMODE(path.stat().st_mode)
            for path in other.root.rglob("*")
            if path.is_file()
        }
        assert modes == {"vault.json": 0o644, "artifacts": 0o444, "entries": 0o644, "signatures": 0o644}

    def test_the_report_and_the_keys(self, vault: Vault, pair: tuple[Entry, Entry], tmp_path: Path) -> None:
        path = tmp_path / "both.zip"
        report = export_bundle(vault, [pair[1].key, pair[0].key, pair[1].key], path)
        assert report.keys == bundle_keys(path) == tuple(sorted(entry.key for entry in pair))
        assert (report.artifacts, report.signatures, report.size_bytes) == (3, 1, path.stat().st_size)

    def test_one_entry_takes_only_what_it_needs(self, vault: Vault, pair: tuple[Entry, Entry], tmp_path: Path) -> None:
        export_bundle(vault, [pair[1].key], tmp_path / "one.zip")
        names = zipfile.ZipFile(tmp_path / "one.zip").namelist()
        assert len([name for name in names if name.startswith("artifacts/")]) == 2
        assert [name for name in names if name.startswith("signatures/")] == []

    def test_an_entry_without_artifacts(self, vault: Vault, other: Vault, tmp_path: Path) -> None:
        manifest = Manifest(make_key("nothing"), {}, (), {}, CREATED_AT)
        vault.publish(manifest, {})
        export_bundle(vault, [manifest.key.digest], tmp_path / "x.zip")
        assert import_bundle(other, tmp_path / "x.zip") == [manifest.key.digest]

    def test_progress_counts_to_the_end(
        self, vault: Vault, pair: tuple[Entry, Entry], other: Vault, tmp_path: Path
    ) -> None:
        for work in (
            lambda progress: export_bundle(vault, [pair[0].key], tmp_path / "x.zip", progress=progress),
            lambda progress: import_bundle(other, tmp_path / "x.zip", progress=progress),
        ):
            seen: list[tuple[int, int]] = []
            work(lambda done, total, seen=seen: seen.append((done, total)))
            assert seen == sorted(seen)
            assert len({total for _, total in seen}) == 1
            assert seen[-1][0] == seen[-1][1]

    def test_a_vault_that_was_copied_with_cp_works(
        self, vault: Vault, pair: tuple[Entry, Entry], tmp_path: Path
    ) -> None:
        os.system(f"cp -r '{vault.root}' '{tmp_path}/copy'")
        shutil.rmtree(vault.root)
        copy = Vault.open(tmp_path / "copy", create=False)
        assert all(whole(copy, entry.manifest) for entry in pair)
        assert verify(copy).findings == ()
        assert check_signature(copy.layout, pair[0].manifest, policy="require", trusted=[OURS.public]) is None
        late = make_entry(tmp_path / "source", "late", {"unet/0.pt2": SHARED})
        copy.publish(late.manifest, late.files)
        assert whole(copy, late.manifest)


class TestReproducible:
    def test_the_same_entries_make_the_same_bytes(self, bundle: Path, pair: tuple[Entry, Entry], other: Vault) -> None:
        import_bundle(other, bundle)
        for path in other.root.rglob("*"):
            os.utime(path, (1_000_000_000, 1_000_000_000))
        (other.layout.entries_dir / "note.txt").write_text("foreign")
        again = bundle.with_name("again.zip")
        export_bundle(other, [entry.key for entry in reversed(pair)], again)
        assert again.read_bytes() == bundle.read_bytes()

    def test_any_zip_program_opens_it(self, bundle: Path, vault: Vault) -> None:
        with zipfile.ZipFile(bundle) as opened:
            assert opened.testzip() is None
            infos = opened.infolist()
            assert [(info.filename, opened.read(info)) for info in infos[1:]] == files_of(vault)
        assert infos[0].filename == "vault.json"
        assert [info.filename for info in infos[1:]] == sorted(info.filename for info in infos[1:])
        assert {info.date_time for info in infos} == {(1980, 1, 1, 0, 0, 0)}
        assert {info.external_attr >> 16 for info in infos} == {0o100644}
        assert {info.compress_type for info in infos} == {zipfile.ZIP_STORED}

    def test_what_a_zip_program_unpacks_is_a_vault(
        self, bundle: Path, pair: tuple[Entry, Entry], tmp_path: Path
    ) -> None:
        zipfile.ZipFile(bundle).extractall(tmp_path / "unpacked")
        unpacked = Vault.open(tmp_path / "unpacked", create=False)
        assert all(whole(unpacked, entry.manifest) for entry in pair)
        assert verify(unpacked, trusted=[OURS.public]).findings == ()

    def test_no_fact_of_the_host(self, bundle: Path, vault: Vault) -> None:
        data = bundle.read_bytes()
        assert os.uname().nodename.encode() not in data
        assert str(vault.root).encode() not in data


class TestExportErrors:
    def test_no_key(self, vault: Vault, tmp_path: Path) -> None:
        with pytest.raises(UnknownKeyError, match="nothing to export"):
            export_bundle(vault, [], tmp_path / "x.zip")

    def test_an_unknown_key(self, vault: Vault, pair: tuple[Entry, Entry], tmp_path: Path) -> None:
        with pytest.raises(UnknownKeyError):
            export_bundle(vault, [pair[0].key, digest_bytes(b"unknown")], tmp_path / "x.zip")
        assert sorted(path.name for path in tmp_path.iterdir()) == ["source", "vault"]

    @pytest.mark.parametrize("damage", [b"shorter", b"x" * len(SHARED)], ids=["cut", "changed"])
    def test_a_damaged_artifact(self, vault: Vault, pair: tuple[Entry, Entry], tmp_path: Path, damage: bytes) -> None:
        path = vault.layout.artifact_file(digest_bytes(SHARED))
        path.chmod(0o644)
        path.write_bytes(damage)
        with pytest.raises(CorruptEntryError, match=path.name):
            export_bundle(vault, [pair[0].key], tmp_path / "x.zip")
        assert sorted(path.name for path in tmp_path.iterdir()) == ["source", "vault"]

    def test_a_missing_artifact(self, vault: Vault, pair: tuple[Entry, Entry], tmp_path: Path) -> None:
        vault.layout.artifact_file(digest_bytes(SHARED)).unlink()
        with pytest.raises(CorruptEntryError, match="missing"):
            export_bundle(vault, [pair[0].key], tmp_path / "x.zip")

    def test_a_damaged_manifest(self, vault: Vault, pair: tuple[Entry, Entry], tmp_path: Path) -> None:
        vault.layout.manifest_file(pair[0].key).write_bytes(b"{}")
        with pytest.raises(CorruptEntryError):
            export_bundle(vault, [pair[0].key], tmp_path / "x.zip")

    def test_a_manifest_of_a_later_format(self, vault: Vault, pair: tuple[Entry, Entry], tmp_path: Path) -> None:
        path = vault.layout.manifest_file(pair[0].key)
        path.write_bytes(path.read_bytes().replace(b'"manifest_version":2', b'"manifest_version":3'))
        with pytest.raises(NewerVaultError):
            export_bundle(vault, [pair[0].key], tmp_path / "x.zip")

    @pytest.mark.parametrize("what", ["artifact", "signature"])
    def test_a_file_that_others_may_write(
        self, vault: Vault, pair: tuple[Entry, Entry], tmp_path: Path, what: str
    ) -> None:
        [signature] = signature_files(vault.layout, pair[0].key)
        path = vault.layout.artifact_file(digest_bytes(SHARED)) if what == "artifact" else signature
        path.chmod(0o666)
        with pytest.raises(UnsafeVaultError):
            export_bundle(vault, [pair[0].key], tmp_path / "x.zip")

    def test_entries_that_disagree_about_a_size(self, vault: Vault, pair: tuple[Entry, Entry], tmp_path: Path) -> None:
        ref = pair[0].manifest.artifacts[0]
        lying = Manifest(
            make_key("lying"), {}, (ArtifactRef(ref.digest, ref.size_bytes + 1, ref.name),), {}, CREATED_AT
        )
        path = vault.layout.manifest_file(lying.key.digest)
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(lying.to_bytes())
        with pytest.raises(CorruptEntryError, match="disagree"):
            export_bundle(vault, [pair[0].key, lying.key.digest], tmp_path / "x.zip")

    def test_an_output_that_exists(self, vault: Vault, pair: tuple[Entry, Entry], tmp_path: Path) -> None:
        path = tmp_path / "x.zip"
        path.write_text("mine")
        with pytest.raises(CannotSaveError, match="exists already"):
            export_bundle(vault, [pair[0].key], path)
        assert path.read_text() == "mine"
        export_bundle(vault, [pair[0].key], path, overwrite=True)
        assert bundle_keys(path) == (pair[0].key,)

    def test_an_output_that_appears_meanwhile(self, vault: Vault, pair: tuple[Entry, Entry], tmp_path: Path) -> None:
        path = tmp_path / "x.zip"
        with pytest.raises(CannotSaveError, match="meanwhile"):
            export_bundle(vault, [pair[0].key], path, progress=lambda *_: None if path.exists() else path.touch())
        assert path.read_bytes() == b""
        assert [child.name for child in tmp_path.iterdir() if child.name.startswith(".")] == []

    @pytest.mark.parametrize("kind", ["folder", "link"])
    def test_an_output_that_is_no_file(
        self, vault: Vault, pair: tuple[Entry, Entry], tmp_path: Path, kind: str
    ) -> None:
        path = tmp_path / "x.zip"
        path.mkdir() if kind == "folder" else path.symlink_to(tmp_path / "elsewhere")
        with pytest.raises(CannotSaveError, match="not a regular file"):
            export_bundle(vault, [pair[0].key], path, overwrite=True)

    def test_no_folder_for_the_output(self, vault: Vault, pair: tuple[Entry, Entry], tmp_path: Path) -> None:
        with pytest.raises(CannotSaveError, match="does not exist"):
            export_bundle(vault, [pair[0].key], tmp_path / "none" / "x.zip")

    def test_an_output_in_the_vault(self, vault: Vault, pair: tuple[Entry, Entry], tmp_path: Path) -> None:
        (tmp_path / "link").symlink_to(vault.root)
        with pytest.raises(CannotSaveError, match="in the vault"):
            export_bundle(vault, [pair[0].key], tmp_path / "link" / "x.zip")

    def test_what_stood_there_stays_if_the_disk_is_full(
        self, vault: Vault, pair: tuple[Entry, Entry], tmp_path: Path
    ) -> None:
        path = tmp_path / "x.zip"
        path.write_text("mine")
        with strike_at(0, disk_full, ("fsync", "replace")), pytest.raises(CannotSaveError, match="No space"):
            export_bundle(vault, [pair[0].key], path, overwrite=True)
        assert path.read_text() == "mine"
        assert sorted(child.name for child in tmp_path.iterdir()) == ["source", "vault", "x.zip"]


class TestKilledExports:
    def test_what_one_left_goes_with_the_next(self, vault: Vault, pair: tuple[Entry, Entry], tmp_path: Path) -> None:
        path = tmp_path / "out" / "x.pvb"
        path.parent.mkdir()
        for step in killed_at_each_step(lambda: export_bundle(vault, [pair[0].key], path, overwrite=True)):
            left = sorted(path.parent.iterdir())
            assert [item for item in left if not item.name.startswith(".")] in ([], [path]), step
        (path.parent / ".x.pvb.4711.0123456789abcdef.part").mkdir()
        export_bundle(vault, [pair[0].key], path, overwrite=True)
        assert list(path.parent.iterdir()) == [path]

    def test_that_of_one_that_lives_stays(self, vault: Vault, pair: tuple[Entry, Entry], tmp_path: Path) -> None:
        claim = claim_folder(tmp_path / ".y.pvb.4711.0123456789abcdef.part")
        assert claim is not None
        (tmp_path / ".z.pvb.4711.0123456789abcdef.tmp").mkdir()
        export_bundle(vault, [pair[0].key], tmp_path / "x.pvb")
        assert claim.path.is_dir()
        assert (tmp_path / ".z.pvb.4711.0123456789abcdef.tmp").is_dir(), "no file of an export"
        claim.release()


class TestImportIntoAVaultThatHoldsSome:
    def test_what_is_there_stays(self, bundle: Path, pair: tuple[Entry, Entry], other: Vault, tmp_path: Path) -> None:
        mine = make_entry(tmp_path / "mine", "a", {"unet/0.pt2": b"frozen here"})
        other.publish(mine.manifest, mine.files)
        assert import_bundle(other, bundle) == [pair[1].key]
        assert other.lookup(pair[0].key) == mine.manifest
        assert signature_files(other.layout, pair[0].key) == (), "it is over another manifest"
        assert verify(other).bad == ()

    def test_again_imports_nothing_and_writes_no_artifact(
        self, bundle: Path, pair: tuple[Entry, Entry], other: Vault
    ) -> None:
        import_bundle(other, bundle)
        before = everything_below(other.root)
        assert import_bundle(other, bundle) == []
        assert everything_below(other.root) == before

    def test_a_signature_that_is_missing_is_added(self, bundle: Path, pair: tuple[Entry, Entry], other: Vault) -> None:
        import_bundle(other, bundle)
        [signature] = signature_files(other.layout, pair[0].key)
        data = signature.read_bytes()
        signature.unlink()
        assert import_bundle(other, bundle) == []
        assert signature.read_bytes() == data

    def test_a_signature_that_is_there_stays(self, bundle: Path, pair: tuple[Entry, Entry], other: Vault) -> None:
        import_bundle(other, bundle)
        [signature] = signature_files(other.layout, pair[0].key)
        signature.write_bytes(b"other")
        import_bundle(other, bundle)
        assert signature.read_bytes() == b"other"

    def test_a_damaged_entry_is_replaced(self, bundle: Path, pair: tuple[Entry, Entry], other: Vault) -> None:
        import_bundle(other, bundle)
        artifact = other.layout.artifact_file(digest_bytes(b"own" * 50))
        artifact.chmod(0o644)
        artifact.write_bytes(b"damaged")
        other.layout.manifest_file(pair[1].key).write_bytes(b"damaged")
        assert import_bundle(other, bundle) == sorted(entry.key for entry in pair)
        assert all(whole(other, entry.manifest) for entry in pair)

    def test_an_entry_of_a_later_format_stays(self, bundle: Path, pair: tuple[Entry, Entry], other: Vault) -> None:
        import_bundle(other, bundle)
        path = other.layout.manifest_file(pair[0].key)
        later = path.read_bytes().replace(b'"manifest_version":2', b'"manifest_version":3')
        path.write_bytes(later)
        assert import_bundle(other, bundle) == []
        assert path.read_bytes() == later

    def test_another_process_that_publishes_first(
        self, bundle: Path, pair: tuple[Entry, Entry], other: Vault, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        mine = make_entry(tmp_path / "mine", "a", {"unet/0.pt2": b"frozen here"})
        publish = Vault.publish

        def late(vault: Vault, manifest: Manifest, files: Any) -> Manifest:
            if manifest.key.digest == mine.key:
                publish(vault, mine.manifest, mine.files)
            return publish(vault, manifest, files)

        monkeypatch.setattr(Vault, "publish", late)
        assert import_bundle(other, bundle) == [pair[1].key]
        assert other.lookup(mine.key) == mine.manifest
        assert signature_files(other.layout, mine.key) == ()

    def test_a_vault_that_cannot_be_written(self, bundle: Path, other: Vault) -> None:
        with pytest.raises(VaultNotWritableError):
            import_bundle(Vault(other.root, writable=False), bundle)

    def test_a_vault_that_others_may_write(self, bundle: Path, other: Vault) -> None:
        other.root.chmod(0o777)
        with pytest.raises(UnsafeVaultError):
            import_bundle(other, bundle)
        assert files_of(other) == []


class TestSpace:
    def test_too_little_is_said_before_anything_is_written(
        self, bundle: Path, other: Vault, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**6, 10**6, 100))
        with pytest.raises(VaultFullError, match="100 left"):
            import_bundle(other, bundle)
        assert files_of(other) == []
        assert leftovers(other) == []

    def test_a_disk_that_fills_up_at_any_step(self, bundle: Path, pair: tuple[Entry, Entry], other: Vault) -> None:
        for step in range(1000):
            with strike_at(step, disk_full, GROWING_CALLS):
                try:
                    import_bundle(other, bundle)
                except VaultFullError:
                    pass
                else:
                    break
            assert verify(other).bad == ()
            assert leftovers(other) == []
            for entry in pair:
                signed = signature_files(other.layout, entry.key)
                assert not signed or other.lookup(entry.key) is not None
        assert step > 20
        assert all(whole(other, entry.manifest) for entry in pair)

    def test_a_kill_at_any_step(self, bundle: Path, pair: tuple[Entry, Entry], tmp_path: Path) -> None:
        steps = []
        for step in killed_at_each_step(lambda: import_bundle(Vault.open(tmp_path / "killed"), bundle)):
            steps.append(step)
            vault = Vault.open(tmp_path / "killed")
            assert verify(vault).bad == ()
            for entry in pair:
                assert vault.lookup(entry.key) in (None, entry.manifest)
        assert len(steps) > 20
        assert all(whole(vault, entry.manifest) for entry in pair)
        import_bundle(vault, bundle)
        assert check_signature(vault.layout, pair[0].manifest, policy="require", trusted=[OURS.public]) is None


def refused(vault: Vault, path: Path, match: str, error: type[BundleError] = BundleError) -> None:
    """The import fails with exactly this error, and leaves neither a trace in the vault nor a file beside it."""
    before = everything_below(vault.root.parent)
    with pytest.raises(BundleError, match=match) as caught:
        import_bundle(vault, path)
    assert type(caught.value) is error
    assert caught.value.path == path
    assert everything_below(vault.root.parent) == before


def refused_by_keys(path: Path, match: str) -> None:
    with pytest.raises(BundleError, match=match):
        bundle_keys(path)


class TestNoBundle:
    @pytest.mark.parametrize("data", [b"", b"PK", b"{}", b"\0" * 5000, b"PK\x03\x04" + b"\xff" * 100])
    def test_other_files(self, other: Vault, tmp_path: Path, data: bytes) -> None:
        (tmp_path / "x.zip").write_bytes(data)
        refused(other, tmp_path / "x.zip", "is not a bundle")

    def test_another_zip(self, other: Vault, tmp_path: Path) -> None:
        with zipfile.ZipFile(tmp_path / "x.zip", "w") as file:
            file.writestr("letter.txt", "hello")
        refused(other, tmp_path / "x.zip", "is not a bundle")

    def test_another_file_of_this_container(self, vault: Vault, bundle: Path, other: Vault) -> None:
        bundle.write_bytes(bundle_bytes(files_of(vault), marker_name="fault.json"))
        refused(other, bundle, "its first member is 'fault.json'")

    def test_a_bundle_of_the_older_form(self, vault: Vault, bundle: Path, other: Vault) -> None:
        bundle.write_bytes(bundle_bytes(files_of(vault), marker_name="pipevault_bundle.json"))
        refused(other, bundle, "older form.*export again")
        with pytest.raises(BundleError, match="older form"):
            bundle_keys(bundle)

    def test_a_missing_file(self, other: Vault, tmp_path: Path) -> None:
        refused(other, tmp_path / "none.zip", "does not exist", NoBundleError)

    def test_a_folder(self, other: Vault, tmp_path: Path) -> None:
        refused(other, tmp_path, "not a regular file")

    def test_a_named_pipe_is_not_waited_for(self, other: Vault, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "pipe")
        refused(other, tmp_path / "pipe", "not a regular file")


class TestNewer:
    def test_a_later_bundle_of_other_fields(self, other: Vault, tmp_path: Path) -> None:
        marker = canonical_json({"compression": "zstd", "pipevault_vault": 3})
        (tmp_path / "x.zip").write_bytes(bundle_bytes([("anything", b"")], marker=marker))
        refused(other, tmp_path / "x.zip", "version 3.*Upgrade", NewerBundleError)

    def test_a_manifest_of_a_later_format(self, vault: Vault, bundle: Path, other: Vault) -> None:
        files = [
            (name, data.replace(b'"manifest_version":2', b'"manifest_version":3')) for name, data in files_of(vault)
        ]
        bundle.write_bytes(bundle_bytes(files))
        refused(other, bundle, "Upgrade", NewerBundleError)


class TestDamage:
    def test_every_flipped_byte_is_refused(self, bundle: Path, other: Vault) -> None:
        data = bundle.read_bytes()
        chance = random.Random(0)
        places = {*range(60), *range(len(data) - 300, len(data)), *(chance.randrange(len(data)) for _ in range(200))}
        for place in sorted(places):
            bundle.write_bytes(data[:place] + bytes([data[place] ^ 1 << chance.randrange(8)]) + data[place + 1 :])
            with pytest.raises(BundleError):
                import_bundle(other, bundle)
        assert files_of(other) == []

    @pytest.mark.parametrize("keep", [0, 10, 100, 500, 3000, -1, -22, -300])
    def test_cut_off(self, bundle: Path, other: Vault, keep: int) -> None:
        bundle.write_bytes(bundle.read_bytes()[:keep])
        refused(other, bundle, "cut off")

    @pytest.mark.parametrize("extra", [b"\0", b"PK\x05\x06" + b"\0" * 18])
    def test_something_after_the_end(self, bundle: Path, other: Vault, extra: bytes) -> None:
        bundle.write_bytes(bundle.read_bytes() + extra)
        refused(other, bundle, "its members make|not a bundle|damaged")

    def test_something_before_the_start(self, bundle: Path, other: Vault) -> None:
        bundle.write_bytes(b"#!/bin/sh\n" + bundle.read_bytes())
        refused(other, bundle, "damaged")

    def test_something_between(self, bundle: Path, other: Vault) -> None:
        """With offsets that are true again, so that a reader of the directory alone sees nothing of it."""
        with zipfile.ZipFile(bundle, "a") as file:
            file.fp.seek(file.start_dir)
            file.fp.write(b"between")
            file.start_dir += 7
            file._didModify = True  # type: ignore[attr-defined]
        assert zipfile.ZipFile(bundle).testzip() is None
        refused(other, bundle, "damaged")

    def test_two_bundles_in_one_file(self, bundle: Path, other: Vault) -> None:
        bundle.write_bytes(bundle.read_bytes() * 2)
        refused(other, bundle, "damaged")

    def test_a_zip_comment(self, bundle: Path, other: Vault) -> None:
        data = bundle.read_bytes()
        bundle.write_bytes(data[:-2] + b"\x02\x00hi")
        refused(other, bundle, "its members make")

    @pytest.mark.parametrize("place", [b"artifacts/", b"entries/", b"vault.json"])
    @pytest.mark.parametrize("directory", [False, True])
    def test_a_crc_that_does_not_fit(self, bundle: Path, other: Vault, place: bytes, directory: bool) -> None:
        data = bytearray(bundle.read_bytes())
        at = data.rindex(place) - 30 if directory else data.index(place) - 16
        data[at] ^= 1
        bundle.write_bytes(data)
        refused(other, bundle, "differs from what")

    def test_an_unreadable_disk(self, bundle: Path, other: Vault, monkeypatch: pytest.MonkeyPatch) -> None:
        left = [2]

        class Broken(io.FileIO):
            def readinto(self, buffer: Any) -> Any:
                left[0] -= 1
                if left[0] < 0:
                    raise OSError(5, "Input/output error")
                return super().readinto(buffer)

        monkeypatch.setattr(zip_file.io, "FileIO", Broken)  # type: ignore[attr-defined]
        refused(other, bundle, "Input/output error")
        assert left[0] < 0


EVIL_NAMES = (
    *("../evil", "/etc/evil", "entries/../../evil", "entries", "vault.json", "tmp/evil", "pins/evil.json", ""),
    *("entries/aa/evil.json", "artifacts//aa", "./artifacts", "artifacts\\..\\evil", "C:evil", "entries/aa\x00.json"),
    *("quarantine/20250101T000000Z-00000000-x", "locks/" + "0" * 64 + ".lock", "artifacts/ab/" + "0" * 64),
    *("artifacts/00/" + "0" * 64 + "/", "signatures/00/" + "0" * 64 + ".json", "entries/é.json"),
)


class TestUnsafe:
    @pytest.mark.parametrize("name", EVIL_NAMES)
    def test_a_name_that_is_no_place_in_a_vault(self, vault: Vault, bundle: Path, other: Vault, name: str) -> None:
        bundle.write_bytes(bundle_bytes(sorted([*files_of(vault), (name, b"evil")])))
        refused(other, bundle, "not a place in a vault|have digest")

    def test_a_long_name(self, vault: Vault, bundle: Path, other: Vault) -> None:
        bundle.write_bytes(bundle_bytes([("a" * 5000, b""), *files_of(vault)]))
        refused(other, bundle, "not a place in a vault")

    def test_one_name_twice(self, vault: Vault, bundle: Path, other: Vault) -> None:
        files = files_of(vault)
        bundle.write_bytes(bundle_bytes([files[0], *files]))
        refused(other, bundle, "two share a name")

    def test_the_marker_twice(self, vault: Vault, bundle: Path, other: Vault) -> None:
        bundle.write_bytes(bundle_bytes([*files_of(vault), ("vault.json", MARKER)]))
        refused(other, bundle, "not a place in a vault")

    def test_one_name_twice_in_the_container_alone(self, vault: Vault, bundle: Path, other: Vault) -> None:
        """The directory knows nothing of the first."""
        whole_data, files = bundle.read_bytes(), files_of(vault)
        twice = bundle_bytes([files[0], *files])
        end = len(bundle_bytes(files)) - whole_data.index(b"PK\x01\x02")
        bundle.write_bytes(twice[: twice.index(b"PK\x01\x02")] + whole_data[-end:])
        refused(other, bundle, "damaged|not a bundle")

    def test_unsorted(self, vault: Vault, bundle: Path, other: Vault) -> None:
        bundle.write_bytes(bundle_bytes(files_of(vault)[::-1]))
        refused(other, bundle, "not sorted")

    def test_another_order_than_the_directory_says(self, vault: Vault, bundle: Path, other: Vault) -> None:
        data, turned = bundle.read_bytes(), bundle_bytes(files_of(vault)[::-1])
        start = data.index(b"PK\x01\x02")
        bundle.write_bytes(turned[:start] + data[start:])
        refused(other, bundle, "damaged")

    @pytest.mark.parametrize("name", ["../" + "a" * 73, "artifacts/00/" + "0" * 64])
    def test_another_name_at_the_member_than_in_the_directory(
        self, vault: Vault, bundle: Path, other: Vault, name: str
    ) -> None:
        files = files_of(vault)
        assert len(name) in (76, len(files[0][0]))
        data = bytearray(bundle.read_bytes())
        place = data.index(files[0][0].encode())
        data[place : place + len(name)] = name.encode()
        bundle.write_bytes(data)
        refused(other, bundle, "differs from what")

    @pytest.mark.parametrize("mode", [stat.S_IFLNK | 0o777, stat.S_IFCHR | 0o666, stat.S_IFIFO | 0o666, 0o104755])
    def test_a_link_a_device_a_pipe_or_setuid(self, bundle: Path, other: Vault, mode: int) -> None:
        data = bundle.read_bytes()
        attributes = (0o100644 << 16).to_bytes(4, "little")
        assert attributes in data
        bundle.write_bytes(data.replace(attributes, (mode << 16).to_bytes(4, "little"), 1))
        refused(other, bundle, "differs from what")

    @pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_STORED])
    def test_a_bomb_and_what_another_program_packed(
        self, vault: Vault, bundle: Path, other: Vault, method: int
    ) -> None:
        with zipfile.ZipFile(bundle, "w", method) as file:
            file.writestr(zipfile.ZipInfo("vault.json"), MARKER)
            for name, data in files_of(vault):
                file.writestr(name, data)
        refused(other, bundle, "damaged")

    def test_an_encrypted_member(self, bundle: Path, other: Vault) -> None:
        data = bytearray(bundle.read_bytes())
        for magic, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
            data[data.index(magic) + offset] |= 1
        bundle.write_bytes(data)
        refused(other, bundle, "differs from what")

    def test_members_that_overlap(self, vault: Vault, bundle: Path, other: Vault) -> None:
        data = bytearray(bundle.read_bytes())
        second = data.index(b"PK\x01\x02", data.index(b"PK\x01\x02") + 4)
        data[second + 42 : second + 46] = bytes(4)
        bundle.write_bytes(data)
        refused(other, bundle, "differs from what|not a bundle")

    @pytest.mark.parametrize("size_bytes", [0, 1, 2**31, 2**32 - 2, 2**32 - 1])
    @pytest.mark.parametrize("field", [20, 24])
    def test_a_size_that_lies(self, vault: Vault, bundle: Path, other: Vault, size_bytes: int, field: int) -> None:
        data = bytearray(bundle.read_bytes())
        record = data.index(b"PK\x01\x02", data.index(b"PK\x01\x02") + 4)
        data[record + field : record + field + 4] = size_bytes.to_bytes(4, "little")
        bundle.write_bytes(data)
        refused(other, bundle, "damaged|not a bundle")

    def test_a_directory_too_large_to_read(self, bundle: Path, other: Vault) -> None:
        data = bundle.read_bytes()
        with bundle.open("r+b") as file:
            file.truncate(2**32)  # nothing is allocated
            end = data.index(b"PK\x05\x06")
            file.seek(2**32 - 22)
            file.write(
                data[end : end + 12] + (2**31).to_bytes(4, "little") + (2**31 - 22).to_bytes(4, "little") + bytes(2)
            )
        refused_by_keys(bundle, "the limit is")

    @pytest.mark.parametrize("place", ["entries", "signatures"])
    def test_a_document_too_large_to_read(
        self, vault: Vault, bundle: Path, other: Vault, place: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(zip_file, "MANIFEST_LIMIT_BYTES", 5000)
        files = [(name, data + b" " * 5000 if name.startswith(place) else data) for name, data in files_of(vault)]
        bundle.write_bytes(bundle_bytes(files))
        refused(other, bundle, "the limit is")

    def test_too_many_members(self, bundle: Path, other: Vault, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(zip_file, "MEMBER_LIMIT", 5)
        refused(other, bundle, "6 members; the limit is 5")


class TestMarker:
    @pytest.mark.parametrize(
        "marker",
        [
            *(b"", b"[]", b"\xff", b"[" * 100_000, b"{}", MARKER + b"\n", b'{"pipevault_vault":true}'),
            *(b'{"pipevault_vault":1}', b'{"pipevault_vault":"2"}', b'{"more":1,"pipevault_vault":2}'),
        ],
    )
    def test_another_content(self, vault: Vault, bundle: Path, other: Vault, marker: bytes) -> None:
        bundle.write_bytes(bundle_bytes(files_of(vault), marker=marker))
        refused(other, bundle, "its vault.json is not")

    def test_no_entry(self, bundle: Path, other: Vault) -> None:
        bundle.write_bytes(bundle_bytes([]))
        refused(other, bundle, "no entry")


class TestWholeAndNoMore:
    def test_an_artifact_is_missing(self, vault: Vault, bundle: Path, other: Vault) -> None:
        bundle.write_bytes(bundle_bytes(files_of(vault)[1:]))
        refused(other, bundle, "it lacks artifact")

    def test_an_artifact_that_no_entry_names(self, vault: Vault, bundle: Path, other: Vault) -> None:
        digest = digest_bytes(b"extra")
        extra = (vault.layout.artifact_file(digest).relative_to(vault.root).as_posix(), b"extra")
        bundle.write_bytes(bundle_bytes(sorted([*files_of(vault), extra])))
        refused(other, bundle, "none of its entries names")

    def test_a_signature_of_no_entry(self, vault: Vault, bundle: Path, other: Vault) -> None:
        path = vault.layout.signature_file(digest_bytes(b"nobody"), "0123456789abcdef")
        extra = (path.relative_to(vault.root).as_posix(), b"{}")
        bundle.write_bytes(bundle_bytes(sorted([*files_of(vault), extra])))
        refused(other, bundle, "signs no entry")

    def test_a_manifest_at_the_place_of_another(
        self, vault: Vault, pair: tuple[Entry, Entry], bundle: Path, other: Vault
    ) -> None:
        names = {vault.layout.manifest_file(entry.key).relative_to(vault.root).as_posix() for entry in pair}
        first, second = sorted(names)
        swap = {first: second, second: first}
        files = sorted((swap.get(name, name), data) for name, data in files_of(vault))
        bundle.write_bytes(bundle_bytes(files))
        refused(other, bundle, "belongs to key")

    def test_a_manifest_that_was_edited(self, vault: Vault, bundle: Path, other: Vault) -> None:
        files = [(name, data.replace(b'"graphs":2', b'"graphs":3')) for name, data in files_of(vault)]
        bundle.write_bytes(bundle_bytes(files))
        refused(other, bundle, "self_digest")

    def test_an_artifact_of_another_size_than_the_manifest_says(
        self, vault: Vault, pair: tuple[Entry, Entry], bundle: Path, other: Vault
    ) -> None:
        ref = pair[0].manifest.artifacts[0]
        lying = Manifest(make_key("a"), {}, (ArtifactRef(ref.digest, ref.size_bytes + 1, ref.name),), {}, CREATED_AT)
        name = vault.layout.manifest_file(lying.key.digest).relative_to(vault.root).as_posix()
        artifact = vault.layout.artifact_file(ref.digest).relative_to(vault.root).as_posix()
        bundle.write_bytes(bundle_bytes(sorted([(name, lying.to_bytes()), (artifact, SHARED)])))
        refused(other, bundle, "another size")

    def test_the_artifact_is_not_what_its_name_says(self, vault: Vault, bundle: Path, other: Vault) -> None:
        (name, data), *rest = files_of(vault)
        bundle.write_bytes(bundle_bytes([(name, b"X" * len(data)), *rest]))
        refused(other, bundle, "have digest")


def test_keys_need_the_directory_alone(bundle: Path, pair: tuple[Entry, Entry]) -> None:
    data = bytearray(bundle.read_bytes())
    data[300] ^= 1
    bundle.write_bytes(data)
    assert bundle_keys(bundle) == tuple(sorted(entry.key for entry in pair))
