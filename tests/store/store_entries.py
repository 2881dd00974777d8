"""Entries made of small files, for the store's tests."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipevault.digest import Digest, digest_bytes
from pipevault.key import Key
from pipevault.store.manifest import ArtifactRef, Manifest
from pipevault.store.vault import Vault

CREATED_AT = "2025-01-31T12:00:00+00:00"


@dataclass(frozen=True)
class Entry:
    """A manifest with the files that hold its artifacts, ready to publish."""

    manifest: Manifest
    files: Mapping[Digest, Path]

    @property
    def key(self) -> Digest:
        return self.manifest.key.digest


def make_key(name: str) -> Key:
    return Key({"pipeline": {"name": name}, "dtype": {"unet": "float32"}})


def make_entry(folder: Path, name: str, artifacts: Mapping[str, bytes], info: Any = None) -> Entry:
    """Write each artifact to a file in ``folder``; the entry's key depends on ``name`` alone."""
    folder.mkdir(parents=True, exist_ok=True)
    refs, files = [], {}
    for artifact_name, data in artifacts.items():
        digest = digest_bytes(data)
        files[digest] = folder / digest.hex
        files[digest].write_bytes(data)
        refs.append(ArtifactRef(digest, len(data), artifact_name))
    manifest = Manifest(make_key(name), {"unet": {"graphs": len(refs)}}, tuple(refs), info or {}, CREATED_AT)
    return Entry(manifest, files)


def whole(vault: Vault, manifest: Manifest) -> bool:
    """Whether the entry is there and each artifact passes every check."""
    found = vault.lookup(manifest.key.digest)
    if found is None:
        return False
    for ref in found.artifacts:
        vault.verified_path(ref)
    return True


def leftovers(vault: Vault) -> list[Path]:
    """Files and folders in ``tmp/``."""
    return sorted(vault.layout.tmp_dir.rglob("*")) if vault.layout.tmp_dir.exists() else []
