"""``pipevault verify``: the report, the exit code, ``--fix`` and ``--json``."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest

from helpers.command_runner import Run
from pipevault.cli.progress import byte_bar
from pipevault.digest import Digest, digest_bytes
from pipevault.store.vault import Vault

SHARED = b"s" * 1000


@pytest.fixture
def damaged(vault: Vault) -> Path:
    """The artifact that both entries of the vault share, changed."""
    path = vault.layout.artifact_file(digest_bytes(SHARED))
    path.chmod(0o644)
    path.write_bytes(b"x" * 1000)
    return path


def test_a_sound_vault(run: Run, vault: Vault) -> None:
    result = run("verify", "--dir", vault.root)
    assert (result.exit_code, result.stdout) == (0, "")
    assert result.stderr == f"{vault.root}: 2 entries, 2 artifacts, 1.5 kB read. Nothing is wrong.\n"


def test_damage_is_told_with_the_entries_and_what_to_do(
    run: Run, vault: Vault, damaged: Path, small_key: Digest, large_key: Digest
) -> None:
    result = run("verify", "--dir", vault.root)
    assert result.exit_code == 3
    first, second = result.stdout.splitlines()
    assert first.startswith(
        f"bad artifact: Artifact {damaged.name[:12]} is damaged: the bytes of {damaged} have digest"
    )
    assert second.startswith("  2 entries cannot be used: ")
    assert small_key.short in second
    assert large_key.short in second
    assert result.stderr.endswith("1 thing is bad. Move it out of the way: pipevault verify --fix\n")
    assert damaged.exists()


def test_fix_mends_and_says_what_it_moved(run: Run, vault: Vault, damaged: Path) -> None:
    result = run("verify", "--fix", "--dir", vault.root)
    assert result.exit_code == 0
    assert result.stdout.count("  moved to ") == 3
    assert result.stderr.endswith("1 thing is bad, all out of the way now.\n")
    assert not damaged.exists()
    again = run("verify", "--dir", vault.root)
    assert again.exit_code == 0
    assert "no entry that can be read names it" in again.stdout


def test_what_fix_cannot_repair_keeps_the_exit_code(run: Run, vault: Vault) -> None:
    (vault.root / "artifacts").chmod(0o777)
    result = run("verify", "--fix", "--dir", vault.root)
    assert result.exit_code == 3
    assert "bad folder" in result.stdout
    assert "still there: fix it by hand" in result.stdout
    assert result.stderr.endswith("1 thing is bad, 1 is left.\n")


def test_a_foreign_file_is_told_and_is_no_error(run: Run, vault: Vault) -> None:
    (vault.root / "notes.txt").write_text("mine")
    result = run("verify", "--fix", "--dir", vault.root)
    assert result.exit_code == 0
    assert result.stdout == f"foreign: {vault.root}/notes.txt is not part of a vault and is never read.\n"
    assert (vault.root / "notes.txt").exists()


def test_json(run: Run, vault: Vault, damaged: Path, broken_key: Digest, small_key: Digest, large_key: Digest) -> None:
    result = run("verify", "--dir", vault.root, "--json")
    assert result.exit_code == 3
    document = json.loads(result.stdout)
    assert (document["vault"], document["code"]) == (str(vault.root), "corrupt-entry")
    assert (document["sound"], document["entries"], document["artifacts"]) == (False, 3, 2)
    assert document["broken"] == sorted(key.hex for key in (small_key, large_key, broken_key))
    assert [finding["kind"] for finding in document["bad"]] == ["manifest", "artifact"]
    fixed = json.loads(run("verify", "--fix", "--dir", vault.root, "--json").stdout)
    assert (fixed["sound"], fixed["code"]) == (True, None)
    assert all(finding["fixed"] and finding["quarantined"] for finding in fixed["bad"])


def test_no_vault(run: Run, tmp_path: Path) -> None:
    assert run("verify", "--dir", tmp_path / "none").exit_code == 1
    assert not (tmp_path / "none").exists()


def test_a_marker_that_is_none(run: Run, vault: Vault) -> None:
    vault.layout.vault_file.write_text("{}")
    result = run("verify", "--dir", vault.root)
    assert result.exit_code == 3
    assert "restore the file" in result.stderr


def test_a_trusted_key_that_is_none(run: Run, vault: Vault) -> None:
    assert run("verify", "--dir", vault.root, env={"PIPEVAULT_TRUSTED_KEYS": "nonsense"}).exit_code == 2


def test_help_has_examples(run: Run) -> None:
    assert "  pipevault verify --fix" in run("verify", "--help").stdout


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_sees_a_bar_and_others_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    for stream in (terminal := Terminal(), file := io.StringIO()):
        monkeypatch.setattr(sys, "stderr", stream)
        with byte_bar("verifying") as progress:
            progress(1_000_000, 4_000_000)
            progress(4_000_000, 4_000_000)
    assert "verifying" in terminal.getvalue()
    assert "4.0/4.0 MB" in terminal.getvalue()
    assert file.getvalue() == ""


def test_entries_that_no_load_accepts_for_lack_of_a_signature(
    run: Run, vault: Vault, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIPEVAULT_SIGNATURE", "require")
    result = run("verify", "--fix", "--dir", vault.root)
    assert result.exit_code == 3
    assert result.stdout.count("bad signature: ") == 2
    assert "has no signature" in result.stdout
    assert len(list(vault.manifests())) == 2
