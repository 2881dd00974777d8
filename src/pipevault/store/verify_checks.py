"""What is wrong with one file of a vault. See :mod:`pipevault.store.verify`."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipevault.digest import Digest
from pipevault.errors import CorruptEntryError, NewerVaultError, UnsafeVaultError
from pipevault.store.atomic import vault_errors
from pipevault.store.layout import Layout
from pipevault.store.manifest import Manifest
from pipevault.store.read import read_manifest
from pipevault.store.signature import SIGNATURE_VERSION, signature_states
from pipevault.store.signing_keys import PublicKey
from pipevault.store.trust import check_ownership, check_root
from pipevault.store.vault import Vault

_CHUNK_SIZE_BYTES = 1 << 20


@dataclass(frozen=True)
class Fault:
    """``reason`` is a sentence. ``path`` is the file that was looked at or, if others may write it, a folder above."""

    path: Path
    reason: str
    newer: bool = False
    """A later pipevault wrote it: nothing can be said, and it is left alone."""


def vault_fault(vault: Vault) -> Fault | None:
    """Who owns the vault's folder, those above it and the marker, and who may write them."""
    try:
        check_root(vault.root, trust=vault.trust)
        check_ownership(vault.layout.vault_file, root=vault.root, trust=vault.trust)
    except UnsafeVaultError as error:
        return Fault(error.path, str(error))
    except OSError as error:
        return Fault(vault.layout.vault_file, f"{vault.layout.vault_file} cannot be looked at: {error.strerror}.")
    return None


def ownership_fault(vault: Vault, path: Path) -> Fault | None:
    """Who owns ``path`` and the folders from it up to the vault's, and who may write them. A missing file has none."""
    try:
        check_ownership(path, root=vault.root, trust=vault.trust)
    except FileNotFoundError:
        return None
    except UnsafeVaultError as error:
        return Fault(error.path, str(error))
    except OSError as error:
        return Fault(path, f"{path} cannot be looked at: {error.strerror}.")
    return None


def check_manifest(vault: Vault, key: Digest) -> Manifest | Fault | None:
    """The manifest of ``key``, or what is wrong with its bytes; ``None`` if it is gone. Owners are not looked at."""
    try:
        return read_manifest(vault.layout, key)
    except CorruptEntryError as error:
        return Fault(error.path, str(error))
    except NewerVaultError as error:
        return Fault(error.path, str(error), newer=True)


def names_artifact(vault: Vault, key: Digest, digest: Digest) -> bool:
    """Whether the manifest of ``key`` is there, sound, and names the artifact."""
    manifest = check_manifest(vault, key)
    return isinstance(manifest, Manifest) and digest in manifest.artifact_sizes


def file_size_bytes(path: Path) -> int | None:
    """``None`` if there is no such file."""
    try:
        return os.stat(path).st_size
    except OSError:
        return None


def artifact_fault(
    layout: Layout, digest: Digest, sizes_bytes: Collection[int], count: Callable[[int], None]
) -> Fault | None:
    """What is wrong with the bytes of an artifact, which are read once; ``count`` gets the size of each piece.

    ``sizes_bytes``: what the manifests say; none for an artifact that no entry names. Owners are not looked at.
    """
    path = layout.artifact_file(digest)
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            return Fault(path, f"{path} is damaged: it is no regular file.")
        if sizes_bytes and status.st_size not in sizes_bytes:
            expected = " or ".join(str(size_bytes) for size_bytes in sorted(sizes_bytes))
            return Fault(path, f"{path} is damaged: it has {status.st_size} bytes instead of {expected}.")
        hasher = hashlib.sha256()
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK_SIZE_BYTES):
                hasher.update(chunk)
                count(len(chunk))
    except FileNotFoundError:
        return Fault(path, f"{path} is missing.")
    except OSError as error:
        return Fault(path, f"{path} cannot be read: {error.strerror}.")
    if hasher.hexdigest() != digest.hex:
        return Fault(path, f"{path} is damaged: its bytes have digest {hasher.hexdigest()[:12]}, not {digest.short}.")
    return None


def signature_faults(layout: Layout, manifest: Manifest, trusted: Sequence[PublicKey]) -> Iterator[Fault]:
    """The signatures of the entry that prove nothing; those by keys that are not trusted are read, not verified."""
    for state in signature_states(layout, manifest, trusted):
        if state.state == "bad":
            yield Fault(state.path, f"{state.path}: {state.reason}.", newer=_is_newer_signature(state.path))


def artifact_places(layout: Layout) -> Iterator[Digest]:
    """The digest of whatever stands at an artifact's place, sorted."""
    return (digest for path in _in_shards(layout, layout.artifacts_dir) if (digest := layout.digest_of_artifact(path)))


def signature_places(layout: Layout) -> Iterator[tuple[Path, Digest]]:
    """Whatever stands at a signature's place, sorted, and the key that it is for."""
    for path in _in_shards(layout, layout.signatures_dir):
        if (key := layout.key_of_signature(path)) is not None:
            yield path, key


def _in_shards(layout: Layout, folder: Path) -> Iterator[Path]:
    with vault_errors(folder, "listed"):
        for shard in sorted(folder.iterdir()) if folder.is_dir() else ():
            if layout.is_shard(shard) and shard.is_dir() and not shard.is_symlink():
                yield from sorted(shard.iterdir())


def _is_newer_signature(path: Path) -> bool:
    try:
        version = json.loads(path.read_bytes())["signature_version"]
    except (OSError, ValueError, TypeError, LookupError, RecursionError):
        return False
    return isinstance(version, int) and version > SIGNATURE_VERSION
