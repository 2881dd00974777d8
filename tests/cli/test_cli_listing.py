"""``ls`` of a large vault: rows are remembered, and what is remembered is never out of date."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from helpers.command_runner import Run
from pipevault.cli import listing
from pipevault.digest import Digest
from pipevault.store import inventory
from pipevault.store.vault import Vault


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Digest]:
    """The keys of the manifests that were parsed, in a vault that counts as large."""
    monkeypatch.setattr(listing, "REMEMBERED_FROM", 1)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    keys: list[Digest] = []
    parse = inventory.read_published

    def counting(layout: object, key: Digest) -> object:
        keys.append(key)
        return parse(layout, key)  # type: ignore[arg-type]

    monkeypatch.setattr(inventory, "read_published", counting)
    return keys


def remembered(folder: Path) -> list[Path]:
    return sorted((folder / "cache").rglob("*.json"))


def test_a_second_listing_parses_nothing_and_says_the_same(
    run: Run, vault: Vault, reads: list[Digest], small_key: Digest, large_key: Digest
) -> None:
    first = run("ls", "--dir", vault.root)
    assert sorted(reads) == sorted([small_key, large_key])
    second = run("ls", "--dir", vault.root)
    assert len(reads) == 2
    assert (second.stdout, second.stderr) == (first.stdout, first.stderr)
    assert "2 entries, 1.5 kB" in second.stderr


def test_a_changed_manifest_is_read_again(
    run: Run, vault: Vault, reads: list[Digest], small_key: Digest, large_key: Digest
) -> None:
    run("ls", "--dir", vault.root)
    path = vault.layout.manifest_file(small_key)
    status, data = path.stat(), path.read_bytes()
    path.write_bytes(data.replace(b"512", b"513"))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    result = run("ls", "--dir", vault.root)
    assert f"{small_key.short} cannot be used" in result.stderr
    assert small_key.short not in result.stdout


def test_a_removed_entry_is_gone(run: Run, vault: Vault, reads: list[Digest], small_key: Digest) -> None:
    run("ls", "--dir", vault.root)
    vault.layout.manifest_file(small_key).unlink()
    assert small_key.short not in run("ls", "--dir", vault.root).stdout


@pytest.mark.parametrize(
    "content", [b"", b"[]", b'{"version":"0","rows":{}}', b'{"version":1}', b"[" * 100_000, b"\xff"]
)
def test_what_cannot_be_read_is_replaced(
    run: Run, vault: Vault, reads: list[Digest], tmp_path: Path, content: bytes
) -> None:
    first = run("ls", "--dir", vault.root)
    [file] = remembered(tmp_path)
    file.write_bytes(content)
    assert run("ls", "--dir", vault.root).stdout == first.stdout
    assert len(reads) == 4
    assert file.read_bytes() != content


def test_a_cache_that_cannot_be_written_does_no_harm(
    run: Run, vault: Vault, reads: list[Digest], tmp_path: Path
) -> None:
    (tmp_path / "cache").write_text("a file")
    assert run("ls", "--dir", vault.root).exit_code == 0


def test_a_small_vault_is_not_remembered(
    run: Run, vault: Vault, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    run("ls", "--dir", vault.root)
    assert remembered(tmp_path) == []
