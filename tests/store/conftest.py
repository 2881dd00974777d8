"""A vault, and an entry to put into it."""

from __future__ import annotations

from pathlib import Path

import pytest
from store_entries import Entry, make_entry

from pipevault.store.vault import Vault


@pytest.fixture
def vault(tmp_path: Path) -> Vault:
    return Vault.open(tmp_path / "vault")


@pytest.fixture
def entry(tmp_path: Path) -> Entry:
    return make_entry(tmp_path / "source", "a", {"unet/0.pt2": b"unet" * 1000, "vae.decoder/0.pt2": b"vae" * 999})
