"""Copying an entry to a vault, from a tier or from a bundle: its signatures first, then all that publishing does."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from pipevault.digest import Digest
from pipevault.store.layout import Layout
from pipevault.store.manifest import Manifest
from pipevault.store.trust.signature import copy_signatures
from pipevault.store.vault import Vault


def copy_entry(source: Layout, target: Vault, manifest: Manifest, files: Mapping[Digest, Path]) -> Manifest:
    """Publish ``manifest`` of ``source`` in ``target``, with what signs it; return the manifest that then stands there.

    The signatures go first, so that no reader meets the copy without them, and go again if the copy does not come to
    stand there. Raises like :meth:`pipevault.store.vault.Vault.publish`.
    """
    placed: list[Path] = []
    standing = None
    try:
        for path in copy_signatures(source, target.layout, manifest.key.digest):
            placed.append(path)
        standing = target.publish(manifest, files)
    finally:
        if standing is None or standing.manifest_digest != manifest.manifest_digest:
            for path in placed:
                path.unlink(missing_ok=True)
    return standing
