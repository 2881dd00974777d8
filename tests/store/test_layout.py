"""Paths of a vault, and what a path names."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipevault.digest import digest_bytes
from pipevault.store.layout import Layout

LAYOUT = Layout(Path("/vault"))
DIGEST = digest_bytes(b"something")


def test_every_path_lies_where_the_format_says() -> None:
    digest = DIGEST.hex
    assert LAYOUT.vault_file == Path("/vault/vault.json")
    assert LAYOUT.manifest_file(DIGEST) == Path(f"/vault/entries/{digest[-16:]}/{digest}.json")
    assert LAYOUT.shelf_dir(DIGEST) == Path(f"/vault/entries/{digest[:16]}")
    assert LAYOUT.artifact_file(DIGEST) == Path(f"/vault/artifacts/{digest[:2]}/{digest}")
    assert LAYOUT.lock_file(DIGEST) == Path(f"/vault/locks/{digest}.lock")
    assert LAYOUT.holder_file(DIGEST) == Path(f"/vault/locks/{digest}.holder.json")


def test_a_path_names_its_digest_again() -> None:
    assert LAYOUT.key_of_manifest(LAYOUT.manifest_file(DIGEST)) == DIGEST
    assert LAYOUT.digest_of_artifact(LAYOUT.artifact_file(DIGEST)) == DIGEST
    assert LAYOUT.key_of_lock(LAYOUT.lock_file(DIGEST)) == DIGEST
    assert LAYOUT.key_of_lock(LAYOUT.holder_file(DIGEST)) == DIGEST


@pytest.mark.parametrize(
    "path",
    [
        LAYOUT.entries_dir / "zz" / f"{DIGEST}.json",
        LAYOUT.entries_dir / f"{DIGEST}.json",
        LAYOUT.entries_dir / DIGEST.hex[:2] / f"{DIGEST}.json",
        LAYOUT.entries_dir / DIGEST.hex[:2],
        LAYOUT.artifacts_dir / DIGEST.hex[-16:],
        LAYOUT.entries_dir / DIGEST.hex[-16:] / DIGEST.hex,
        LAYOUT.entries_dir / DIGEST.hex[-16:] / f"{DIGEST.hex.upper()}.json",
        LAYOUT.artifacts_dir / DIGEST.hex[:2] / f"{DIGEST}.json",
        LAYOUT.artifacts_dir / DIGEST.hex[:2] / DIGEST.hex[:63],
        LAYOUT.artifacts_dir / "0",
        LAYOUT.locks_dir / DIGEST.hex,
        LAYOUT.tmp_dir / "notes.txt",
        LAYOUT.quarantine_dir / "notes.txt",
        LAYOUT.root / "README",
        Path("/elsewhere") / f"{DIGEST}.json",
    ],
)
def test_other_paths_are_foreign(path: Path) -> None:
    assert not LAYOUT.owns(path)


@pytest.mark.parametrize("host", ["worker-3", "a.b/../c d", "", "ö" * 200])
def test_a_staging_folder_of_any_host_stays_in_tmp(host: str) -> None:
    folder = LAYOUT.staging_dir(host=host, pid=7, random_hex="0123456789abcdef")
    assert folder.parent == LAYOUT.tmp_dir
    assert LAYOUT.is_staging(folder)


def test_a_quarantined_file_and_its_reason_belong_to_the_vault() -> None:
    path = LAYOUT.quarantine_file(time="20250131T120000Z", random_hex="01234567", name=DIGEST.hex)
    assert LAYOUT.owns(path)
    assert LAYOUT.owns(LAYOUT.reason_file(path))
