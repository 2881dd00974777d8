"""Making, keeping and reading keys."""

from __future__ import annotations

import base64
import os
import pickle
import stat
import subprocess
import traceback
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from pipevault.errors import KeyFileError
from pipevault.store.trust import signing_keys
from pipevault.store.trust.signing_keys import (
    PublicKey,
    load_trusted,
    parse_public_key,
    read_private_key,
    write_key_pair,
)

# https://www.rfc-editor.org/rfc/rfc8032#section-7.1, test 1
SEED = bytes.fromhex("9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60")
RAW = bytes.fromhex("d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a")
LINE = "pipevault-ed25519 11qYAYKxCrfVS/7TyWQHOg7hcvPapiMlrwIaaPcHURo="
ID = "21fe31dfa154a261"


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    """The private half of a new key; the public one beside it."""
    write_key_pair(tmp_path / "key", comment="a test")
    return tmp_path / "key"


def pem(key: Ed25519PrivateKey | rsa.RSAPrivateKey, password: bytes | None = None, *, openssh: bool = False) -> bytes:
    form = serialization.PrivateFormat.OpenSSH if openssh else serialization.PrivateFormat.PKCS8
    protection = serialization.BestAvailableEncryption(password) if password else serialization.NoEncryption()
    return key.private_bytes(serialization.Encoding.PEM, form, protection)


def private_file(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    path.chmod(0o600)
    return path


class TestPublicKey:
    def test_its_text_and_id_are_as_specified(self) -> None:
        assert (PublicKey(RAW).text, PublicKey(RAW).id) == (LINE, ID)
        assert Ed25519PrivateKey.from_private_bytes(SEED).public_key().public_bytes_raw() == RAW

    @pytest.mark.parametrize("text", [LINE, f"  {LINE}\n", f"{LINE} ", f"{LINE}\r\n"])
    def test_it_is_read(self, text: str) -> None:
        assert parse_public_key(text, source="key") == PublicKey(RAW)

    def test_its_comment_is_kept_and_makes_no_difference(self) -> None:
        found = parse_public_key(f"{LINE} build machine: 3", source="key")
        assert (found.comment, found.text) == ("build machine: 3", f"{LINE} build machine: 3")
        assert found == PublicKey(RAW)

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("", "key is empty"),
            (" \n", "key is empty"),
            (f"{LINE}\n{LINE}\n", "has 2 lines"),
            ("pipevault-ed25519", "the key itself is missing"),
            ("something else", "must begin with pipevault-ed25519"),
            (LINE.replace("ed25519", "ed448"), "must begin with pipevault-ed25519"),
            ("ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAI me", "a key of OpenSSH"),
            ("-----BEGIN PUBLIC KEY-----\nMCow\n-----END PUBLIC KEY-----", "is in PEM"),
            ("-----BEGIN PRIVATE KEY-----\nMC4C\n-----END PRIVATE KEY-----", "is a private key.*Give the .pub file"),
            ("-----BEGIN OPENSSH PRIVATE KEY-----\nb3Bl\n-----END", "is a private key"),
            (LINE[:-1], "not base64"),
            (LINE[:-1] + "!", "not base64"),
            (LINE.replace("URo=", "URp="), "not the one base64 form"),
            ("pipevault-ed25519 AAAA", "holds 3 bytes"),
            (f"pipevault-ed25519 {base64.b64encode(RAW + b'x').decode()}", "holds 33 bytes"),
            (f"{LINE} two\x1blines", "its comment must be one printable line"),
            (f"{LINE} {'x' * 201}", "at most 200"),
        ],
    )
    def test_bad_text(self, text: str, message: str) -> None:
        with pytest.raises(KeyFileError, match=message) as caught:
            parse_public_key(text, source="the key")
        assert str(caught.value).startswith("the key ")

    @pytest.mark.parametrize("raw", sorted(signing_keys._FORGEABLE))
    @pytest.mark.parametrize("sign_bit", [0, 0x80])
    def test_a_key_under_which_anyone_can_sign(self, raw: bytes, sign_bit: int) -> None:
        with pytest.raises(KeyFileError, match="anybody could make signatures"):
            parse_public_key(
                f"pipevault-ed25519 {base64.b64encode(raw[:-1] + bytes([raw[-1] | sign_bit])).decode()}", source="key"
            )

    def test_such_keys_are_a_real_danger(self) -> None:
        zeros = object.__new__(PublicKey)
        object.__setattr__(zeros, "raw", bytes(32))
        forged = b"\x01" + bytes(63)  # the neutral point and the scalar 0: made without any key
        assert any(zeros.verifies(forged, str(number).encode()) for number in range(64))


class TestWriting:
    def test_both_files(self, tmp_path: Path) -> None:
        before = os.umask(0)
        try:
            public = write_key_pair(tmp_path / "key", comment=" build machine ")
        finally:
            os.umask(before)
        assert stat.S_IMODE((tmp_path / "key").stat().st_mode) == 0o600
        assert stat.S_IMODE((tmp_path / "key.pub").stat().st_mode) == 0o644
        assert (tmp_path / "key.pub").read_text() == f"{public.text}\n"
        assert public.comment == "build machine"
        assert read_private_key(tmp_path / "key").public == public

    def test_a_strict_umask_takes_nothing_from_its_owner(self, tmp_path: Path) -> None:
        before = os.umask(0o777)
        try:
            write_key_pair(tmp_path / "key")
        finally:
            os.umask(before)
        assert stat.S_IMODE((tmp_path / "key").stat().st_mode) == 0o600

    def test_two_keys_differ(self, tmp_path: Path) -> None:
        assert write_key_pair(tmp_path / "a") != write_key_pair(tmp_path / "b")

    @pytest.mark.parametrize("name", ["key", "key.pub"])
    def test_nothing_is_overwritten(self, tmp_path: Path, name: str) -> None:
        (tmp_path / name).write_text("precious")
        with pytest.raises(KeyFileError, match=f"{name} exists, and keys are never overwritten"):
            write_key_pair(tmp_path / "key")
        assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [(name, "precious")]

    def test_a_link_that_leads_nowhere_is_not_followed(self, tmp_path: Path) -> None:
        (tmp_path / "key").symlink_to(tmp_path / "elsewhere")
        with pytest.raises(KeyFileError, match="exists"):
            write_key_pair(tmp_path / "key")
        assert not (tmp_path / "elsewhere").exists()

    def test_a_public_file_that_appears_meanwhile_leaves_no_half_a_pair(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(os.path, "lexists", lambda path: False)
        (tmp_path / "key.pub").write_text("precious")
        with pytest.raises(KeyFileError, match="exists"):
            write_key_pair(tmp_path / "key")
        assert [path.name for path in tmp_path.iterdir()] == ["key.pub"]

    def test_a_folder_that_is_not_there(self, tmp_path: Path) -> None:
        with pytest.raises(KeyFileError, match="cannot be made: No such file"):
            write_key_pair(tmp_path / "none" / "key")

    @pytest.mark.parametrize("comment", ["two\nlines", "x" * 201])
    def test_a_comment_that_is_none(self, tmp_path: Path, comment: str) -> None:
        with pytest.raises(KeyFileError, match="its comment must be"):
            write_key_pair(tmp_path / "key", comment=comment)
        assert list(tmp_path.iterdir()) == []

    def test_a_full_disk_leaves_no_half_a_key(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def full(descriptor: int) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(KeyFileError, match="No space left"):
            write_key_pair(tmp_path / "key")
        assert list(tmp_path.iterdir()) == []


class TestPrivateKey:
    def test_it_shows_and_hands_out_nothing(self, key_file: Path) -> None:
        key = read_private_key(key_file)
        assert repr(key) == f"<private key of {key.public.id}>"
        with pytest.raises(TypeError, match="not pickled"):
            pickle.dumps(key)

    def test_it_signs_as_the_standard_says(self, tmp_path: Path) -> None:
        key = read_private_key(private_file(tmp_path / "key", pem(Ed25519PrivateKey.from_private_bytes(SEED))))
        assert key.sign(b"").hex().startswith("e5564300c360ac729086e2cc806e828a84877f1eb8e5d974d873e06522490155")
        assert key.public.verifies(key.sign(b"m"), b"m")
        assert not key.public.verifies(key.sign(b"m"), b"n")

    def test_a_key_that_openssl_made(self, tmp_path: Path) -> None:
        made = subprocess.run(["openssl", "genpkey", "-algorithm", "ed25519"], capture_output=True, check=False)
        if made.returncode:
            pytest.skip("no openssl with Ed25519")
        read_private_key(private_file(tmp_path / "key", made.stdout))

    @pytest.mark.parametrize("mode", [0o644, 0o640, 0o604, 0o620, 0o660, 0o610])
    def test_a_key_that_others_can_read_or_write(self, key_file: Path, mode: int) -> None:
        key_file.chmod(mode)
        with pytest.raises(KeyFileError, match=f"by others \\(mode {mode:04o}\\).*chmod 600 {key_file}"):
            read_private_key(key_file)

    @pytest.mark.root
    def test_a_key_of_another_user(self, key_file: Path) -> None:
        os.chown(key_file, 4242, 4242)
        with pytest.raises(KeyFileError, match="belongs to user 4242"):
            read_private_key(key_file)

    @pytest.mark.parametrize(
        ("data", "message"),
        [
            (LINE.encode(), "holds a public key, which cannot sign"),
            (b"", "not a private key in PEM"),
            (b"garbage\x00\xff", "not a private key in PEM"),
            (pem(Ed25519PrivateKey.from_private_bytes(SEED))[:-40], "not a private key in PEM"),
            (pem(Ed25519PrivateKey.from_private_bytes(SEED), b"secret"), "is encrypted"),
            (pem(Ed25519PrivateKey.from_private_bytes(SEED), openssh=True), "a key of OpenSSH"),
            (pem(rsa.generate_private_key(65537, 2048)), "of another kind \\(RSA\\)"),
            (b"x" * 70_000, "larger than any key"),
        ],
        ids=["public", "empty", "garbage", "truncated", "encrypted", "openssh", "rsa", "large"],
    )
    def test_what_is_no_private_key(self, tmp_path: Path, data: bytes, message: str) -> None:
        path = private_file(tmp_path / "key", data)
        with pytest.raises(KeyFileError, match=message) as caught:
            read_private_key(path)
        assert str(path) in str(caught.value)

    def test_no_error_shows_anything_of_it(self, tmp_path: Path) -> None:
        data = pem(Ed25519PrivateKey.from_private_bytes(SEED))
        path = private_file(tmp_path / "key", data[:60] + b"!" + data[60:])
        with pytest.raises(KeyFileError) as caught:
            read_private_key(path)
        assert data.splitlines()[1][:20].decode() not in "".join(traceback.format_exception(caught.value))

    def test_places_that_hold_no_file(self, tmp_path: Path) -> None:
        with pytest.raises(KeyFileError, match="Found no private key at"):
            read_private_key(tmp_path / "none")
        with pytest.raises(KeyFileError, match="not a regular file"):
            read_private_key(tmp_path)
        os.mkfifo(tmp_path / "pipe", 0o600)
        with pytest.raises(KeyFileError, match="not a regular file"):
            read_private_key(tmp_path / "pipe")
        (tmp_path / "file").write_text("")
        with pytest.raises(KeyFileError, match="cannot be read: Not a directory"):
            read_private_key(tmp_path / "file" / "key")


class TestTrustedKeys:
    def test_text_and_files(self, key_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        from_file, from_text = load_trusted([f"{key_file}.pub", f"{LINE} by hand"])
        assert from_file == read_private_key(key_file).public
        assert (from_text, from_text.comment) == (PublicKey(RAW), "by hand")
        monkeypatch.setenv("HOME", str(key_file.parent))
        assert load_trusted(["~/key.pub"]) == (from_file,)

    def test_none_and_twice(self) -> None:
        assert load_trusted([]) == ()
        assert load_trusted([LINE, f"{LINE} again"]) == (PublicKey(RAW),)

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            ("", "is empty"),
            ("  ", "is empty"),
            ("/none/key.pub", "Found no public key at /none/key.pub"),
            ("pipevault-ed25519 AAAA", "holds 3 bytes"),
            ("ssh-ed25519 AAAA", "OpenSSH"),
            ("-----BEGIN PRIVATE KEY-----\nMC4C\n", "is a private key"),
            (f"{LINE}\n{LINE}", "has 2 lines"),
            ("/", "not a regular file"),
        ],
    )
    def test_bad_ones(self, given: str, message: str) -> None:
        with pytest.raises(KeyFileError, match=message):
            load_trusted([LINE, given])

    def test_the_private_file_in_place_of_the_public_one(self, key_file: Path) -> None:
        with pytest.raises(KeyFileError, match=f"{key_file} is a private key, where a public one is needed"):
            load_trusted([str(key_file)])

    def test_a_file_of_other_bytes(self, tmp_path: Path) -> None:
        (tmp_path / "key.pub").write_bytes(b"\xff\xfe\x00")
        with pytest.raises(KeyFileError, match="must begin with"):
            load_trusted([str(tmp_path / "key.pub")])

    @pytest.mark.parametrize("mode", [0o666, 0o664])
    def test_a_file_that_others_could_change(self, key_file: Path, mode: int) -> None:
        public = key_file.with_name("key.pub")
        public.chmod(mode)
        with pytest.raises(KeyFileError, match=f"out of reach of others.*{public}.*chmod go-w"):
            load_trusted([str(public)])

    def test_a_file_in_a_folder_that_others_could_change(self, key_file: Path) -> None:
        key_file.parent.chmod(0o777)
        with pytest.raises(KeyFileError, match=f"{key_file.parent}, above"):
            load_trusted([f"{key_file}.pub"])
