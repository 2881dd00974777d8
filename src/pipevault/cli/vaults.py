"""The vault that a command works on."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pipevault.settings import Settings

if TYPE_CHECKING:
    from pipevault.store.manifest import Manifest
    from pipevault.store.vault import Vault


def open_vault(dir: Path | None) -> Vault:
    """Open the vault in ``dir`` or, without it, that of the settings; it must exist."""
    from pipevault.store.vault import Vault

    return Vault.of(Settings.resolve(dir=dir))


def whole_entries(vault: Vault) -> list[Manifest]:
    """Return the entries of ``vault`` that can be read."""
    from pipevault.store.manifest import Manifest

    return [entry for entry in vault.manifests() if isinstance(entry, Manifest)]
