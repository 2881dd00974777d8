"""A plan and its graphs, small, for the commands that tell the two apart."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pipevault.digest import Digest, digest_bytes
from pipevault.key import Key
from pipevault.store.manifest import ArtifactRef, Manifest
from pipevault.store.vault import Vault

CREATED_AT = "2025-01-30T12:00:00+00:00"


@dataclass(frozen=True)
class Planned:
    """The keys of a plan and of the two graphs that it needs."""

    plan: Digest
    graphs: tuple[Digest, Digest]


def publish_planned(vault: Vault, folder: Path) -> Planned:
    first, second = (_publish_graph(vault, folder, batch) for batch in (2, 4))
    factors = {
        "pipeline": {"class": "diffusers.StableDiffusionPipeline"},
        "call": {"height": 64, "width": 64},
        "dtype": {"unet": "float16"},
    }
    plan = Manifest(Key(factors), {"unet": [first.hex, second.hex]}, (), {}, CREATED_AT, (first, second))
    vault.publish(plan, {})
    return Planned(plan.key.digest, (first, second))


def _publish_graph(vault: Vault, folder: Path, batch: int) -> Digest:
    data = b"graph" * batch
    digest = digest_bytes(data)
    (folder / digest.hex).write_bytes(data)
    factors = {
        "architecture": {"class": "diffusers.UNet2DConditionModel", "parameters": 7},
        "dtype": "float16",
        "signature": {"arguments": ["tensor", "float16", [batch, 4, 8, 8], "cpu"], "autocast": None},
    }
    manifest = Manifest(
        Key(factors),
        {"unet": {"status": "frozen"}},
        (ArtifactRef(digest, len(data), "unet.pt2"),),
        {"signature_text": f"sample {batch}x4x8x8"},
        CREATED_AT,
    )
    vault.publish(manifest, {digest: folder / digest.hex})
    return manifest.key.digest
