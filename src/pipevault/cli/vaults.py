"""The vault that a command works on."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pipevault.errors import NotAVaultError
from pipevault.settings import Settings

if TYPE_CHECKING:
    from pipevault.store.manifest import Manifest
    from pipevault.store.vault import BrokenManifest, Vault


def open_vault(dir: Path | None) -> Vault:
    from pipevault.store.vault import Vault

    return Vault.open(Settings.resolve(dir=dir).dir, create=False)


def read_entries(dir: Path | None) -> tuple[Path, list[Manifest], list[BrokenManifest]]:
    """The vault's folder and its entries, whole and broken; none where the folder is absent or empty."""
    from pipevault.store.manifest import Manifest
    from pipevault.store.vault import BrokenManifest, Vault

    root = Settings.resolve(dir=dir).dir
    try:
        vault = Vault.open(root, create=False)
    except NotAVaultError:
        if root.exists() and not (root.is_dir() and not any(root.iterdir())):
            raise
        return root, [], []
    entries = list(vault.manifests())
    whole = [entry for entry in entries if isinstance(entry, Manifest)]
    return vault.root, whole, [entry for entry in entries if isinstance(entry, BrokenManifest)]
