"""The vault that a command works on."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pipevault.errors import NotAVaultError
from pipevault.settings import Settings

if TYPE_CHECKING:
    from pipevault.cli.listing import Describe, Row
    from pipevault.store.manifest import Manifest
    from pipevault.store.vault import BrokenManifest, Vault


def open_vault(dir: Path | None) -> Vault:
    from pipevault.store.vault import Vault

    settings = Settings.resolve(dir=dir)
    return Vault.of(settings)


def read_entries(dir: Path | None) -> tuple[Path, list[Manifest], list[BrokenManifest]]:
    """The vault's folder and its entries, whole and broken; none where the folder is absent or empty."""
    from pipevault.store.manifest import Manifest
    from pipevault.store.vault import BrokenManifest

    vault = _open_if_there(dir)
    if vault is None:
        return Settings.resolve(dir=dir).dir, [], []
    entries = list(vault.manifests())
    whole = [entry for entry in entries if isinstance(entry, Manifest)]
    return vault.root, whole, [entry for entry in entries if isinstance(entry, BrokenManifest)]


def list_rows(dir: Path | None, describe: Describe) -> tuple[Path, list[Row], list[BrokenManifest]]:
    """Like :func:`read_entries`, the whole ones as rows with the cells that ``describe`` gives."""
    from pipevault.cli.listing import read_rows

    vault = _open_if_there(dir)
    return (Settings.resolve(dir=dir).dir, [], []) if vault is None else (vault.root, *read_rows(vault, describe))


def _open_if_there(dir: Path | None) -> Vault | None:
    """``None`` where the folder is absent or empty."""
    root = Settings.resolve(dir=dir).dir
    try:
        return open_vault(dir)
    except NotAVaultError:
        if root.exists() and not (root.is_dir() and not any(root.iterdir())):
            raise
        return None
