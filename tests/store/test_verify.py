"""``verify`` finds every planted damage, moves what is bad and nothing else, and what it moved heals."""

from __future__ import annotations

import os
import shutil
import socket
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from helpers.bundles import everything_below
from helpers.store_entries import CREATED_AT, Entry, make_entry, make_key, whole
from pipevault.digest import canonical_json, digest_bytes
from pipevault.errors import CorruptEntryError, DamagedVaultError, NewerVaultError, VaultNotWritableError
from pipevault.settings.ownership import Trust
from pipevault.store import check
from pipevault.store.check import Finding, VerifyReport, verify
from pipevault.store.manifest import ArtifactRef, Manifest
from pipevault.store.trust.signing_keys import PrivateKey
from pipevault.store.vault import Vault

OURS = PrivateKey(Ed25519PrivateKey.from_private_bytes(bytes(range(32))))
SHARED, OWN = b"shared" * 500, b"own" * 50


@pytest.fixture
def pair(vault: Vault, tmp_path: Path) -> tuple[Entry, Entry]:
    """Two published entries that share an artifact; the first has one of its own and is signed."""
    first = make_entry(tmp_path / "source", "a", {"unet/0.pt2": SHARED, "vae/0.pt2": OWN})
    second = make_entry(tmp_path / "source", "b", {"unet/0.pt2": SHARED})
    for entry in (first, second):
        vault.publish(entry.manifest, entry.files)
    vault.sign(first.manifest, OURS)
    return first, second


def only_bad(report: VerifyReport) -> Finding:
    [finding] = report.bad
    return finding


def overwrite(path: Path, data: bytes) -> None:
    path.chmod(0o644)
    path.write_bytes(data)


def artifact(vault: Vault, data: bytes) -> Path:
    return vault.layout.artifact_file(digest_bytes(data))


def test_a_sound_vault(vault: Vault, pair: tuple[Entry, Entry]) -> None:
    before = everything_below(vault.root)
    report = verify(vault, fix=True, trusted=[OURS.public])
    assert report == VerifyReport(2, 2, len(SHARED) + len(OWN), ())
    assert report.sound
    assert everything_below(vault.root) == before


def test_an_empty_vault(vault: Vault) -> None:
    assert verify(vault) == VerifyReport(0, 0, 0, ())


def test_a_shared_artifact_is_read_once(
    vault: Vault, pair: tuple[Entry, Entry], monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[Path] = []
    real = os.open

    def counting(path: Path, *args: int, **options: int) -> int:
        opened.append(Path(path))
        return real(path, *args, **options)

    monkeypatch.setattr(os, "open", counting)
    verify(vault)
    read = [path for path in opened if path.is_relative_to(vault.layout.artifacts_dir)]
    assert sorted(read) == sorted([artifact(vault, SHARED), artifact(vault, OWN)])


def test_progress_counts_bytes_to_the_end(vault: Vault, pair: tuple[Entry, Entry]) -> None:
    seen: list[tuple[int, int]] = []
    verify(vault, progress=lambda done, total: seen.append((done, total)))
    total_bytes = len(SHARED) + len(OWN)
    assert seen[0] == (0, total_bytes)
    assert seen[-1] == (total_bytes, total_bytes)


ARTIFACT_DAMAGES: dict[str, Callable[[Path], object]] = {
    "flipped": lambda path: overwrite(path, b"X" + path.read_bytes()[1:]),
    "truncated": lambda path: overwrite(path, path.read_bytes()[:-1]),
    "emptied": lambda path: overwrite(path, b""),
    "longer": lambda path: overwrite(path, path.read_bytes() + b"!"),
    "missing": lambda path: path.unlink(),
    "swapped": lambda path: overwrite(path, OWN + b"\0" * (path.stat().st_size - len(OWN))),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
    "a named pipe": lambda path: (path.unlink(), os.mkfifo(path)),
    "a link to nowhere": lambda path: (path.unlink(), path.symlink_to("nowhere")),
}


@pytest.mark.parametrize("damage", ARTIFACT_DAMAGES)
def test_a_bad_artifact_is_found_moved_and_heals(vault: Vault, pair: tuple[Entry, Entry], damage: str) -> None:
    path = artifact(vault, SHARED)
    ARTIFACT_DAMAGES[damage](path)
    before = everything_below(vault.root)
    finding = only_bad(verify(vault))
    assert (finding.kind, finding.path) == ("artifact", path)
    assert finding.keys == tuple(sorted(entry.key for entry in pair))
    assert everything_below(vault.root) == before, "without fix nothing changes"

    was_there = os.path.lexists(path)
    report = verify(vault, fix=True)
    assert report.sound
    finding = only_bad(report)
    assert finding.mended
    moved = [moved.name.split("-", 2)[2] for moved in finding.quarantined]
    assert moved == [f"{key}.json" for key in finding.keys] + [path.name] * was_there
    for quarantined in finding.quarantined:
        reason, place = vault.layout.reason_file(quarantined).read_text().splitlines()
        assert path.name in reason
        assert not (vault.root / place).exists()
    assert verify(vault).bad == ()
    assert artifact(vault, OWN).exists(), "an artifact that is good stays for the next freeze"
    for entry in pair:
        assert vault.lookup(entry.key) is None
        vault.publish(entry.manifest, entry.files)
        assert whole(vault, entry.manifest)
    assert verify(vault).findings == ()


MANIFEST_DAMAGES: dict[str, Callable[[Path], object]] = {
    "no JSON": lambda path: overwrite(path, b"{"),
    "empty": lambda path: overwrite(path, b""),
    "truncated": lambda path: overwrite(path, path.read_bytes()[:-10]),
    "edited": lambda path: overwrite(path, path.read_bytes().replace(b'"graphs":', b'"grafs":')),
    "wider": lambda path: overwrite(path, path.read_bytes() + b"\n"),
    "deeply nested": lambda path: overwrite(path, b"[" * 100_000),
    "of another key": lambda path: overwrite(path, _other_manifest()),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
}


def _other_manifest() -> bytes:
    return Manifest(make_key("other"), {}, (), {}, CREATED_AT).to_bytes()


@pytest.mark.parametrize("damage", MANIFEST_DAMAGES)
def test_a_bad_manifest_is_found_moved_and_heals(vault: Vault, pair: tuple[Entry, Entry], damage: str) -> None:
    path = vault.layout.manifest_file(pair[0].key)
    MANIFEST_DAMAGES[damage](path)
    finding = only_bad(verify(vault))
    assert (finding.kind, finding.path, finding.keys) == ("manifest", path, (pair[0].key,))
    report = verify(vault, fix=True)
    assert report.sound
    assert report.entries == 2
    [moved] = only_bad(report).quarantined
    assert moved.name.endswith(path.name)
    assert whole(vault, pair[1].manifest)
    vault.publish(pair[0].manifest, pair[0].files)
    assert verify(vault).findings == ()


@pytest.mark.parametrize("mode", [0o666, 0o464])
@pytest.mark.parametrize("kind", ["artifact", "manifest"])
def test_what_others_may_write_is_told_of_and_left(
    vault: Vault, pair: tuple[Entry, Entry], kind: str, mode: int
) -> None:
    """Its bytes are whole, and whom this user trusts is a matter of settings."""
    path = artifact(vault, SHARED) if kind == "artifact" else vault.layout.manifest_file(pair[0].key)
    path.chmod(mode)
    before = everything_below(vault.root)
    finding = only_bad(verify(vault, fix=True))
    assert (finding.kind, finding.path, finding.movable, finding.mended) == (kind, path, False, False)
    assert everything_below(vault.root) == before
    assert verify(replace(vault, trust=Trust(allow_group_write=True))).sound == (mode == 0o464)


def test_a_manifest_that_lies_about_a_size(vault: Vault, pair: tuple[Entry, Entry]) -> None:
    wrong = ArtifactRef(digest_bytes(SHARED), len(SHARED) + 1, "unet/0.pt2")
    lying = Manifest(make_key("c"), {}, (wrong,), {}, CREATED_AT)
    path = vault.layout.manifest_file(lying.key.digest)
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(lying.to_bytes())
    finding = only_bad(verify(vault, fix=True))
    assert (finding.kind, finding.path, finding.mended) == ("manifest", path, True)
    assert all(whole(vault, entry.manifest) for entry in pair)
    assert verify(vault).findings == ()


def test_two_bad_artifacts_of_one_entry(vault: Vault, pair: tuple[Entry, Entry]) -> None:
    for data in (SHARED, OWN):
        overwrite(artifact(vault, data), b"bad")
    report = verify(vault, fix=True)
    assert [finding.kind for finding in report.bad] == ["artifact", "artifact"]
    assert report.sound
    assert report.broken_keys == tuple(sorted(entry.key for entry in pair))
    assert verify(vault).bad == ()


def test_everything_at_once(vault: Vault, pair: tuple[Entry, Entry]) -> None:
    overwrite(vault.layout.manifest_file(pair[1].key), b"{}")
    overwrite(artifact(vault, SHARED), b"bad")
    assert {finding.kind for finding in verify(vault).bad} == {"manifest", "artifact"}
    assert verify(vault, fix=True).sound
    assert verify(vault).bad == ()


def test_a_bad_artifact_that_no_entry_names(vault: Vault, pair: tuple[Entry, Entry]) -> None:
    path = artifact(vault, b"never published")
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"bad")
    report = verify(vault, fix=True)
    finding = only_bad(report)
    assert (finding.kind, finding.keys, finding.mended) == ("artifact", (), True)
    assert report.notable == (), "it is told once"
    assert not path.exists()
    assert all(whole(vault, entry.manifest) for entry in pair)


def test_a_named_pipe_that_no_entry_names_is_not_waited_for(vault: Vault) -> None:
    path = artifact(vault, b"never published")
    path.parent.mkdir(parents=True)
    os.mkfifo(path)
    finding = only_bad(verify(vault, fix=True))
    assert (finding.kind, finding.mended) == ("artifact", True)
    assert "not a regular file" in finding.reason


@pytest.mark.parametrize("folder", ["", "entries", "artifacts"])
def test_a_folder_that_others_may_write_is_told_once_and_moves_nothing(
    vault: Vault, pair: tuple[Entry, Entry], folder: str
) -> None:
    (vault.root / folder).chmod(0o777)
    report = verify(vault, fix=True)
    finding = only_bad(report)
    assert (finding.kind, finding.path, finding.mended) == ("folder", vault.root / folder, False)
    assert "chmod" in finding.reason
    assert finding.keys == tuple(sorted(entry.key for entry in pair))
    assert not report.sound
    assert not vault.layout.quarantine_dir.exists()
    (vault.root / folder).chmod(0o755)
    assert verify(vault).findings == ()


def test_group_write_may_be_allowed(vault: Vault, pair: tuple[Entry, Entry]) -> None:
    artifact(vault, SHARED).chmod(0o464)
    assert verify(Vault(vault.root, True, Trust(allow_group_write=True))).bad == ()


def test_a_marker_that_others_may_write(vault: Vault, pair: tuple[Entry, Entry]) -> None:
    vault.layout.vault_file.chmod(0o666)
    finding = only_bad(verify(vault, fix=True))
    assert (finding.path, finding.mended) == (vault.layout.vault_file, False)
    assert vault.layout.vault_file.exists()


def test_a_marker_that_is_none(vault: Vault) -> None:
    vault.layout.vault_file.write_text("{}")
    with pytest.raises(DamagedVaultError):
        verify(vault)


def test_a_newer_vault(vault: Vault) -> None:
    vault.layout.vault_file.write_text('{"pipevault_vault":3}')
    with pytest.raises(NewerVaultError):
        verify(vault)


def test_a_manifest_of_a_later_format_is_told_and_left(vault: Vault, pair: tuple[Entry, Entry]) -> None:
    path = vault.layout.manifest_file(pair[0].key)
    path.write_bytes(path.read_bytes().replace(b'"manifest_version":2', b'"manifest_version":3'))
    report = verify(vault, fix=True)
    finding = only_bad(report)
    assert (finding.kind, finding.path, finding.mended) == ("newer", path, False)
    assert "Upgrade" in finding.reason
    assert path.exists()


def test_fix_in_a_vault_that_cannot_be_written(vault: Vault) -> None:
    with pytest.raises(VaultNotWritableError, match="--fix"):
        verify(Vault(vault.root, writable=False), fix=True)
    assert verify(Vault(vault.root, writable=False)).sound


def test_what_cannot_be_moved_is_not_mended(
    vault: Vault, pair: tuple[Entry, Entry], monkeypatch: pytest.MonkeyPatch
) -> None:
    overwrite(artifact(vault, OWN), b"bad")
    monkeypatch.setattr(Vault, "quarantine", lambda vault, path, reason: None)
    report = verify(vault, fix=True)
    assert not report.sound
    assert (only_bad(report).mended, only_bad(report).quarantined) == (False, ())


def test_what_was_healed_meanwhile_is_not_moved(
    vault: Vault, pair: tuple[Entry, Entry], monkeypatch: pytest.MonkeyPatch
) -> None:
    overwrite(artifact(vault, OWN), b"bad")
    overwrite(vault.layout.manifest_file(pair[1].key), b"bad")

    def heal(layout: object) -> object:
        for entry in pair:
            vault.publish(entry.manifest, entry.files)
        return iter(())

    monkeypatch.setattr(check, "iter_foreign", heal)  # the last look before the first move
    report = verify(vault, fix=True)
    assert len(report.bad) == 2
    assert report.sound
    assert [finding.quarantined for finding in report.bad] == [(), ()]
    assert all(whole(vault, entry.manifest) for entry in pair)


def test_an_entry_that_is_removed_meanwhile_is_no_finding(
    vault: Vault, pair: tuple[Entry, Entry], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = check.artifact_findings

    def late(*arguments: object) -> object:
        present = [entry.key for entry in pair if vault.layout.manifest_file(entry.key).exists()]
        vault.remove(vault.plan_removal(present))
        return real(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(check, "artifact_findings", late)
    report = verify(vault, fix=True)
    assert report.bad == ()


def make_folder(path: Path) -> None:
    path.mkdir()


def make_socket(path: Path) -> None:
    before = Path.cwd()
    os.chdir(path.parent)  # the path of a socket is short
    try:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(path.name)
    finally:
        os.chdir(before)


@pytest.mark.parametrize("make", [os.mkfifo, make_socket, make_folder])
@pytest.mark.parametrize("place", ["manifest", "artifact", "signature", "pin"])
@pytest.mark.parametrize("policy", ["off", "require"])
def test_no_file_in_the_place_of_one_is_a_finding_and_not_waited_for(
    vault: Vault, pair: tuple[Entry, Entry], make: Callable[[Path], None], place: str, policy: str
) -> None:
    vault.pin(pair[0].key, "prod")
    vault.sign(pair[1].manifest, OURS)
    path = {
        "manifest": vault.layout.manifest_file(pair[0].key),
        "artifact": artifact(vault, OWN),
        "signature": vault.layout.signature_file(pair[0].key, OURS.public.id),
        "pin": vault.layout.pin_file("prod"),
    }[place]
    path.unlink()
    make(path)
    bad = verify(vault, trusted=[OURS.public], policy=policy).bad
    assert [finding.kind for finding in bad if finding.path == path] == [place]


def test_fifos_beside_the_entries_are_not_waited_for(vault: Vault, pair: tuple[Entry, Entry]) -> None:
    layout, key = vault.layout, pair[0].key
    places = [
        *(layout.lock_file(key), layout.holder_file(key), layout.guard_file(key), layout.use_file(key)),
        layout.lease_file(key, host="h", pid=1, random_hex="0" * 16),
        layout.events_dir / ("h.1." + "0" * 24 + "." + "0" * 16 + ".jsonl"),
        layout.quarantine_file(time="20260101T000000Z", random_hex="0" * 8, name="x"),
        layout.tmp_dir / "any",
    ]
    for place in places:
        place.parent.mkdir(parents=True, exist_ok=True)
        os.mkfifo(place)
    assert verify(vault, fix=True).bad == ()


@pytest.mark.parametrize("size_bytes", [len(OWN) - 1, len(OWN) + 1])
def test_one_manifest_alone_that_lies_about_a_size(vault: Vault, pair: tuple[Entry, Entry], size_bytes: int) -> None:
    lying = Manifest(make_key("a"), {}, (ArtifactRef(digest_bytes(OWN), size_bytes, "x"),), {}, CREATED_AT)
    vault.layout.manifest_file(pair[0].key).write_bytes(lying.to_bytes())
    report = verify(vault, fix=True)
    assert report.sound
    assert report.broken_keys == (pair[0].key,)
    assert vault.lookup(pair[0].key) is None


class TestSignatures:
    def test_one_over_another_manifest(self, vault: Vault, pair: tuple[Entry, Entry], tmp_path: Path) -> None:
        again = Manifest(pair[0].manifest.key, {}, pair[0].manifest.artifacts, {}, "2026-01-01T00:00:00+00:00")
        vault.layout.manifest_file(pair[0].key).write_bytes(again.to_bytes())
        finding = only_bad(verify(vault, fix=True))
        assert (finding.kind, finding.mended) == ("signature", True)
        assert "over another manifest" in finding.reason
        assert not finding.path.exists()
        assert whole(vault, again)

    @pytest.mark.parametrize("data", [b"", b"{}", b"\xff", b'{"signature_version":"x"}'])
    def test_a_damaged_one(self, vault: Vault, pair: tuple[Entry, Entry], data: bytes) -> None:
        path = vault.layout.signature_file(pair[0].key, OURS.public.id)
        path.write_bytes(data)
        finding = only_bad(verify(vault, fix=True))
        assert (finding.kind, finding.path, finding.mended) == ("signature", path, True)
        assert verify(vault).findings == ()

    def test_a_forged_one_is_bad_where_its_key_is_trusted(self, vault: Vault, pair: tuple[Entry, Entry]) -> None:
        path = vault.layout.signature_file(pair[0].key, OURS.public.id)
        data = path.read_bytes()
        start = data.index(b'"signature":"') + len(b'"signature":"')
        path.write_bytes(data[:start] + (b"A" if data[start : start + 1] != b"A" else b"B") + data[start + 1 :])
        assert verify(vault).bad == ()
        assert only_bad(verify(vault, trusted=[OURS.public])).kind == "signature"

    def test_one_of_a_later_format_is_left(self, vault: Vault, pair: tuple[Entry, Entry]) -> None:
        path = vault.layout.signature_file(pair[0].key, OURS.public.id)
        path.write_bytes(path.read_bytes().replace(b'"signature_version":1', b'"signature_version":2'))
        finding = only_bad(verify(vault, fix=True))
        assert (finding.kind, finding.mended, path.exists()) == ("newer", False, True)

    def test_one_whose_entry_is_gone(self, vault: Vault, pair: tuple[Entry, Entry]) -> None:
        vault.layout.manifest_file(pair[0].key).unlink()
        report = verify(vault, fix=True)
        assert report.bad == ()
        assert [finding.kind for finding in report.notable] == ["orphan", "signature"]


class TestPins:
    def test_a_good_one(self, vault: Vault, pair: tuple[Entry, Entry]) -> None:
        vault.pin(pair[0].key, "prod")
        assert verify(vault).findings == ()

    def test_one_whose_entry_is_gone(self, vault: Vault, pair: tuple[Entry, Entry]) -> None:
        vault.pin(pair[1].key, "prod")
        vault.layout.manifest_file(pair[1].key).unlink()
        [finding] = verify(vault, fix=True).notable
        assert (finding.kind, finding.path) == ("pin", vault.layout.pin_file("prod"))
        assert finding.path.exists()

    def test_one_that_cannot_be_read_is_bad_and_left_to_people(self, vault: Vault, pair: tuple[Entry, Entry]) -> None:
        vault.pin(pair[0].key, "prod")
        path = vault.layout.pin_file("prod")
        path.write_bytes(canonical_json({"key": "?"}))
        report = verify(vault, fix=True)
        assert (only_bad(report).kind, only_bad(report).mended, report.sound) == ("pin", False, False)
        assert path.exists()


class TestNotable:
    """None of it is bad, and fix leaves it alone."""

    def expect(self, vault: Vault, kind: str, path: Path) -> Finding:
        report = verify(vault, fix=True)
        assert (report.bad, report.sound) == ((), True)
        [finding] = report.notable
        assert (finding.kind, finding.path) == (kind, path)
        assert os.path.lexists(path)
        return finding

    def test_an_artifact_that_no_entry_names(self, vault: Vault, pair: tuple[Entry, Entry]) -> None:
        vault.layout.manifest_file(pair[0].key).unlink()
        vault.layout.signature_file(pair[0].key, OURS.public.id).unlink()
        assert "about to be published" in self.expect(vault, "orphan", artifact(vault, OWN)).reason
        os.utime(artifact(vault, OWN), (time.time() - 7200,) * 2)
        assert "pipevault prune" in self.expect(vault, "orphan", artifact(vault, OWN)).reason

    @pytest.mark.parametrize("place", ["notes.txt", "entries/notes.txt", "artifacts/ab/notes.txt", "pins/.x.swp"])
    def test_a_foreign_file(self, vault: Vault, place: str) -> None:
        path = vault.root / place
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("mine")
        self.expect(vault, "foreign", path)

    def test_a_staging_folder_of_a_dead_process(self, vault: Vault) -> None:
        dead = vault.layout.staging_dir(host="container", pid=1, random_hex="0" * 16)
        dead.mkdir(parents=True)
        with vault.staging():
            self.expect(vault, "staging", dead)


class TestLoads:
    """What a load does that meets damage: the store's part of a reported miss, and of the heal."""

    @pytest.mark.parametrize("damage", ["flipped", "truncated", "emptied", "missing", "swapped"])
    def test_a_bad_artifact(self, vault: Vault, pair: tuple[Entry, Entry], damage: str) -> None:
        path = artifact(vault, SHARED)
        ARTIFACT_DAMAGES[damage](path)
        manifest = vault.lookup(pair[0].key)
        assert manifest is not None
        with pytest.raises(CorruptEntryError) as caught:
            vault.verified_path(manifest.artifacts[0])
        assert caught.value.path == path
        vault.quarantine(caught.value.path, str(caught.value))
        with pytest.raises(CorruptEntryError, match="missing"):  # mode require goes on refusing it
            vault.verified_path(manifest.artifacts[0])
        vault.publish(pair[0].manifest, pair[0].files)
        assert whole(vault, pair[0].manifest)

    @pytest.mark.parametrize("damage", ["no JSON", "empty", "truncated", "edited", "of another key"])
    def test_a_bad_manifest(self, vault: Vault, pair: tuple[Entry, Entry], damage: str) -> None:
        path = vault.layout.manifest_file(pair[0].key)
        MANIFEST_DAMAGES[damage](path)
        with pytest.raises(CorruptEntryError) as caught:
            vault.lookup(pair[0].key)
        assert caught.value.path == path
        vault.quarantine(path, str(caught.value))
        assert vault.lookup(pair[0].key) is None
        vault.publish(pair[0].manifest, pair[0].files)
        assert whole(vault, pair[0].manifest)


def test_a_copy_of_a_vault_is_as_sound(vault: Vault, pair: tuple[Entry, Entry], tmp_path: Path) -> None:
    shutil.copytree(vault.root, tmp_path / "copy")
    assert verify(Vault.open(tmp_path / "copy", create=False)).findings == ()
