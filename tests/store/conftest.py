"""A vault, and an entry to put into it."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from helpers.store_entries import Entry, make_entry
from pipevault.store.vault import Vault


@pytest.fixture
def vault(tmp_path: Path) -> Vault:
    return Vault.open(tmp_path / "vault")


@pytest.fixture
def entry(tmp_path: Path) -> Entry:
    return make_entry(tmp_path / "source", "a", {"unet/0.pt2": b"unet" * 1000, "vae.decoder/0.pt2": b"vae" * 999})


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder below which any user may look (pytest's own is closed to others)."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)
