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
from typing import Any

from pipevault.digest import digest_bytes
from pipevault.key import Key
from pipevault.store.bundle import export_bundle
from pipevault.store.manifest import ArtifactRef, Manifest
from pipevault.store.marker import VAULT_VERSION
from pipevault.store.signing_keys import read_private_key, write_key_pair
from pipevault.store.stats import count, write_out
from pipevault.store.vault import Vault

CREATED_AT = "2026-11-22T12:00:00+00:00"
FOLDER = Path(__file__).resolve().parent.parent / "tests" / "store" / f"golden_vault_{VAULT_VERSION}"


def part(package: bytes) -> dict[str, Any]:
    """A part as the backend writes it, of one graph."""
    arguments = ["dict", '["x"]', [["tensor", "float32", [2, 16], "cpu"]]]
    return {
        "status": "frozen",
        "reason": "",
        "graphs": [
            {
                "signature": {"arguments": arguments, "autocast": None},
                "build": digest_bytes(b"build").hex,
                "package": digest_bytes(package).hex,
                "constants": None,
                "strides": [[16, 1]],
                "outputs": [["tensor"]],
                "output_tree": '[1, {"type": null, "context": null, "children_spec": []}]',
                "ties": [],
                "layout": digest_bytes(b"layout").hex,
                "machine": {"AOTI_DEVICE_KEY": "cpu"},
                "checks": {"calls": 1, "distance": 0.0, "tolerance": 1e-4},
            }
        ],
    }


def publish(vault: Vault, folder: Path, dtype: str, artifacts: dict[str, bytes]) -> Manifest:
    files = {digest_bytes(data): folder / digest_bytes(data).hex for data in artifacts.values()}
    for data in artifacts.values():
        (folder / digest_bytes(data).hex).write_bytes(data)
    refs = tuple(ArtifactRef(digest_bytes(data), len(data), name) for name, data in artifacts.items())
    parts = {name.partition("/")[0]: part(data) for name, data in artifacts.items()}
    key = Key(
        {"pipeline": {"class": "GoldenPipeline"}, "dtype": {"unet": dtype}, "call": {"height": 64, "ümlaut": "ja"}}
    )
    return vault.publish(Manifest(key, parts, refs, {"compile_s": 62.5}, CREATED_AT), files)


def main() -> None:
    if FOLDER.exists():
        sys.exit(f"{FOLDER} exists already: a golden vault is never made anew.")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        vault = Vault.open(FOLDER)
        first = publish(vault, folder, "float32", {"unet/0.pt2": b"unet in float32", "text_encoder/0.pt2": b"shared"})
        second = publish(vault, folder, "float16", {"unet/0.pt2": b"unet in float16", "text_encoder/0.pt2": b"shared"})
        vault.pin(first.key.digest, "prod")
        public = write_key_pair(folder / "signing.key", comment="golden vault")
        vault.sign(first, read_private_key(folder / "signing.key"))
        vault.record_use(first.key.digest)
        count(vault.layout, "compiled", key=first.key.digest, seconds=62.5)
        count(vault.layout, "hit", key=second.key.digest)
        write_out()
        damaged = FOLDER / "damaged"
        damaged.write_bytes(b"bad bytes")
        vault.quarantine(damaged, "It was damaged on purpose.")
        keys = [first.key.digest, second.key.digest]
        export_bundle(vault, keys, FOLDER.with_suffix(".pvb"))
    for file in vault.layout.events_dir.iterdir():
        file.rename(file.with_name("worker-1." + file.name.partition(".")[2]))
    expected = {"first": first.key.digest.hex, "second": second.key.digest.hex, "public_key": public.text}
    FOLDER.with_suffix(".json").write_text(json.dumps(expected, indent=2) + "\n", "utf-8")


if __name__ == "__main__":
    main()
