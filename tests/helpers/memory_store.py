"""A store that is no folder: entries as objects in a dict, as an object store has them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

from pipevault.digest import Digest
from pipevault.errors import CorruptEntryError, NotAVaultError, VaultError
from pipevault.files.opened import OpenedFile
from pipevault.settings import Tier
from pipevault.store.manifest import Manifest
from pipevault.store.places import signature_files
from pipevault.store.tiers.interface import EntryStore, Refused, TierHit
from pipevault.store.vault import Vault

Objects = dict[str, bytes]
"""By the path that each would have in a vault."""


def objects_of(root: Path) -> Objects:
    """The entries of a vault, their artifacts and signatures."""
    folders = (root / name for name in ("entries", "artifacts", "signatures"))
    files = (path for folder in folders for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(root)): path.read_bytes() for path in files}


class MemoryStore(EntryStore):
    """Objects, fetched to the vault ``fetched`` when they are asked for. ``None`` for objects: it cannot be reached."""

    def __init__(self, tier: Tier, objects: Objects | None, fetched: Path) -> None:
        super().__init__(tier)
        self.objects = objects
        self.vault = Vault.open(fetched)

    def look(self, key: Digest, known: TierHit | None = None) -> TierHit | Refused | None:
        name = self._name(self.vault.layout.manifest_file(key))
        if name not in self._reached():
            return None
        stamp = hashlib.sha256(self._reached()[name]).hexdigest()
        if known is not None and known.stamp == stamp:
            return known
        self._fetch(name)
        for name in self._reached():
            if self.vault.layout.key_of_signature(self.vault.root / name) == key:
                self._fetch(name)
        try:
            manifest = self.vault.lookup(key)
        except VaultError as error:
            return Refused(self.tier, error, self.vault)
        return None if manifest is None else TierHit(self.vault, manifest, self.tier, self.tier, stamp=stamp)

    def keys(self, shelf: Digest) -> list[Digest]:
        layout = self.vault.layout
        paths = (layout.root / name for name in self._reached())
        keys = (layout.key_of_manifest(path) for path in paths if path.parent == layout.shelf_dir(shelf))
        return sorted(key for key in keys if key is not None)

    def open(self, found: TierHit) -> dict[str, OpenedFile]:
        for digest in found.manifest.artifact_sizes:
            path = self.vault.layout.artifact_file(digest)
            if self._name(path) not in self._reached():
                raise CorruptEntryError(f"{digest.short} is missing in {self.tier.dir}.", path)
            self._fetch(self._name(path))
        return super().open(found)

    def is_writable(self) -> bool:
        self._reached()
        return True

    def accepts(self, found: TierHit) -> bool:
        return True

    def publish(self, manifest: Manifest, files: Mapping[Digest, Path], source: TierHit | None = None) -> TierHit:
        layout, key = self.vault.layout, manifest.key.digest
        for path in signature_files(source.vault.layout, key) if source else ():
            self._reached()[self._name(layout.signatures_dir / key.hex[:2] / path.name)] = path.read_bytes()
        for digest, path in files.items():
            self._reached()[self._name(layout.artifact_file(digest))] = path.read_bytes()
        self._reached().setdefault(self._name(layout.manifest_file(key)), manifest.to_bytes())
        found = self.look(key)
        assert isinstance(found, TierHit)
        return found

    def _reached(self) -> Objects:
        if self.objects is None:
            raise NotAVaultError(f"{self.tier.dir} cannot be reached.", self.tier.dir)
        return self.objects

    def _fetch(self, name: str) -> None:
        path = self.vault.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        path.write_bytes(self._reached()[name])

    def _name(self, path: Path) -> str:
        return str(path.relative_to(self.vault.root))
