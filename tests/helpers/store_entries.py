"""Entries made of small files, for the store's tests."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipevault.digest import Digest, digest_bytes
from pipevault.key import Key
from pipevault.store.manifest import ArtifactRef, Manifest
from pipevault.store.tiers import TierHit, Tiers
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


def make_graph_key(part: str, signature: str) -> Key:
    return Key(
        {
            "architecture": {"class": part},
            "dtype": "float32",
            "signature": {"arguments": signature, "autocast": None},
            "constants": None,
        }
    )


def make_entry(
    folder: Path,
    name: str,
    artifacts: Mapping[str, bytes],
    info: Any = None,
    *,
    key: Key | None = None,
    needs: Iterable[Digest] = (),
) -> Entry:
    """Write each artifact to a file in ``folder``; the entry's key depends on ``name`` alone, unless it is given."""
    folder.mkdir(parents=True, exist_ok=True)
    refs, files = [], {}
    for artifact_name, data in artifacts.items():
        digest = digest_bytes(data)
        files[digest] = folder / digest.hex
        files[digest].write_bytes(data)
        refs.append(ArtifactRef(digest, len(data), artifact_name))
    parts = {"unet": {"graphs": len(refs)}}
    manifest = Manifest(key or make_key(name), parts, tuple(refs), info or {}, CREATED_AT, tuple(needs))
    return Entry(manifest, files)


def make_graph(folder: Path, part: str, signature: str, data: bytes | None = None) -> Entry:
    """A graph of a part: one artifact. Graphs of one ``part`` stand on one shelf."""
    content = f"{part} {signature}".encode() * 100 if data is None else data
    return make_entry(folder, "", {f"{part}.pt2": content}, key=make_graph_key(part, signature))


def make_plan(folder: Path, name: str, *needed: Entry) -> Entry:
    """A plan that needs these entries and has no artifacts."""
    return make_entry(folder, name, {}, needs=[entry.key for entry in needed])


def read_artifacts(tiers: Tiers, found: TierHit) -> dict[str, bytes]:
    """The bytes of each artifact, by digest, as a load gets them."""
    opened = tiers.open_artifacts(found)
    try:
        return {digest: file.path.read_bytes() for digest, file in opened.items()}
    finally:
        for file in opened.values():
            file.close()


def search(tiers: Tiers, key: Digest) -> tuple[TierHit | None, list[str]]:
    """The first entry that a tier gives, and what was said on the way to it."""
    problems: list[str] = []
    for candidate in tiers.candidates(key):
        if isinstance(candidate, TierHit):
            return candidate, [*problems, *filter(None, [candidate.warning])]
        problems.append(f"tier {candidate.tier.dir}: {candidate.error}")
    return None, problems


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
