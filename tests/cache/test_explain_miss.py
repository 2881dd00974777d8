"""Why a plan is missing: told from the newest plans of the same pipeline, an upgrade of the toolchain first."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from pipevault.cache.search import explain_miss
from pipevault.key import Key
from pipevault.settings import Settings
from pipevault.store import tiers as tiers_module
from pipevault.store.manifest import Manifest
from pipevault.store.tiers import Tiers
from pipevault.store.vault import Vault


def plan(*, dtype: str = "float32", torch: str = "2.13.0", height: int = 512, model: str = "SD", size: int = 9) -> Key:
    factors: Mapping[str, Any] = {
        "pipeline": {"class": model},
        "architecture": {"vae.decoder": {"parameters": size, "digest": f"{dtype} {size}", "dtypes": {dtype: 2}}},
        "call": {"height": height},
        "dtype": {"vae.decoder": dtype},
        "toolchain": {"torch": torch},
    }
    return Key(factors)


@pytest.fixture
def vault(tmp_path: Path) -> Vault:
    return Vault.open(tmp_path / "vault")


def reason(vault: Vault, key: Key, *there: Key) -> str:
    for number, other in enumerate(there):
        vault.publish(Manifest(other, {}, (), {}, "2025-01-31T12:00:00+00:00"), {})
        os.utime(vault.layout.manifest_file(other.digest), times=(number + 1, number + 1))
    return explain_miss(Tiers(Settings(vault.root)), key).reason


def test_an_upgrade_comes_first_with_the_number_of_its_entries(vault: Vault) -> None:
    there = [plan(height=size) for size in (256, 512, 768)]
    text = reason(vault, plan(torch="2.15.0", height=1024), *there)
    assert text.startswith("torch 2.13.0 → 2.15.0; 3 entries are of the old one; no plan has this key")
    assert "also in call.height" in text


def test_an_upgrade_alone(vault: Vault) -> None:
    there = plan()
    text = reason(vault, plan(torch="2.15.0"), there)
    upgrade = "torch 2.13.0 → 2.15.0; 1 entry is of the old one"
    assert text == f"{upgrade}; the nearest plan is {there.digest.short}"


@pytest.mark.parametrize("there", [[], [plan(model="Other")], [plan(size=10)]])
def test_the_first_of_a_model(vault: Vault, there: list[Key]) -> None:
    assert reason(vault, plan(), *there) == "no entry for this model yet"


def test_a_dtype_is_told_as_a_dtype(vault: Vault) -> None:
    text = reason(vault, plan(dtype="float16"), plan())
    assert text.endswith("differs in dtype of vae.decoder: float32 in the vault, float16 here")


def test_no_vault(tmp_path: Path) -> None:
    settings = Settings(tmp_path / "none")
    assert explain_miss(Tiers(settings), plan()).reason == f"found no vault at {settings.dir}"


def test_a_bounded_number_of_entries_is_read(vault: Vault, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[object] = []
    original = tiers_module.read_manifest  # type: ignore[attr-defined]
    monkeypatch.setattr(tiers_module, "read_manifest", lambda *given: read.append(given[1]) or original(*given))
    monkeypatch.setattr("pipevault.cache.search._COMPARED_PLANS", 3)
    there = [plan(height=height) for height in range(10)]
    reason(vault, plan(), *there, *(plan(model=str(number)) for number in range(10)))
    assert read == [key.digest for key in reversed(there[7:])]
    read.clear()
    reason(vault, plan(model="new"))
    assert len(read) == 3


def test_a_damaged_plan_is_passed_over(vault: Vault) -> None:
    whole, damaged = plan(height=1), plan(height=2)
    reason(vault, plan(), whole, damaged)
    path = vault.layout.manifest_file(damaged.digest)
    path.chmod(0o644)
    path.write_bytes(b"{")
    assert f"the nearest, {whole.digest.short}," in reason(vault, plan(height=3))
