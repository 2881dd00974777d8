"""What is wrong with an entry or an artifact, as findings: what a load would refuse, by the same checks.

See :mod:`pipevault.store.check.verify`.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from pipevault.digest import Digest
from pipevault.errors import CorruptEntryError, NewerVaultError, SignatureError, UnsafeVaultError
from pipevault.files.opened import open_verified
from pipevault.store.check.findings import Finding
from pipevault.store.layout import Layout
from pipevault.store.manifest import Manifest
from pipevault.store.read import read_manifest
from pipevault.store.trust.signature import check_signature, signature_states
from pipevault.store.trust.signing_keys import PublicKey
from pipevault.store.trust.trust import check_ownership, check_root
from pipevault.store.vault import Vault

Use = tuple[Digest, int]
"""The key of an entry that names an artifact, and the size in bytes that it says."""


def vault_findings(vault: Vault, keys: Sequence[Digest]) -> Iterator[Finding]:
    """Who owns the vault's folder, those above it and the marker, and who may write them."""
    try:
        check_root(vault.root, trust=vault.trust)
    except UnsafeVaultError as error:
        yield Finding("folder", error.path, str(error), bad=True, keys=tuple(keys))
    else:
        yield from _owner_findings(vault, "folder", vault.layout.vault_file, tuple(keys))


def check_manifest(vault: Vault, key: Digest) -> tuple[Manifest | None, list[Finding]]:
    """The manifest, if its bytes are what was published, and what is wrong with them or its owner; nothing of one that
    is gone.
    """
    path = vault.layout.manifest_file(key)
    manifest, findings = None, []
    try:
        manifest = read_manifest(vault.layout, key)
    except CorruptEntryError as error:
        return None, [Finding("manifest", path, str(error), bad=True, keys=(key,), movable=True)]
    except NewerVaultError as error:
        findings.append(Finding("newer", path, str(error), bad=True, keys=(key,)))
    return manifest, [*findings, *_owner_findings(vault, "manifest", path, (key,))]


def artifact_findings(vault: Vault, digest: Digest, uses: Sequence[Use]) -> Iterator[Finding]:
    """What is wrong with an artifact, whose bytes are read once."""
    path = vault.layout.artifact_file(digest)
    keys, sizes_bytes = tuple(sorted(key for key, _ in uses)), {size_bytes for _, size_bytes in uses}
    try:
        # Of two sizes the digest tells which is true.
        size_bytes = sizes_bytes.pop() if len(sizes_bytes) == 1 else None
        open_verified(path, digest, size_bytes, what=f"Artifact {digest.short}").close()
    except CorruptEntryError as error:
        yield Finding("artifact", path, str(error), bad=True, keys=keys, movable=True)
        return
    yield from size_findings(vault.layout, digest, uses)
    yield from _owner_findings(vault, "artifact", path, keys)


def size_findings(layout: Layout, digest: Digest, uses: Sequence[Use]) -> Iterator[Finding]:
    """The manifests that say another size than the artifact has."""
    found_bytes = file_size_bytes(layout.artifact_file(digest))
    for key, size_bytes in uses:
        if found_bytes not in (None, size_bytes):
            path = layout.manifest_file(key)
            reason = f"{path} says that artifact {digest.short} has {size_bytes} bytes; it has {found_bytes}."
            yield Finding("manifest", path, reason, bad=True, keys=(key,), movable=True)


def signature_findings(
    layout: Layout, manifest: Manifest, key_ids: Iterable[str], trusted: Sequence[PublicKey]
) -> Iterator[Finding]:
    """The signatures that prove nothing; those by keys that are not trusted are read, not verified."""
    for state in signature_states(layout, manifest, trusted, key_ids):
        if state.newer:
            yield Finding("newer", state.path, f"{state.path}: {state.reason}.", bad=True)
        elif state.state == "bad":
            yield Finding("signature", state.path, f"{state.path}: {state.reason}.", bad=True, movable=True)


def unsigned_findings(layout: Layout, manifest: Manifest, trusted: Sequence[PublicKey]) -> Iterator[Finding]:
    """Whether no load accepts the entry where signatures are required."""
    try:
        check_signature(layout, manifest, policy="require", trusted=trusted)
    except SignatureError as error:
        key = manifest.key.digest
        yield Finding("signature", layout.manifest_file(key), str(error), bad=True, keys=(key,))


def file_size_bytes(path: Path) -> int | None:
    """``None`` if there is no such file."""
    try:
        return os.stat(path).st_size
    except OSError:
        return None


def _owner_findings(vault: Vault, kind: str, path: Path, keys: tuple[Digest, ...]) -> Iterator[Finding]:
    """Who owns ``path`` and the folders from it up to the vault's, and who may write them. A missing file has none.

    None is moved: the file may be whole, and who is trusted is a matter of settings.
    """
    try:
        check_ownership(path, root=vault.root, trust=vault.trust)
    except FileNotFoundError:
        return
    except UnsafeVaultError as error:
        yield Finding(kind if error.path == path else "folder", error.path, str(error), bad=True, keys=keys)
    except OSError as error:
        yield Finding(kind, path, f"{path} cannot be looked at: {error.strerror}.", bad=True, keys=keys)
