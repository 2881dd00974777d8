"""Folders as stores of entries: the vault that this user writes, and those that others made."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from pipevault.digest import Digest
from pipevault.errors import CorruptEntryError, NewerVaultError, NotAVaultError, VaultError, VaultFullError
from pipevault.settings import Settings, Tier
from pipevault.store.inventory import newest_keys
from pipevault.store.layout import SYSTEM_NAMES, Layout
from pipevault.store.manifest import Manifest
from pipevault.store.marker import ensure_vault
from pipevault.store.read import read_manifest
from pipevault.store.tiers.interface import EntryStore, Refused, TierHit
from pipevault.store.trust.owners import trust_of
from pipevault.store.vault import Vault


class Folder(EntryStore):
    """A vault that must be there, and is written if it can be. Once opened it is kept."""

    def __init__(self, tier: Tier, settings: Settings) -> None:
        super().__init__(tier)
        self._settings = settings
        self._vault: Vault | None = None

    def look(self, key: Digest, known: TierHit | None = None) -> TierHit | Refused | None:
        vault = self._open()
        if vault is None:
            return None
        if known is not None and known.vault == vault and vault.stands(key, known.stamp):
            return known
        try:
            read = vault.read_entry(key)
            if read is None:
                self._check_there(vault)
                return None
        except VaultError as error:
            return Refused(self.tier, error, vault)
        return TierHit(vault, read.manifest, self.tier, self.tier, unowned=read.unowned, stamp=read.stamp)

    def keys(self, shelf: Digest) -> list[Digest]:
        vault = self._open()
        keys = vault.shelf(shelf) if vault is not None else []
        if vault is not None and not keys:
            self._check_there(vault)
        return keys

    def newest(self, count: int, shelf: Digest | None = None) -> Iterator[Manifest]:
        if (vault := self._open()) is None:
            return iter(())
        read = (_readable(vault.layout, key) for key in newest_keys(vault.layout, count, shelf))
        return (manifest for manifest in read if manifest is not None)

    def is_writable(self) -> bool:
        vault = self._open()
        return vault is not None and vault.writable

    def accepts(self, found: TierHit) -> bool:
        vault = self._for_copies()
        if vault is None or not vault.writable:
            return False
        size_bytes, limit = found.manifest.size_bytes, self._settings.max_size
        if limit is not None and size_bytes > limit:
            raise VaultFullError(
                f"{found.key.short} is not copied to {vault.root}: its {size_bytes} bytes exceed max_size, {limit}.",
                vault.root,
            )
        return True

    def publish(self, manifest: Manifest, files: Mapping[Digest, Path], source: TierHit | None = None) -> TierHit:
        if (vault := self._for_new()) is None:
            return super().publish(manifest, files, source)
        if source is None:
            return TierHit(vault, vault.publish(manifest, files), self.tier, self.tier)
        from pipevault.store.copying import copy_entry

        try:
            with vault.lock(source.key, timeout_s=0):
                standing = copy_entry(source.vault.layout, vault, manifest, files)
        except CorruptEntryError as error:
            raise CorruptEntryError(
                f"An artifact is damaged: the bytes of {error.path} are not what its manifest says.", error.path
            ) from error
        return TierHit(vault, standing, self.tier, source.origin)

    def limit_size(self, found: TierHit) -> tuple[str, ...]:
        return _limit_size(found, self._settings.max_size)

    def forget(self) -> None:
        self._vault = None

    def _open(self) -> Vault | None:
        if self._vault is None:
            self._vault = Vault.open(self.tier.dir, create=False, trust=trust_of(self._settings))
        return self._vault

    def _for_new(self) -> Vault | None:
        return self._open()

    def _for_copies(self) -> Vault | None:
        return self._vault

    def _check_there(self, vault: Vault) -> None:
        """Raise if the vault is gone: a mount that went away has no entries and no shelves either."""
        ensure_vault(vault.layout, create=False)


class OwnFolder(Folder):
    """The vault of ``Settings.dir``. ``own`` opens it: with ``True`` it makes one where none is, else it may give
    ``None``.
    """

    def __init__(self, tier: Tier, settings: Settings, own: Callable[[bool], Vault | None]) -> None:
        super().__init__(tier, settings)
        self._own = own

    def _open(self) -> Vault | None:
        return self._own(False)

    def _for_new(self) -> Vault | None:
        return self._own(True)

    def _for_copies(self) -> Vault | None:
        try:
            return self._own(True)
        except VaultError:  # the search for an entry has said so
            return None

    def _check_there(self, vault: Vault) -> None:
        """A vault that is gone is made again."""


def open_vault(settings: Settings, *, create: bool) -> Vault | None:
    """Open the vault of ``settings.dir``; ``None`` if the folder is absent or empty and none should be made.

    Raises like :meth:`Vault.open`.
    """
    try:
        return Vault.of(settings, create=create)
    except NotAVaultError:
        if create:
            raise
        if _is_unmade(settings.dir):
            return None
        # Another process may have made it between the two looks.
        return Vault.of(settings)


def _is_unmade(root: Path) -> bool:
    """Tell whether nothing is there, or only what a creation that has not come to its end has made."""
    try:
        return set(os.listdir(root)) <= SYSTEM_NAMES | {Layout(root).tmp_dir.name}
    except FileNotFoundError:
        return True
    except NotADirectoryError:
        return False


def _readable(layout: Layout, key: Digest) -> Manifest | None:
    try:
        return read_manifest(layout, key)
    except (CorruptEntryError, NewerVaultError):  # whoever lists the vault sees it
        return None


def _limit_size(found: TierHit, max_size: int | None) -> tuple[str, ...]:
    if max_size is None:
        return ()
    from pipevault.store.retention.prune import enforce_max_size

    report = enforce_max_size(found.vault, found.key, max_size=max_size)
    return () if report is None else report.problems
