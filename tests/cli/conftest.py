"""A vault with two entries for the commands, a third that is broken, and a pipeline cache that freezes nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from helpers.command_runner import Run
from helpers.planned_entries import Planned, publish_planned
from pipevault.digest import Digest, digest_bytes
from pipevault.key import Key
from pipevault.store.manifest import ArtifactRef, Manifest
from pipevault.store.vault import Vault


def key_of(height: int) -> Key:
    return Key(
        {
            "pipeline": {"class": "diffusers.StableDiffusionPipeline"},
            "call": {"height": height, "width": 512, "batch_size": 2, "guidance": True},
            "dtype": {"unet": "float32", "vae.decoder": "float32"},
            "machine": {"type": "cpu", "threads": 1},
        }
    )


def publish(vault: Vault, height: int, files: dict[str, bytes], created_at: str, folder: Path) -> Digest:
    refs, paths = [], {}
    for name, data in files.items():
        digest = digest_bytes(data)
        paths[digest] = folder / digest.hex
        paths[digest].write_bytes(data)
        refs.append(ArtifactRef(digest, len(data), name))
    parts = {
        "unet": {"status": "frozen", "reason": "", "graphs": [{"package": refs[0].digest.hex}]},
        "vae.decoder": {"status": "eager", "reason": "it keeps state beside its arguments", "graphs": []},
    }
    manifest = Manifest(key_of(height), parts, tuple(refs), {"check": {"distance": 0.5}}, created_at)
    vault.publish(manifest, paths)
    return manifest.key.digest


@pytest.fixture
def vault(tmp_path: Path) -> Vault:
    """Two entries that share an artifact of 1000 bytes; the later one has another of 500 bytes."""
    vault = Vault.open(tmp_path / "vault")
    shared = b"s" * 1000
    publish(vault, 512, {"unet/0.pt2": shared}, "2025-01-31T12:00:00+00:00", tmp_path)
    publish(vault, 768, {"unet/0.pt2": shared, "unet/1.pt2": b"o" * 500}, "2025-02-01T12:00:00+00:00", tmp_path)
    return vault


@pytest.fixture
def small_key() -> Digest:
    return key_of(512).digest


@pytest.fixture
def large_key() -> Digest:
    return key_of(768).digest


@pytest.fixture
def planned(vault: Vault, tmp_path: Path) -> Planned:
    """Published beside the others."""
    return publish_planned(vault, tmp_path)


@pytest.fixture
def broken_key(vault: Vault) -> Digest:
    """The key of a third entry whose manifest is no JSON."""
    key = key_of(1024).digest
    path = vault.layout.manifest_file(key)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("no JSON")
    return key


@pytest.fixture
def run() -> Run:
    """Runs the command line in this process; standard output and standard error are kept apart."""
    from pipevault.cli.app import app

    def run(*arguments: str | Path, **options: object) -> Result:
        return CliRunner().invoke(app, [str(argument) for argument in arguments], **options)  # type: ignore[arg-type]

    return run
