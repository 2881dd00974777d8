"""Signatures over entries: who says that the code of an entry is what it should be.

``signatures/<aa>/<key>.<public key id>.json`` is canonical JSON, shown here with line breaks::

    {"algorithm": "ed25519",
     "key": "<digest of the entry's key>",
     "manifest": "<self_digest of its manifest>",
     "public_key": "<id of the public key>",
     "signature": "<base64 of 64 bytes>",
     "signature_version": 1}

What is signed is 153 bytes of ASCII: the line ``pipevault signature v1``, the line ``key``, the line ``manifest``, each
ended by one line feed. The manifest's digest covers the digest of each artifact, so no artifact is signed on its own.
The fields ``key``, ``manifest`` and ``public_key`` prove nothing; they let a reader say what is wrong.
"""

from __future__ import annotations

import base64
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from pipevault.digest import Digest
from pipevault.errors import MissingExtraError, NewerVaultError, SignatureError
from pipevault.files.documents import Format
from pipevault.reading import read_file
from pipevault.store.layout import Layout, signer_of
from pipevault.store.manifest import Manifest
from pipevault.store.places import signature_files
from pipevault.store.publish import write_document
from pipevault.store.trust.signing_keys import PrivateKey, PublicKey, strict_base64

SIGNATURE_VERSION = 1
ALGORITHM = "ed25519"

_DOMAIN = "pipevault signature v1"
_SIGNATURE_LENGTH = 64
_MAX_FILE_SIZE_BYTES = 4096
_SIGN_AGAIN = "sign the entry again"


class _Signature(msgspec.Struct, forbid_unknown_fields=True):
    algorithm: str
    key: str
    manifest: str
    public_key: str
    signature: str
    signature_version: int


_FORMAT = Format(
    _Signature,
    "signature_version",
    SIGNATURE_VERSION,
    damaged=lambda problem: ValueError(f"is damaged: {problem.path.name}: {problem.what}; {_SIGN_AGAIN}"),
    newer=lambda problem: NewerVaultError(
        f"cannot be read: {problem.path.name} {problem.what}: upgrade pipevault", problem.path
    ),
)


@dataclass(frozen=True)
class SignatureState:
    """The worth of one signature file of an entry: ``good``, ``bad`` (``reason`` says why; ``newer``: a later pipevault
    wrote it) or ``unknown key``.
    """

    path: Path
    public_key_id: str
    state: str
    reason: str = ""
    newer: bool = False


def signed_message(key: Digest, manifest: Digest) -> bytes:
    return f"{_DOMAIN}\n{key}\n{manifest}\n".encode("ascii")


def check_signature(layout: Layout, manifest: Manifest, *, policy: str, trusted: Sequence[PublicKey]) -> str | None:
    """Ask for a good signature by one of ``trusted``; one is enough, whatever else there is. No artifact is touched.

    ``policy``: ``off`` reads nothing; ``warn`` returns a sentence if there is none, or none can be checked; ``require``
    raises :class:`SignatureError` or :class:`~pipevault.errors.MissingExtraError` instead.
    """
    if policy == "off":
        return None
    if policy not in ("warn", "require"):
        raise ValueError(f"Unknown signature policy {policy!r}: expected off, warn or require.")
    try:
        states = signature_states(layout, manifest, trusted, dict.fromkeys(key.id for key in trusted))
    except MissingExtraError as error:
        if policy == "require":
            raise
        return str(error)
    if any(state.state == "good" for state in states):
        return None
    faults = [state.reason for state in states]
    entry = f"The entry {manifest.key.digest.short} of {layout.root}"
    text = f"{entry} {_summary(layout, manifest, trusted, faults)}"
    if policy == "warn":
        return text
    raise SignatureError(f"{text} Nothing of it was loaded.", layout.manifest_file(manifest.key.digest))


def sign_entry(layout: Layout, manifest: Manifest, key: PrivateKey) -> bool:
    """Sign ``manifest``, whose artifacts were verified; ``False`` if a good signature by this key stands there. A bad
    one is replaced. Raises like :func:`pipevault.files.atomic.write_file`.
    """
    entry = manifest.key.digest
    standing = _state(layout, manifest, key.public.id, [key.public])
    if standing is not None and standing.state == "good":
        return False
    document = _Signature(
        algorithm=ALGORITHM,
        key=entry.hex,
        manifest=manifest.manifest_digest.hex,
        public_key=key.public.id,
        signature=base64.b64encode(key.sign(signed_message(entry, manifest.manifest_digest))).decode(),
        signature_version=SIGNATURE_VERSION,
    )
    write_document(layout, layout.signature_file(entry, key.public.id), _FORMAT.write(document))
    return True


def copy_signatures(source: Layout, target: Layout, key: Digest) -> Iterator[Path]:
    """Give ``target``'s entry the signatures that ``source``'s has and it lacks, each path right before it is written.
    They need no check: one that does not fit is as good as none. Raises like :func:`pipevault.files.atomic.write_file`.
    """
    for path in signature_files(source, key):
        copied = target.signatures_dir / path.relative_to(source.signatures_dir)
        if os.path.lexists(copied):
            continue
        try:
            data = _read(path)
        except (FileNotFoundError, ValueError):
            continue
        yield copied
        write_document(target, copied, data)


def signature_states(
    layout: Layout, manifest: Manifest, trusted: Sequence[PublicKey], key_ids: Iterable[str] | None = None
) -> tuple[SignatureState, ...]:
    """Judge every signature of the entry, sorted by public key id, or those by ``key_ids``, with which no folder is
    listed.
    """
    if key_ids is None:
        key_ids = map(signer_of, signature_files(layout, manifest.key.digest))
    states = (_state(layout, manifest, key_id, trusted) for key_id in key_ids)
    return tuple(state for state in states if state is not None)


def _summary(layout: Layout, manifest: Manifest, trusted: Sequence[PublicKey], faults: Sequence[str]) -> str:
    """Say why no signature counts and what to do, as the end of a sentence; ``faults``: of those by trusted keys."""
    short = manifest.key.digest.short
    if faults:
        return f"has no good signature: {'; '.join(faults)}."
    if signers := [*map(signer_of, signature_files(layout, manifest.key.digest))]:
        known = ", ".join(key.id for key in trusted) or "none"
        return (
            f"is signed by {' and '.join(signers)}, and no such key is trusted here (trusted: {known}). If you know "
            "whose it is, add its public line, which `pipevault keygen` printed, or its .pub file to trusted_keys."
        )
    if not trusted:
        return (
            "has no signature, and no key is trusted here. Sign it where the private key is "
            f"(pipevault sign {short} --key FILE) and name the public key in trusted_keys."
        )
    return f"has no signature. If it is what it should be: pipevault sign {short} --key FILE."


def _state(layout: Layout, manifest: Manifest, key_id: str, trusted: Sequence[PublicKey]) -> SignatureState | None:
    entry = manifest.key.digest
    path = layout.signature_file(entry, key_id)
    try:
        signature = _checked(_FORMAT.parse(_read(path), path), manifest, key_id)
    except FileNotFoundError:
        return None
    except (ValueError, NewerVaultError) as error:
        newer = isinstance(error, NewerVaultError)
        return SignatureState(path, key_id, "bad", f"the signature by {key_id} {error}", newer)
    if not (keys := [key for key in trusted if key.id == key_id]):
        return SignatureState(path, key_id, "unknown key")
    message = signed_message(entry, manifest.manifest_digest)
    if any(key.verifies(signature, message) for key in keys):
        return SignatureState(path, key_id, "good")
    reason = f"the signature by {key_id} was not made with its private key, or was edited: {_SIGN_AGAIN}"
    return SignatureState(path, key_id, "bad", reason)


def _checked(document: _Signature, manifest: Manifest, key_id: str) -> bytes:
    """The 64 bytes of a signature that claims to be over ``manifest`` by ``key_id``; ``ValueError`` ends a sentence."""
    if document.algorithm != ALGORITHM:
        raise ValueError(f"is of the algorithm {document.algorithm!r}, not {ALGORITHM}: {_SIGN_AGAIN}")
    if document.key != manifest.key.digest.hex:
        raise ValueError(f"is that of another entry, {document.key[:12]}, moved here: {_SIGN_AGAIN}")
    if document.public_key != key_id:
        raise ValueError(f"names another public key, {document.public_key}: {_SIGN_AGAIN}")
    if document.manifest != manifest.manifest_digest.hex:
        raise ValueError(
            f"is over another manifest of this key ({document.manifest[:12]}, not "
            f"{manifest.manifest_digest.short}), so the entry was frozen again or changed after it was signed: if that "
            f"was meant, {_SIGN_AGAIN}"
        )
    try:
        signature = strict_base64(document.signature)
    except ValueError as error:
        raise ValueError(f"is damaged: its signature is not base64; {_SIGN_AGAIN}") from error
    if len(signature) != _SIGNATURE_LENGTH:
        raise ValueError(f"is damaged: it has {len(signature)} bytes, not {_SIGNATURE_LENGTH}; {_SIGN_AGAIN}")
    return signature


def _read(path: Path) -> bytes:
    """``FileNotFoundError``: there is none; ``ValueError``, which ends a sentence: it cannot be read."""
    try:
        return read_file(path, limit_bytes=_MAX_FILE_SIZE_BYTES, follow_links=False)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ValueError(f"cannot be read: {path}: {error.strerror}; {_SIGN_AGAIN}") from error
