#!/usr/bin/env python
"""Makes ``tests/store/golden_vault_<version>``: a small vault as this release writes it, which later ones must read.

Run once for each version of a format, never to make a failing test pass. The artifacts are not code. The private key
of its signature is thrown away.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import torch

from pipevault.digest import digest_bytes
from pipevault.graphs.frozen import GraphDocument
from pipevault.graphs.program import Results
from pipevault.graphs.signature import describe_call
from pipevault.key import Key
from pipevault.store.bundle import export_bundle
from pipevault.store.manifest import ArtifactRef, Manifest
from pipevault.store.marker import VAULT_VERSION
from pipevault.store.stats.summary import count
from pipevault.store.trust.signing_keys import read_private_key, write_key_pair
from pipevault.store.vault import Vault

CREATED_AT = "2026-11-22T12:00:00+00:00"
FOLDER = Path(__file__).resolve().parent.parent / "tests" / "store" / f"golden_vault_{VAULT_VERSION}"


def graph(vault: Vault, folder: Path, width: int) -> Manifest:
    """A graph of the unet, published: an artifact and no needs."""
    signature = describe_call((), {"x": torch.zeros(2, width), "scale": 0.5}).signature
    library = f"unet at width {width}".encode()
    digest = digest_bytes(library)
    (folder / digest.hex).write_bytes(library)
    key = Key(
        {
            "architecture": {"class": "golden.UNet", "digest": digest_bytes(b"architecture").hex},
            "dtype": "float32",
            "signature": signature.to_json(),
        }
    )
    document = GraphDocument(
        signature=signature,
        build=digest_bytes(b"build").hex,
        library=digest.hex,
        constants=None,
        beside={},
        inputs=((0, ()), (1, (width, 1))),
        results=Results((("tensor",), ("leaf", 0)), "[1, {}]"),
        ties=(("first.weight", "second.weight"),),
        layout=digest_bytes(b"layout").hex,
        origins=(("freqs", ("rope", "freqs"), digest_bytes(b"freqs").hex),),
        machine={"AOTI_MACHINE": "golden"},
        checks={"calls": 2, "distance": 1e-6, "tolerance": 1e-3},
    )
    parts = {"golden.UNet": {"status": "frozen", "reason": "", "graphs": [document.to_json()]}}
    info = {"compile_s": 62.5, "signature_text": str(signature)}
    ref = ArtifactRef(digest, len(library), "graph.so")
    return vault.publish(Manifest(key, parts, (ref,), info, CREATED_AT), {digest: folder / digest.hex})


def plan(vault: Vault, graphs: list[Manifest]) -> Manifest:
    """What a pipeline needs, published: no artifacts."""
    key = Key(
        {
            "pipeline": {"class": "golden.Pipeline"},
            "architecture": {"unet": {"class": "golden.UNet"}},
            "dtype": {"unet": "float32"},
            "call": {"height": 64, "ümlaut": "ja"},
        }
    )
    keys = tuple(manifest.key.digest for manifest in graphs)
    part = {"status": "frozen", "reason": "", "graphs": [key.hex for key in keys], "left_eager": False}
    return vault.publish(Manifest(key, {"unet": part}, (), {"compile_s": 62.5}, CREATED_AT, keys), {})


def main() -> None:
    if FOLDER.exists():
        sys.exit(f"{FOLDER} exists already: a golden vault is never made anew.")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        vault = Vault.open(FOLDER)
        graphs = [graph(vault, folder, width) for width in (16, 32)]
        planned = plan(vault, graphs)
        key = planned.key.digest
        vault.pin(key, "prod")
        public = write_key_pair(folder / "signing.key", comment="golden vault")
        private = read_private_key(folder / "signing.key")
        for manifest in (*graphs, planned):
            vault.sign(manifest, private)
        vault.record_use(key)
        count(vault.layout, "compiled", key=key, seconds=62.5)
        count(vault.layout, "hit", key=graphs[0].key.digest)
        damaged = FOLDER / "damaged"
        damaged.write_bytes(b"bad bytes")
        vault.quarantine(damaged, "It was damaged on purpose.")
        export_bundle(vault, [key], FOLDER.with_suffix(".pvb"))
    for file in vault.layout.events_dir.iterdir():
        file.rename(file.with_name("worker-1." + file.name.partition(".")[2]))
    expected = {
        "plan": key.hex,
        "graphs": sorted(manifest.key.digest.hex for manifest in graphs),
        "shelf": graphs[0].key.shelf.hex,
        "public_key": public.text,
    }
    FOLDER.with_suffix(".json").write_text(json.dumps(expected, indent=2) + "\n", "utf-8")


if __name__ == "__main__":
    main()
