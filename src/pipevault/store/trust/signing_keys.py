"""Ed25519 keys: making a pair, reading the private key, reading the public keys that are trusted.

A public key is one line of text::

    pipevault-ed25519 <base64 of its 32 bytes> [comment]

and its id is the first 16 hexadecimal digits of the SHA-256 of those 32 bytes. A private key is a file in PEM (PKCS #8,
not encrypted), as ``openssl genpkey -algorithm ed25519`` writes it too. It is created for this user alone, is never
overwritten, and no message, ``repr`` or pickle holds anything of it.
"""

from __future__ import annotations

import base64
import errno
import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from pipevault.digest import digest_bytes
from pipevault.errors import KeyFileError, MissingExtraError, UnsafeVaultError
from pipevault.files.atomic import new_file, write_all
from pipevault.reading import open_regular
from pipevault.settings.ownership import open_owned
from pipevault.settings.user_folders import expand_user

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

PUBLIC_KEY_PREFIX = "pipevault-ed25519"
PUBLIC_SUFFIX = ".pub"
ID_LENGTH = 16
_RAW_LENGTH = 32
_MAX_FILE_SIZE_BYTES = 1 << 16
_MAX_COMMENT_LENGTH = 200

# Under these anyone can make signatures that verify: points of small order, as libsodium refuses them
# (ge25519_has_small_order). 32 bytes of zero, which look like a place to be filled in, are one of them.
_FORGEABLE = frozenset(
    bytes.fromhex(text)
    for text in (
        "0000000000000000000000000000000000000000000000000000000000000000",
        "0100000000000000000000000000000000000000000000000000000000000000",
        "26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc05",
        "c7176a703d4dd84fba3c0b760d10670f2a2053fa2c39ccc64ec7fd7792ac037a",
        "ecffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
        "edffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
        "eeffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
    )
)


@contextmanager
def _signing_extra() -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        raise MissingExtraError(
            "Signatures are made and checked by the package cryptography, which is not installed: "
            "pip install 'pipevault[signing]'",
            "signing",
        ) from error


@dataclass(frozen=True)
class PublicKey:
    """The public half: what verifies. Equal if the bytes are, whatever the comment. ``ValueError`` for no such key."""

    raw: bytes
    comment: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        if len(self.raw) != _RAW_LENGTH:
            raise ValueError(f"it holds {len(self.raw)} bytes; an Ed25519 key has {_RAW_LENGTH}")
        if self.raw[:-1] + bytes([self.raw[-1] & 0x7F]) in _FORGEABLE:
            raise ValueError("anybody could make signatures that fit it (a point of small order)")
        if not self.comment.isprintable() or len(self.comment) > _MAX_COMMENT_LENGTH:
            raise ValueError(f"its comment must be one printable line of at most {_MAX_COMMENT_LENGTH} characters")

    @cached_property
    def id(self) -> str:
        """The 16 hexadecimal digits that find a key; what proves anything is the whole key."""
        return digest_bytes(self.raw).hex[:ID_LENGTH]

    @property
    def text(self) -> str:
        return " ".join(filter(None, (PUBLIC_KEY_PREFIX, base64.b64encode(self.raw).decode(), self.comment)))

    def verifies(self, signature: bytes, message: bytes) -> bool:
        """Check a signature. :class:`~pipevault.errors.MissingExtraError`."""
        with _signing_extra():
            from cryptography.exceptions import InvalidSignature
            from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
        try:
            Ed25519PublicKey.from_public_bytes(self.raw).verify(signature, message)
        except InvalidSignature:
            return False
        return True


class PrivateKey:
    """The private half: what signs. Shows its public id only, and is neither pickled nor copied."""

    def __init__(self, key: Ed25519PrivateKey) -> None:
        self._key = key
        self.public = PublicKey(key.public_key().public_bytes_raw())

    def sign(self, message: bytes) -> bytes:
        return self._key.sign(message)

    def __repr__(self) -> str:
        return f"<private key of {self.public.id}>"

    def __reduce__(self) -> NoReturn:
        raise TypeError("A private key is not pickled: give the path of its file.")


def write_key_pair(path: Path, *, comment: str = "") -> PublicKey:
    """Make a new key: ``path`` gets the private half with mode 0600, ``<path>.pub`` the public line.

    :class:`KeyFileError` if one of the two exists or cannot be written; :class:`~pipevault.errors.MissingExtraError`.
    """
    with _signing_extra():
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    path = expand_user(path)
    secret = Ed25519PrivateKey.generate()
    try:
        public = PublicKey(secret.public_key().public_bytes_raw(), comment.strip())
    except ValueError as error:
        raise KeyFileError(f"No key can be made like this: {error}.") from error
    pem = secret.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    _write_new(path, pem, mode=0o600)
    try:
        _write_new(path.with_name(path.name + PUBLIC_SUFFIX), f"{public.text}\n".encode(), mode=0o644)
    except KeyFileError:
        path.unlink()  # written just now, by this call: nothing was signed with it yet
        raise
    return public


def read_private_key(path: Path) -> PrivateKey:
    """Read the key in the file ``path``, which others must not be able to read. :class:`KeyFileError`;
    :class:`~pipevault.errors.MissingExtraError`.
    """
    with _signing_extra():
        from cryptography.exceptions import UnsupportedAlgorithm
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
        from cryptography.hazmat.primitives.serialization import load_pem_private_key
    path = expand_user(path)
    data = _read(path, private=True)
    if _is_public(data):
        raise KeyFileError(f"{path} holds a public key, which cannot sign. Give the private one, without .pub.")
    if b"BEGIN OPENSSH PRIVATE KEY" in data:
        raise KeyFileError(f"{path} is a key of OpenSSH, in a format of its own. Make one with: pipevault keygen")
    try:
        key = load_pem_private_key(data, password=None)
    except TypeError:
        # Without the cause: no part of a key file goes into a traceback.
        raise KeyFileError(
            f"{path} is encrypted, and a password cannot be asked for. Decrypt it to a file that only this user "
            "can read: openssl pkey -in FILE -out NEWFILE"
        ) from None
    except (ValueError, UnsupportedAlgorithm):
        raise KeyFileError(
            f"{path} is not a private key in PEM (PKCS #8), or is damaged. Make one with: pipevault keygen -o FILE"
        ) from None
    if not isinstance(key, Ed25519PrivateKey):
        kind = type(key).__name__.removesuffix("PrivateKey").lstrip("_")
        raise KeyFileError(f"{path} is a key of another kind ({kind}), not Ed25519. Make one with: pipevault keygen")
    return PrivateKey(key)


def load_trusted(keys: Sequence[str]) -> tuple[PublicKey, ...]:
    """Read the public keys of the setting ``trusted_keys``: each a line of text or the path of a file with one. Who can
    change a file, or a folder above it, must be this user or root. :class:`KeyFileError` says what is wrong with which.
    """
    found: dict[PublicKey, None] = {}
    for given in keys:
        if not given.strip():
            raise KeyFileError("One of trusted_keys is empty. Give a public key, or the path of a file with one.")
        if "\n" in given.strip() or given.split()[0] in (PUBLIC_KEY_PREFIX, "ssh-ed25519") or "-----BEGIN" in given:
            found[parse_public_key(given, source="One of trusted_keys")] = None
            continue
        path = expand_user(given)
        data = _read(path, private=False)
        found[parse_public_key(data.decode("utf-8", "replace"), source=str(path))] = None
    return tuple(found)


def parse_public_key(text: str, *, source: str) -> PublicKey:
    """Read the key of a line ``pipevault-ed25519 <base64> [comment]``; ``source`` begins the message of an error."""
    text = text.strip()
    if "PRIVATE KEY-----" in text:
        raise KeyFileError(
            f"{source} is a private key, where a public one is needed. Give the .pub file next to it, and keep the "
            "private one away from every machine that does not sign."
        )
    if "-----BEGIN" in text:
        raise KeyFileError(f"{source} is in PEM. A public key is one line, {PUBLIC_KEY_PREFIX} <base64>: see keygen.")
    lines = text.splitlines()
    if not lines:
        raise KeyFileError(f"{source} is empty, where a public key is needed: {PUBLIC_KEY_PREFIX} <base64>.")
    if len(lines) > 1:
        raise KeyFileError(f"{source} has {len(lines)} lines. A public key is one line; name each key on its own.")
    kind, *rest = text.split(maxsplit=2)
    if kind == "ssh-ed25519":
        raise KeyFileError(f"{source} is a key of OpenSSH, which is not read. Make one with: pipevault keygen -o FILE")
    if kind != PUBLIC_KEY_PREFIX:
        raise KeyFileError(f"{source} is not a public key: it must begin with {PUBLIC_KEY_PREFIX}.")
    if not rest:
        raise KeyFileError(f"{source} ends after {PUBLIC_KEY_PREFIX}: the key itself is missing.")
    try:
        raw = strict_base64(rest[0])
    except ValueError as error:
        raise KeyFileError(f"{source} is damaged: its key is not base64: {error}. Copy the line again.") from error
    try:
        return PublicKey(raw, rest[1].strip() if len(rest) > 1 else "")
    except ValueError as error:
        raise KeyFileError(f"{source} is not a public key that can be used: {error}.") from error


def strict_base64(text: str) -> bytes:
    """Return the bytes of ``text`` in the one form that base64 has for them; ``ValueError`` for any other text."""
    data = base64.b64decode(text, validate=True)
    if base64.b64encode(data).decode() != text:
        raise ValueError("it is not the one base64 form of its bytes")
    return data


def _read(path: Path, *, private: bool) -> bytes:
    what = "private key" if private else "public key"
    try:
        with open_regular(path) if private else open_owned(path) as file:
            data = file.read(_MAX_FILE_SIZE_BYTES + 1)
            if private and not _is_public(data):
                _check_private(path, os.fstat(file.fileno()))
    except UnsafeVaultError as error:  # an OSError too
        raise KeyFileError(f"A trusted key must be out of reach of others. {error}") from error
    except FileNotFoundError as error:
        raise KeyFileError(
            f"Found no {what} at {path}. Give the path of one, or make one with: pipevault keygen -o FILE"
        ) from error
    except OSError as error:
        if error.errno in (errno.EINVAL, errno.EISDIR, errno.ENXIO):
            raise KeyFileError(f"{path} is not a regular file. Give the file of a {what}.") from error
        raise KeyFileError(f"The {what} {path} cannot be read: {error.strerror}. Fix its permissions.") from error
    if len(data) > _MAX_FILE_SIZE_BYTES:
        raise KeyFileError(f"{path} is larger than any key. Give the file of a {what}.")
    return data


def _is_public(data: bytes) -> bool:
    return data.lstrip().startswith(PUBLIC_KEY_PREFIX.encode())


def _check_private(path: Path, status: os.stat_result) -> None:
    if status.st_uid not in (os.geteuid(), 0):
        raise KeyFileError(f"The private key {path} belongs to user {status.st_uid}. Use one of your own.")
    if status.st_mode & 0o077:
        raise KeyFileError(
            f"The private key {path} can be read or written by others (mode {stat.S_IMODE(status.st_mode):04o}). Make "
            f"a new one if that may have happened, or run: chmod 600 {path}"
        )


def _write_new(path: Path, data: bytes, *, mode: int) -> None:
    """Create ``path``; what was there before stays as it is. A file that could not be written to its end is removed."""
    made = False
    try:
        with new_file(path, mode) as descriptor:
            made = True
            write_all(descriptor, data)
            os.fsync(descriptor)
    except FileExistsError as error:
        raise KeyFileError(
            f"{path} exists, and keys are never overwritten. Give another path, or move it away yourself."
        ) from error
    except OSError as error:
        if made:
            path.unlink(missing_ok=True)
        verb = "written" if made else "made"
        raise KeyFileError(f"{path} cannot be {verb}: {error.strerror}. Give another path.") from error
