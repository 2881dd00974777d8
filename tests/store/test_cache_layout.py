"""What ``cache_layout.md`` shows is what the code writes."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from pipevault.digest import canonical_json, digest_bytes
from pipevault.store.locks.lock import read_holder
from pipevault.store.manifest import Manifest
from pipevault.store.marker import VAULT_VERSION
from pipevault.store.vault import Vault

DOCUMENT = Path(__file__).parents[2] / "cache_layout.md"


def example(field: str) -> Any:
    """The one JSON example that has ``field``."""
    blocks = re.findall(r"```json\n(.*?)```", DOCUMENT.read_text(encoding="utf-8"), re.DOTALL)
    [found] = [block for block in map(json.loads, blocks) if field in block]
    return found


def test_the_marker_opens_a_vault(tmp_path: Path) -> None:
    (tmp_path / "vault.json").write_bytes(canonical_json(example("pipevault_vault")))
    assert Vault.open(tmp_path, create=False).writable
    assert example("pipevault_vault")["pipevault_vault"] == VAULT_VERSION


def test_a_new_marker_has_the_fields_of_the_example(tmp_path: Path) -> None:
    Vault.open(tmp_path / "vault")
    marker = json.loads((tmp_path / "vault" / "vault.json").read_bytes())
    assert marker.keys() == example("pipevault_vault").keys()


def test_the_manifest_is_valid_and_its_digests_are_true() -> None:
    data = canonical_json(example("manifest_version"))
    manifest = Manifest.from_bytes(data, DOCUMENT)
    assert manifest.to_bytes() == data
    assert manifest.artifacts[0].digest == digest_bytes(b"graph")


def test_the_holder_note_can_be_read(tmp_path: Path) -> None:
    (tmp_path / "note").write_bytes(canonical_json(example("pid")))
    holder = read_holder(tmp_path / "note")
    assert holder is not None
    assert (holder.process.host, holder.process.pid) == ("worker-3", 4711)
    assert holder.since == "2025-01-31T12:00:00+00:00"
