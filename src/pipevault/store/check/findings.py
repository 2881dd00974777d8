"""Findings: what is not as it should be in a vault, by the same checks as those of a load.

See :mod:`pipevault.store.check.verify`.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pipevault.digest import Digest
from pipevault.errors import CorruptEntryError, NewerVaultError, PinError, SignatureError, UnsafeVaultError, VaultError
from pipevault.files.opened import open_verified
from pipevault.store.layout import Layout
from pipevault.store.manifest import Manifest, read_manifest
from pipevault.store.places import iter_foreign
from pipevault.store.retention.leftovers import find_leftovers
from pipevault.store.retention.pins import pin_names, read_pin
from pipevault.store.retention.removal import ORPHAN_MIN_AGE_S
from pipevault.store.trust.owners import check_ownership, check_root
from pipevault.store.trust.signature import check_signature, signature_states
from pipevault.store.trust.signing_keys import PublicKey
from pipevault.store.vault import Vault

Use = tuple[Digest, int]
"""The key of an entry that names an artifact, and the size in bytes that it says."""


@dataclass(frozen=True)
class Finding:
    """One thing that is not as it should be.

    ``kind``: ``folder``, ``manifest``, ``artifact``, ``newer`` (of a later pipevault), ``pin``, ``signature``,
    ``orphan``, ``foreign`` or ``staging``. ``reason`` is a sentence. ``keys``: the entries that cannot be used because
    of it. ``movable``: quarantine helps. ``quarantined``: what was moved, under its new name: the file, and the
    manifests of ``keys``.
    """

    kind: str
    path: Path
    reason: str
    bad: bool = True
    keys: tuple[Digest, ...] = ()
    movable: bool = False
    quarantined: tuple[Path, ...] = ()
    mended: bool = False


def vault_findings(vault: Vault, keys: Sequence[Digest]) -> Iterator[Finding]:
    """Check who owns the vault's folder, those above it and the marker, and who may write them."""
    try:
        check_root(vault.root, trust=vault.trust)
    except UnsafeVaultError as error:
        yield Finding("folder", error.path, str(error), keys=tuple(keys))
    else:
        yield from _owner_findings(vault, "folder", vault.layout.vault_file, tuple(keys))


def check_manifest(vault: Vault, key: Digest) -> tuple[Manifest | None, list[Finding]]:
    """Return the manifest, if its bytes are what was published, and what is wrong with them or its owner; nothing of
    one that is gone.
    """
    path = vault.layout.manifest_file(key)
    manifest, findings = None, []
    try:
        manifest = read_manifest(vault.layout, key)
    except CorruptEntryError as error:
        return None, [Finding("manifest", path, str(error), keys=(key,), movable=True)]
    except NewerVaultError as error:
        findings.append(Finding("newer", path, str(error), keys=(key,)))
    return manifest, [*findings, *_owner_findings(vault, "manifest", path, (key,))]


def artifact_findings(vault: Vault, digest: Digest, uses: Sequence[Use]) -> Iterator[Finding]:
    """Check an artifact, whose bytes are read once."""
    path = vault.layout.artifact_file(digest)
    keys, sizes_bytes = tuple(sorted(key for key, _ in uses)), {size_bytes for _, size_bytes in uses}
    try:
        # Of two sizes the digest tells which is true.
        size_bytes = sizes_bytes.pop() if len(sizes_bytes) == 1 else None
        open_verified(path, digest, size_bytes, what=f"Artifact {digest.short}").close()
    except CorruptEntryError as error:
        yield Finding("artifact", path, str(error), keys=keys, movable=True)
        return
    yield from size_findings(vault.layout, digest, uses)
    yield from _owner_findings(vault, "artifact", path, keys)


def size_findings(layout: Layout, digest: Digest, uses: Sequence[Use]) -> Iterator[Finding]:
    """Find the manifests that say another size than the artifact has."""
    found_bytes = file_size_bytes(layout.artifact_file(digest))
    for key, size_bytes in uses:
        if found_bytes not in (None, size_bytes):
            path = layout.manifest_file(key)
            reason = f"{path} says that artifact {digest.short} has {size_bytes} bytes; it has {found_bytes}."
            yield Finding("manifest", path, reason, keys=(key,), movable=True)


def signature_findings(
    layout: Layout, manifest: Manifest, key_ids: Iterable[str], trusted: Sequence[PublicKey]
) -> Iterator[Finding]:
    """Find the signatures that prove nothing; those by keys that are not trusted are read, not verified."""
    for state in signature_states(layout, manifest, trusted, key_ids):
        if state.state == "bad":
            kind = "newer" if state.newer else "signature"
            yield Finding(kind, state.path, f"{state.path}: {state.reason}.", movable=not state.newer)


def unsigned_findings(layout: Layout, manifest: Manifest, trusted: Sequence[PublicKey]) -> Iterator[Finding]:
    """Find an entry that no load accepts where signatures are required."""
    try:
        check_signature(layout, manifest, policy="require", trusted=trusted)
    except SignatureError as error:
        key = manifest.key.digest
        yield Finding("signature", layout.manifest_file(key), str(error), keys=(key,))


def notable_findings(
    layout: Layout, unnamed: Iterable[Digest], signatures: Mapping[Digest, Sequence[Path]]
) -> Iterator[Finding]:
    """Find what stands next to the entries: ``unnamed`` artifacts, pins, those of the ``signatures`` whose entry is
    gone, foreign files and what dead processes left. Only a pin can be bad.
    """
    for path in map(layout.artifact_file, unnamed):
        try:
            age_s = time.time() - os.lstat(path).st_mtime
        except FileNotFoundError:
            continue
        what = "it is young, so an entry that names it may be about to be published"
        if age_s >= ORPHAN_MIN_AGE_S:
            what = "remove it: pipevault prune"
        yield Finding("orphan", path, f"{path}: no entry that can be read names it; {what}.", bad=False)
    yield from _pin_findings(layout)
    for key, paths in signatures.items():
        if not os.path.lexists(layout.manifest_file(key)):
            for path in paths:
                yield Finding("signature", path, f"{path} is for an entry that is gone.", bad=False)
    for path in iter_foreign(layout):
        yield Finding("foreign", path, f"{path} is not part of a vault and is never read.", bad=False)
    for item in find_leftovers(layout):
        if item.path.is_relative_to(layout.tmp_dir):
            yield Finding("staging", item.path, f"{item.path}: {item.reason}. Remove it: pipevault prune", bad=False)


def merged(findings: Iterable[Finding]) -> list[Finding]:
    """Return one finding for each file: the first of a kind, with the keys of all; no orphan is bad, too."""
    first: dict[tuple[str, Path], Finding] = {}
    keys: dict[tuple[str, Path], set[Digest]] = {}
    for finding in findings:
        place = (finding.kind, finding.path)
        if finding.kind != "orphan" or ("artifact", finding.path) not in first:
            first.setdefault(place, finding)
            keys.setdefault(place, set()).update(finding.keys)
    return [replace(finding, keys=tuple(sorted(keys[place]))) for place, finding in first.items()]


def file_size_bytes(path: Path) -> int | None:
    """Return the size of a file; ``None`` if there is none."""
    try:
        return os.stat(path).st_size
    except OSError:
        return None


def _pin_findings(layout: Layout) -> Iterator[Finding]:
    for name in pin_names(layout):
        path = layout.pin_file(name)
        try:
            key = read_pin(layout, name)
        except (PinError, VaultError) as error:
            # Not moved: a pin that is gone keeps nothing, and nobody but its maker knows what it was for.
            yield Finding("pin", path, str(error))
            continue
        if key is not None and not os.path.lexists(layout.manifest_file(key)):
            advice = f"freeze it again, or pipevault unpin {name}"
            yield Finding("pin", path, f"The pin {name} is for {key.short}, which has no entry: {advice}", bad=False)


def _owner_findings(vault: Vault, kind: str, path: Path, keys: tuple[Digest, ...]) -> Iterator[Finding]:
    """Check who owns ``path`` and the folders from it up to the vault's, and who may write them, if it exists.

    Nothing is moved: the file may be whole, and who is trusted is a matter of settings.
    """
    try:
        check_ownership(path, root=vault.root, trust=vault.trust)
    except FileNotFoundError:
        return
    except UnsafeVaultError as error:
        yield Finding(kind if error.path == path else "folder", error.path, str(error), keys=keys)
    except OSError as error:
        yield Finding(kind, path, f"{path} cannot be looked at: {error.strerror}.", keys=keys)
