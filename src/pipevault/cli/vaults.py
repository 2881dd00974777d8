"""The vault that a command works on."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

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
    """Return the vault's folder and its entries, whole and broken."""
    from pipevault.store.manifest import Manifest
    from pipevault.store.vault import BrokenManifest

    vault = open_vault(dir)
    entries = list(vault.manifests())
    whole = [entry for entry in entries if isinstance(entry, Manifest)]
    return vault.root, whole, [entry for entry in entries if isinstance(entry, BrokenManifest)]


def list_rows(dir: Path | None, describe: Describe) -> tuple[Path, list[Row], list[BrokenManifest]]:
    """Like :func:`read_entries`, the whole ones as rows with the cells that ``describe`` gives."""
    from pipevault.cli.listing import read_rows

    vault = open_vault(dir)
    return vault.root, *read_rows(vault, describe)
