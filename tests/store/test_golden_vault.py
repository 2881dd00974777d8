"""A vault that an earlier release wrote: every later one must read it. ``scripts/make_golden_vault.py`` made it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from store_entries import whole

from pipevault.digest import Digest
from pipevault.graphs.document import malformed_parts
from pipevault.store.bundle import import_bundle
from pipevault.store.manifest import Manifest
from pipevault.store.signature import check_signature
from pipevault.store.signing_keys import load_trusted
from pipevault.store.stats import summary
from pipevault.store.usage import last_use_s
from pipevault.store.vault import Vault
from pipevault.store.verify import verify

HERE = Path(__file__).parent
VERSIONS = sorted(path.name for path in HERE.glob("golden_vault_*") if path.is_dir())


@pytest.fixture(params=VERSIONS)
def golden(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A copy, with the permissions of a vault, which git does not keep."""
    folder = tmp_path / request.param
    shutil.copytree(HERE / request.param, folder)
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
    return folder


def expected(golden: Path) -> dict[str, str]:
    document: dict[str, str] = json.loads((HERE / f"{golden.name}.json").read_bytes())
    return document


def test_there_is_one_for_this_version() -> None:
    assert "golden_vault_1" in VERSIONS


def test_its_entries_are_whole(golden: Path) -> None:
    vault = Vault.open(golden, create=False)
    manifests = list(vault.manifests())
    keys = {expected(golden)["first"], expected(golden)["second"]}
    assert {manifest.key.digest.hex for manifest in manifests} == keys
    for manifest in manifests:
        assert isinstance(manifest, Manifest)
        assert whole(vault, manifest)
        assert not malformed_parts(manifest.parts)
        assert manifest.key.factors["pipeline"] == {"class": "GoldenPipeline"}
        assert manifest.info == {"compile_s": 62.5}
    assert list(vault.foreign_files()) == []


def test_its_pin_use_signature_and_counts(golden: Path) -> None:
    vault, first = Vault.open(golden, create=False), Digest(expected(golden)["first"])
    assert vault.pins() == {"prod": first}
    assert last_use_s(vault.layout, first) is not None
    manifest = vault.lookup(first)
    assert manifest is not None
    trusted = load_trusted([expected(golden)["public_key"]])
    assert check_signature(vault.layout, manifest, policy="require", trusted=trusted) is None
    statistics = summary(vault.layout).to_json()
    assert "62.5" in json.dumps(statistics)


def test_verify_finds_nothing_wrong(golden: Path) -> None:
    assert verify(Vault.open(golden, create=False)).bad == ()


def test_its_bundle_can_be_imported(golden: Path, tmp_path: Path) -> None:
    vault = Vault.open(tmp_path / "other")
    imported = import_bundle(vault, HERE / f"{golden.name}.pvb")
    assert {key.hex for key in imported} == {expected(golden)["first"], expected(golden)["second"]}
