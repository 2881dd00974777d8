"""Moving what is bad to quarantine. See :mod:`pipevault.store.verify`."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import replace

from pipevault.digest import Digest
from pipevault.store.layout import Layout
from pipevault.store.manifest import Manifest
from pipevault.store.signing_keys import PublicKey
from pipevault.store.vault import Vault
from pipevault.store.verify_checks import (
    Fault,
    artifact_fault,
    check_manifest,
    file_size_bytes,
    names_artifact,
    ownership_fault,
    signature_faults,
)
from pipevault.store.verify_findings import Finding


def mend(vault: Vault, finding: Finding, trusted: Sequence[PublicKey]) -> Finding:
    """Move what is bad, unless it was mended meanwhile; manifests go before the artifact that they name."""
    reason = _reason_now(vault, finding, trusted)
    if reason is None:
        return replace(finding, mended=True)
    going = [finding.path]
    if finding.kind == "artifact":
        digest = Digest(finding.path.name)
        manifests = [vault.layout.manifest_file(key) for key in finding.keys if names_artifact(vault, key, digest)]
        going = [*manifests, finding.path]
    moved = [vault.quarantine(path, reason) for path in going]
    return replace(
        finding,
        quarantined=tuple(path for path in moved if path is not None),
        mended=not any(os.path.lexists(path) for path in going),
    )


def _reason_now(vault: Vault, finding: Finding, trusted: Sequence[PublicKey]) -> str | None:
    """Why the file is bad, seen now; ``None`` if it no longer is."""
    layout, path = vault.layout, finding.path
    faults: list[Fault | None] = []
    if finding.kind == "artifact":
        found = [check_manifest(vault, key) for key in finding.keys]
        digest = Digest(path.name)
        sizes_bytes = {
            size_bytes
            for manifest in found
            if isinstance(manifest, Manifest) and (size_bytes := manifest.artifact_sizes.get(digest)) is not None
        }
        if finding.keys and not sizes_bytes and not os.path.lexists(path):
            return None  # it went with its entries
        faults = [artifact_fault(layout, digest, sizes_bytes, lambda _: None), ownership_fault(vault, path)]
    elif finding.kind == "manifest":
        [key] = finding.keys
        manifest = check_manifest(vault, key)
        if isinstance(manifest, Manifest):
            faults = [ownership_fault(vault, path), *_size_faults(layout, manifest)]
        else:
            faults = [manifest]
    elif (signed := layout.key_of_signature(path)) is not None:
        manifest = check_manifest(vault, signed)
        if isinstance(manifest, Manifest):
            faults = [fault for fault in signature_faults(layout, manifest, trusted) if fault.path == path]
    return next((fault.reason for fault in faults if fault is not None and not fault.newer), None)


def _size_faults(layout: Layout, manifest: Manifest) -> Iterator[Fault]:
    """Artifacts that are there with another size than the manifest says."""
    for digest, size_bytes in manifest.artifact_sizes.items():
        found_bytes = file_size_bytes(layout.artifact_file(digest))
        if found_bytes not in (None, size_bytes):
            path = layout.manifest_file(manifest.key.digest)
            yield Fault(path, f"{path} says that artifact {digest.short} has {size_bytes} bytes; it has {found_bytes}.")
