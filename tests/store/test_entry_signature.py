"""Signatures over entries: what counts, what does not, and what is said of it."""

from __future__ import annotations

import base64
import dataclasses
import json
import os
import shutil
import stat
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from helpers.store_entries import Entry, make_entry
from pipevault.digest import Digest, canonical_json
from pipevault.errors import CorruptEntryError, SignatureError, UnsafeVaultError, VaultNotWritableError
from pipevault.store import publish
from pipevault.store.manifest import Manifest
from pipevault.store.places import iter_foreign, signature_files
from pipevault.store.trust.signature import (
    check_signature,
    copy_signatures,
    sign_entry,
    signature_states,
    signed_message,
)
from pipevault.store.trust.signing_keys import PrivateKey, PublicKey
from pipevault.store.vault import Vault

OURS = PrivateKey(Ed25519PrivateKey.from_private_bytes(bytes(range(32))))
THEIRS = PrivateKey(Ed25519PrivateKey.from_private_bytes(bytes(range(1, 33))))


@pytest.fixture
def published(vault: Vault, entry: Entry) -> Manifest:
    vault.publish(entry.manifest, entry.files)
    return entry.manifest


@pytest.fixture
def signed(vault: Vault, published: Manifest) -> Path:
    """The signature file of an entry that was signed with our key."""
    assert vault.sign(published, OURS)
    return vault.layout.signature_file(published.key.digest, OURS.public.id)


def asked(vault: Vault, manifest: Manifest, *trusted: PublicKey) -> str:
    """The message of an error under ``require``, which is also the warning under ``warn``; empty if all is well."""
    warning = check_signature(vault.layout, manifest, policy="warn", trusted=trusted)
    if warning is None:
        assert check_signature(vault.layout, manifest, policy="require", trusted=trusted) is None
        return ""
    with pytest.raises(SignatureError) as caught:
        check_signature(vault.layout, manifest, policy="require", trusted=trusted)
    assert str(caught.value) == f"{warning} Nothing of it was loaded."
    assert caught.value.path == vault.layout.manifest_file(manifest.key.digest)
    return warning


def edited(path: Path, **changes: Any) -> None:
    path.write_bytes(canonical_json({**json.loads(path.read_bytes()), **changes}))


class TestGood:
    def test_a_trusted_signature(self, vault: Vault, published: Manifest, signed: Path) -> None:
        assert asked(vault, published, OURS.public) == ""

    def test_one_of_several_trusted_keys_is_enough(self, vault: Vault, published: Manifest, signed: Path) -> None:
        assert asked(vault, published, THEIRS.public, OURS.public) == ""

    def test_a_bad_signature_beside_a_good_one_does_no_harm(
        self, vault: Vault, published: Manifest, signed: Path
    ) -> None:
        vault.layout.signature_file(published.key.digest, THEIRS.public.id).write_text("garbage")
        assert asked(vault, published, THEIRS.public, OURS.public) == ""

    def test_the_policy_off_reads_nothing(
        self, vault: Vault, published: Manifest, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(os, "open", None)
        monkeypatch.setattr(os, "listdir", None)
        assert check_signature(vault.layout, published, policy="off", trusted=[]) is None

    def test_no_artifact_is_touched(self, vault: Vault, published: Manifest, signed: Path) -> None:
        shutil.rmtree(vault.layout.artifacts_dir)
        assert asked(vault, published, OURS.public) == ""
        assert "has no good signature" not in asked(vault, published, THEIRS.public)

    def test_a_vault_that_was_copied_keeps_its_signatures(
        self, vault: Vault, published: Manifest, signed: Path, tmp_path: Path
    ) -> None:
        shutil.copytree(vault.root, tmp_path / "copy")
        assert asked(Vault.open(tmp_path / "copy"), published, OURS.public) == ""

    def test_a_policy_that_there_is_not(self, vault: Vault, published: Manifest) -> None:
        with pytest.raises(ValueError, match="Unknown signature policy 'always'"):
            check_signature(vault.layout, published, policy="always", trusted=[])


class TestFormat:
    def test_the_file(self, published: Manifest, signed: Path) -> None:
        data = signed.read_bytes()
        document = json.loads(data)
        assert canonical_json(document) == data
        assert len(base64.b64decode(document.pop("signature"))) == 64
        assert document == {
            "algorithm": "ed25519",
            "key": published.key.digest.hex,
            "manifest": published.manifest_digest.hex,
            "public_key": OURS.public.id,
            "signature_version": 1,
        }
        assert stat.S_IMODE(signed.stat().st_mode) == 0o644
        assert signed.parent.name == published.key.digest.hex[:2]

    def test_the_message(self) -> None:
        message = signed_message(Digest("a" * 64), Digest("b" * 64))
        assert message == b"pipevault signature v1\n" + b"a" * 64 + b"\n" + b"b" * 64 + b"\n"
        assert len(message) == 153

    def test_the_signature_is_over_that_message(self, published: Manifest, signed: Path) -> None:
        found = base64.b64decode(json.loads(signed.read_bytes())["signature"])
        expected = signed_message(published.key.digest, published.manifest_digest)
        Ed25519PublicKey.from_public_bytes(OURS.public.raw).verify(found, expected)

    def test_openssl_agrees(self, published: Manifest, signed: Path, tmp_path: Path) -> None:
        spki = bytes.fromhex("302a300506032b6570032100") + OURS.public.raw
        pem = f"-----BEGIN PUBLIC KEY-----\n{base64.b64encode(spki).decode()}\n-----END PUBLIC KEY-----\n"
        (tmp_path / "key.pem").write_text(pem)
        document = json.loads(signed.read_bytes())
        (tmp_path / "signature").write_bytes(base64.b64decode(document["signature"]))
        message = f"pipevault signature v1\n{document['key']}\n{document['manifest']}\n"
        (tmp_path / "message").write_text(message)
        files: list[str | Path] = [
            "-inkey",
            tmp_path / "key.pem",
            "-in",
            tmp_path / "message",
            "-sigfile",
            tmp_path / "signature",
        ]
        command: list[str | Path] = ["openssl", "pkeyutl", "-verify", "-pubin", "-rawin", *files]
        if shutil.which("openssl") is None:
            pytest.skip("no openssl")
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        assert "Verified Successfully" in result.stdout

    def test_the_layout_knows_the_file(self, vault: Vault, signed: Path) -> None:
        assert list(iter_foreign(vault.layout)) == []


class TestNoneThatCounts:
    def test_none_at_all(self, vault: Vault, published: Manifest) -> None:
        text = asked(vault, published, OURS.public)
        assert text.startswith(f"The entry {published.key.digest.short} of {vault.root} has no signature.")
        assert f"pipevault sign {published.key.digest.short} --key FILE" in text

    def test_none_and_no_trusted_key(self, vault: Vault, published: Manifest) -> None:
        assert "has no signature, and no key is trusted here" in asked(vault, published)

    def test_by_an_unknown_key(self, vault: Vault, published: Manifest, signed: Path) -> None:
        text = asked(vault, published, THEIRS.public)
        assert f"is signed by {OURS.public.id}, and no such key is trusted here" in text
        assert f"(trusted: {THEIRS.public.id})" in text
        assert "to trusted_keys" in text
        assert "(trusted: none)" in asked(vault, published)

    def test_by_several_unknown_keys(self, vault: Vault, published: Manifest, signed: Path) -> None:
        vault.sign(published, THEIRS)
        first, second = sorted((OURS.public.id, THEIRS.public.id))
        assert f"is signed by {first} and {second}," in asked(vault, published)

    def test_of_another_entry_moved_here(self, vault: Vault, published: Manifest, signed: Path, tmp_path: Path) -> None:
        other = make_entry(tmp_path / "other", "b", {"unet/0.pt2": b"other"})
        vault.publish(other.manifest, other.files)
        place = vault.layout.signature_file(other.key, OURS.public.id)
        place.parent.mkdir(exist_ok=True)
        shutil.copy(signed, place)
        text = asked(vault, other.manifest, OURS.public)
        assert f"is that of another entry, {published.key.digest.short}, moved here" in text

    def test_of_another_entry_with_its_fields_edited(
        self, vault: Vault, published: Manifest, signed: Path, tmp_path: Path
    ) -> None:
        other = make_entry(tmp_path / "other", "b", {"unet/0.pt2": b"other"})
        vault.publish(other.manifest, other.files)
        place = vault.layout.signature_file(other.key, OURS.public.id)
        place.parent.mkdir(exist_ok=True)
        shutil.copy(signed, place)
        edited(place, key=other.key.hex, manifest=other.manifest.manifest_digest.hex)
        assert "was not made with its private key" in asked(vault, other.manifest, OURS.public)

    def test_by_another_key_under_the_name_of_a_trusted_one(
        self, vault: Vault, published: Manifest, signed: Path
    ) -> None:
        place = vault.layout.signature_file(published.key.digest, THEIRS.public.id)
        signed.rename(place)
        text = asked(vault, published, THEIRS.public)
        assert f"the signature by {THEIRS.public.id} names another public key, {OURS.public.id}" in text
        edited(place, public_key=THEIRS.public.id)
        assert "was not made with its private key" in asked(vault, published, THEIRS.public)

    def test_over_another_manifest_of_the_key(self, vault: Vault, published: Manifest, signed: Path) -> None:
        again = dataclasses.replace(published, created_at="2026-01-01T00:00:00+00:00")
        text = asked(vault, again, OURS.public)
        assert f"({published.manifest_digest.short}, not {again.manifest_digest.short})" in text
        assert "frozen again or changed after it was signed" in text
        edited(signed, manifest=again.manifest_digest.hex)
        assert "was not made with its private key" in asked(vault, again, OURS.public)

    def test_over_a_manifest_that_an_attacker_rewrote(self, vault: Vault, published: Manifest, signed: Path) -> None:
        path = vault.layout.manifest_file(published.key.digest)
        evil = dataclasses.replace(published, info={"evil": True})
        path.write_bytes(evil.to_bytes())
        found = vault.lookup(published.key.digest)
        assert found == evil  # its own digest fits: only the signature tells
        assert "is over another manifest" in asked(vault, found, OURS.public)

    def test_a_key_that_only_shares_the_id(
        self, vault: Vault, published: Manifest, signed: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        twin = dataclasses.replace(THEIRS.public)
        twin.__dict__["id"] = OURS.public.id
        assert "was not made with its private key" in asked(vault, published, twin)
        assert asked(vault, published, twin, OURS.public) == ""


class TestDamage:
    def test_every_flipped_bit(self, vault: Vault, published: Manifest, signed: Path) -> None:
        data = signed.read_bytes()
        for place in range(len(data)):
            for bit in (0, 3, 6):
                signed.write_bytes(data[:place] + bytes([data[place] ^ (1 << bit)]) + data[place + 1 :])
                assert check_signature(vault.layout, published, policy="warn", trusted=[OURS.public]) is not None

    def test_every_truncation(self, vault: Vault, published: Manifest, signed: Path) -> None:
        data = signed.read_bytes()
        for length in range(len(data)):
            signed.write_bytes(data[:length])
            assert "is damaged" in asked(vault, published, OURS.public)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"signature_version": 2}, "is of version 2 (`signature_version`), not 1: upgrade pipevault"),
            ({"signature_version": 2, "more": 1}, "is of version 2"),
            ({"signature_version": 0}, "`signature_version`: expected an integer from 1 on, got 0"),
            ({"signature_version": True}, "got True"),
            ({"signature_version": "1"}, "got '1'"),
            ({"algorithm": "ed448"}, "is of the algorithm 'ed448', not ed25519"),
            ({"more": 1}, "field `more`: unknown"),
            ({"key": None}, "field `key`: expected `str`, got `null`"),
            ({"public_key": []}, "field `public_key`: expected `str`, got `array`"),
            ({"manifest": 7}, "field `manifest`: expected `str`, got `int`"),
            ({"signature": "AAAA"}, "it has 3 bytes, not 64"),
            ({"signature": "A"}, "its signature is not base64"),
            ({"signature": "ä"}, "its signature is not base64"),
            ({"signature": None}, "field `signature`: expected `str`, got `null`"),
            ({"signature": base64.b64encode(bytes(64)).decode()}, "was not made with its private key"),
        ],
    )
    def test_a_field_that_is_wrong(
        self, vault: Vault, published: Manifest, signed: Path, changes: dict[str, Any], message: str
    ) -> None:
        edited(signed, **changes)
        text = asked(vault, published, OURS.public)
        assert f"has no good signature: the signature by {OURS.public.id} " in text
        assert message in text

    def test_another_form_of_the_same_base64(self, vault: Vault, published: Manifest, signed: Path) -> None:
        text = json.loads(signed.read_bytes())["signature"]
        other = text[:-3] + chr(ord(text[-3]) + 1) + "=="
        assert base64.b64decode(other) == base64.b64decode(text)
        edited(signed, signature=other)
        assert "not base64" in asked(vault, published, OURS.public)

    @pytest.mark.parametrize("data", [b"", b"{}", b"[]", b"null", b'"text"', b"\xff", b"[" * 4000, b"x" * 5000])
    def test_what_is_no_signature(self, vault: Vault, published: Manifest, signed: Path, data: bytes) -> None:
        signed.write_bytes(data)
        expected = "is damaged" if len(data) < 5000 else "has more than 4096 bytes"
        assert expected in asked(vault, published, OURS.public)

    def test_other_white_space(self, vault: Vault, published: Manifest, signed: Path) -> None:
        signed.write_text(json.dumps(json.loads(signed.read_bytes())))
        assert "expected canonical JSON" in asked(vault, published, OURS.public)

    @pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo], ids=["folder", "pipe"])
    def test_what_is_no_file(
        self, vault: Vault, published: Manifest, signed: Path, make: Callable[[Path], None]
    ) -> None:
        signed.unlink()
        make(signed)
        assert "is not a regular file" in asked(vault, published, OURS.public)

    def test_a_link(self, vault: Vault, published: Manifest, signed: Path, tmp_path: Path) -> None:
        signed.rename(tmp_path / "outside")
        signed.symlink_to(tmp_path / "outside")
        assert "cannot be read" in asked(vault, published, OURS.public)

    def test_a_file_in_place_of_the_folder(self, vault: Vault, published: Manifest) -> None:
        vault.layout.signatures_dir.write_text("")
        assert "cannot be read" in asked(vault, published, OURS.public)


class TestSigning:
    def test_twice_changes_nothing(self, vault: Vault, published: Manifest, signed: Path) -> None:
        before = signed.stat()
        assert not vault.sign(published, OURS)
        assert (signed.stat().st_ino, signed.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)

    def test_a_bad_one_is_replaced(self, vault: Vault, published: Manifest, signed: Path) -> None:
        signed.write_text("garbage")
        assert vault.sign(published, OURS)
        assert asked(vault, published, OURS.public) == ""

    def test_a_damaged_artifact_is_not_signed(self, vault: Vault, published: Manifest) -> None:
        path = vault.layout.artifact_file(published.artifacts[0].digest)
        path.chmod(0o644)
        path.write_bytes(b"x" * published.artifacts[0].size_bytes)
        with pytest.raises(CorruptEntryError):
            vault.sign(published, OURS)
        assert signature_files(vault.layout, published.key.digest) == ()

    def test_what_others_can_write_is_not_signed(self, vault: Vault, published: Manifest) -> None:
        vault.layout.artifact_file(published.artifacts[0].digest).chmod(0o666)
        with pytest.raises(UnsafeVaultError):
            vault.sign(published, OURS)

    def test_a_read_only_vault(self, vault: Vault, published: Manifest) -> None:
        with pytest.raises(VaultNotWritableError, match="read-only"):
            dataclasses.replace(vault, writable=False).sign(published, OURS)

    def test_nothing_is_left_in_tmp(self, vault: Vault, published: Manifest, signed: Path) -> None:
        assert list(vault.layout.tmp_dir.iterdir()) == []

    def test_a_write_that_fails_leaves_no_signature(
        self, vault: Vault, published: Manifest, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fail(*_: Any, **__: Any) -> None:
            raise VaultNotWritableError("no", vault.root)

        monkeypatch.setattr(publish, "write_file", fail)
        with pytest.raises(VaultNotWritableError):
            sign_entry(vault.layout, published, OURS)
        assert signature_files(vault.layout, published.key.digest) == ()
        assert list(vault.layout.tmp_dir.iterdir()) == []


class TestLists:
    def test_states(self, vault: Vault, published: Manifest, signed: Path) -> None:
        vault.sign(published, THEIRS)
        [bad] = [vault.layout.signature_file(published.key.digest, "0" * 16)]
        bad.write_text("garbage")
        found = {state.public_key_id: state for state in signature_states(vault.layout, published, [OURS.public])}
        assert list(found) == sorted(["0" * 16, OURS.public.id, THEIRS.public.id])
        assert (found[OURS.public.id].state, found[OURS.public.id].path) == ("good", signed)
        assert found[THEIRS.public.id].state == "unknown key"
        assert found["0" * 16].state == "bad"
        assert "is damaged" in found["0" * 16].reason

    def test_an_entry_that_nobody_signed(self, vault: Vault, published: Manifest) -> None:
        assert signature_states(vault.layout, published, [OURS.public]) == ()

    def test_files_of_this_entry_alone(self, vault: Vault, published: Manifest, signed: Path) -> None:
        key = published.key.digest.hex
        (signed.parent / f"{key[:-1]}{'0' if key[-1] != '0' else '1'}.{OURS.public.id}.json").write_text("")
        (signed.parent / "note.txt").write_text("")
        assert signature_files(vault.layout, published.key.digest) == (signed,)

    def test_copies(self, vault: Vault, published: Manifest, signed: Path, tmp_path: Path) -> None:
        other = Vault.open(tmp_path / "other")
        vault.layout.signature_file(published.key.digest, "0" * 16).mkdir()
        list(copy_signatures(vault.layout, other.layout, published.key.digest))
        assert asked(other, published, OURS.public) == ""
        [copied] = signature_files(other.layout, published.key.digest)
        assert (copied.read_bytes(), stat.S_IMODE(copied.stat().st_mode)) == (signed.read_bytes(), 0o644)
        copied.write_text("kept")
        list(copy_signatures(vault.layout, other.layout, published.key.digest))
        assert copied.read_text() == "kept"
