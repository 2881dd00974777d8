"""``pipevault export`` and ``import``: one file from one vault to another, and every bad input."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from helpers.command_runner import Run
from helpers.planned_entries import Planned
from pipevault.digest import Digest
from pipevault.store.vault import Vault


@pytest.fixture
def bundle(run: Run, vault: Vault, tmp_path: Path) -> Path:
    path = tmp_path / "all.zip"
    assert run("export", "--all", "-o", path, "--dir", vault.root).exit_code == 0
    return path


class TestExport:
    def test_one_key(self, run: Run, vault: Vault, tmp_path: Path, small_key: Digest) -> None:
        path = tmp_path / "one.zip"
        result = run("export", small_key.hex[:8], "-o", path, "--dir", vault.root)
        assert (result.exit_code, result.stdout) == (0, f"Exported {small_key.short}\n")
        assert result.stderr.startswith(f"{path}: 1 entry, 1 artifact, 0 signatures, ")

    def test_all_and_json(self, run: Run, vault: Vault, tmp_path: Path, small_key: Digest, large_key: Digest) -> None:
        path = tmp_path / "all.zip"
        document = json.loads(run("export", "--all", "--json", "-o", path, "--dir", vault.root).stdout)
        assert document == {
            "bundle": str(path),
            "keys": sorted([small_key.hex, large_key.hex]),
            "artifacts": 2,
            "signatures": 0,
            "size_bytes": path.stat().st_size,
        }

    def test_the_same_bytes_again(self, run: Run, vault: Vault, bundle: Path, tmp_path: Path) -> None:
        run("export", "--all", "-o", tmp_path / "again.zip", "--dir", vault.root)
        assert (tmp_path / "again.zip").read_bytes() == bundle.read_bytes()

    def test_neither_keys_nor_all(self, run: Run, vault: Vault, tmp_path: Path) -> None:
        assert run("export", "-o", tmp_path / "x.zip", "--dir", vault.root).exit_code == 2

    def test_keys_and_all(self, run: Run, vault: Vault, tmp_path: Path, small_key: Digest) -> None:
        assert run("export", small_key.hex, "--all", "-o", tmp_path / "x.zip", "--dir", vault.root).exit_code == 2

    def test_no_output(self, run: Run, vault: Vault, small_key: Digest) -> None:
        assert run("export", small_key.hex, "--dir", vault.root).exit_code == 2

    def test_an_unknown_key(self, run: Run, vault: Vault, tmp_path: Path) -> None:
        result = run("export", "0123456789", "-o", tmp_path / "x.zip", "--dir", vault.root)
        assert result.exit_code == 1
        assert "0123456789" in result.stderr

    def test_an_ambiguous_key_lists_the_candidates(self, run: Run, vault: Vault, tmp_path: Path) -> None:
        keys = [entry.stem for entry in vault.layout.entries_dir.rglob("*.json")]
        twin = keys[0][:2] + ("0" if keys[0][2] != "0" else "1") * 46 + keys[0][-16:]
        vault.layout.manifest_file(Digest(twin)).write_bytes(b"{}")
        result = run("export", keys[0][:2], "-o", tmp_path / "x.zip", "--dir", vault.root)
        assert result.exit_code == 1
        assert keys[0][:12] in result.stderr
        assert twin[:12] in result.stderr

    def test_no_entries(self, run: Run, tmp_path: Path) -> None:
        vault = Vault.open(tmp_path / "empty")
        result = run("export", "--all", "-o", tmp_path / "x.zip", "--dir", vault.root)
        assert result.exit_code == 1
        assert "holds no entries" in result.stderr
        assert not (tmp_path / "x.zip").exists()

    def test_a_damaged_entry_among_all(self, run: Run, vault: Vault, broken_key: Digest, tmp_path: Path) -> None:
        result = run("export", "--all", "-o", tmp_path / "x.zip", "--dir", vault.root)
        assert result.exit_code == 3
        assert broken_key.hex in result.stderr
        assert not (tmp_path / "x.zip").exists()

    def test_an_output_that_exists(self, run: Run, vault: Vault, bundle: Path, small_key: Digest) -> None:
        before = bundle.read_bytes()
        result = run("export", small_key.hex, "-o", bundle, "--dir", vault.root)
        assert result.exit_code == 4
        assert "--overwrite" in result.stderr
        assert bundle.read_bytes() == before
        assert run("export", small_key.hex, "-o", bundle, "--overwrite", "--dir", vault.root).exit_code == 0
        assert bundle.read_bytes() != before

    def test_no_folder_for_the_output(self, run: Run, vault: Vault, small_key: Digest, tmp_path: Path) -> None:
        result = run("export", small_key.hex, "-o", tmp_path / "none" / "x.zip", "--dir", vault.root)
        assert result.exit_code == 4
        assert "does not exist" in result.stderr

    def test_no_vault(self, run: Run, tmp_path: Path) -> None:
        assert run("export", "--all", "-o", tmp_path / "x.zip", "--dir", tmp_path / "none").exit_code == 1


class TestPlans:
    def test_a_plan_takes_its_graphs_along(self, run: Run, vault: Vault, planned: Planned, tmp_path: Path) -> None:
        result = run("export", planned.plan.short, "-o", tmp_path / "x.zip", "--dir", vault.root)
        assert result.exit_code == 0
        keys = sorted([planned.plan, *planned.graphs])
        assert result.stdout.splitlines() == [f"Exported {key.short}" for key in keys]
        assert run("import", tmp_path / "x.zip", "--dir", tmp_path / "new").exit_code == 0
        assert all(Vault.open(tmp_path / "new").lookup(key) for key in keys)

    def test_a_missing_graph_is_named(self, run: Run, vault: Vault, planned: Planned, tmp_path: Path) -> None:
        vault.remove(vault.plan_removal(planned.graphs[:1]))
        result = run("export", planned.plan.short, "-o", tmp_path / "x.zip", "--dir", vault.root)
        assert result.exit_code == 1
        assert planned.graphs[0].short in result.stderr
        assert not (tmp_path / "x.zip").exists()


class TestImport:
    def test_into_a_vault_that_is_not_there_yet(
        self, run: Run, bundle: Path, tmp_path: Path, small_key: Digest, large_key: Digest
    ) -> None:
        result = run("import", bundle, "--dir", tmp_path / "new")
        assert result.exit_code == 0
        assert result.stdout.splitlines() == [f"Imported {key.short}" for key in sorted([small_key, large_key])]
        assert result.stderr == f"Imported 2 entries into {tmp_path / 'new'}.\n"
        assert run("verify", "--dir", tmp_path / "new").exit_code == 0

    def test_what_is_there_stays(self, run: Run, vault: Vault, bundle: Path) -> None:
        result = run("import", bundle, "--dir", vault.root)
        assert result.exit_code == 0
        assert result.stdout.count("which was there already") == 2
        assert result.stderr == f"Imported 0 entries into {vault.root}; 2 entries were there already.\n"

    def test_json(
        self, run: Run, vault: Vault, bundle: Path, tmp_path: Path, small_key: Digest, large_key: Digest
    ) -> None:
        run("export", small_key.hex, "-o", tmp_path / "one.zip", "--dir", vault.root)
        run("import", tmp_path / "one.zip", "--dir", tmp_path / "new")
        document = json.loads(run("import", bundle, "--dir", tmp_path / "new", "--json").stdout)
        assert document == {
            "vault": str(tmp_path / "new"),
            "imported": [large_key.hex],
            "already_there": [small_key.hex],
        }

    @pytest.mark.parametrize("content", [b"", b"hello", b"PK\x03\x04"])
    def test_a_file_that_is_no_bundle_makes_no_vault(self, run: Run, tmp_path: Path, content: bytes) -> None:
        (tmp_path / "x.zip").write_bytes(content)
        result = run("import", tmp_path / "x.zip", "--dir", tmp_path / "new")
        assert result.exit_code == 3
        assert "is not a bundle" in result.stderr
        assert not (tmp_path / "new").exists()

    def test_no_file(self, run: Run, tmp_path: Path) -> None:
        result = run("import", tmp_path / "none.zip", "--dir", tmp_path / "new", "--json")
        assert (result.exit_code, json.loads(result.stdout)["code"]) == (1, "not-found")
        assert "none.zip does not exist" in result.stderr

    def test_a_damaged_bundle(self, run: Run, bundle: Path, tmp_path: Path) -> None:
        data = bytearray(bundle.read_bytes())
        data[len(data) // 2] ^= 1
        bundle.write_bytes(data)
        result = run("import", bundle, "--dir", tmp_path / "new")
        assert result.exit_code == 3
        assert "Nothing was imported" in result.stderr
        assert not (tmp_path / "new").exists()

    def test_a_damaged_bundle_for_an_empty_folder(self, run: Run, bundle: Path, tmp_path: Path) -> None:
        bundle.write_bytes(bundle.read_bytes()[:-1] + b"x")
        (tmp_path / "new").mkdir()
        assert run("import", bundle, "--dir", tmp_path / "new").exit_code == 3
        assert list((tmp_path / "new").iterdir()) == []

    def test_a_damaged_bundle_for_a_vault(self, run: Run, vault: Vault, bundle: Path) -> None:
        bundle.write_bytes(bundle.read_bytes()[:-1] + b"x")
        assert run("import", bundle, "--dir", vault.root).exit_code == 3
        assert Vault.open(vault.root, create=False) == vault

    def test_a_shared_vault_that_is_not_there_yet(
        self, run: Run, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("PIPEVAULT_SHARED", "group")
        assert run("import", bundle, "--dir", tmp_path / "new").exit_code == 0
        modes = {path.stat().st_mode & 0o7777 for path in (tmp_path / "new", *(tmp_path / "new").rglob("*"))}
        assert modes == {0o2775, 0o664}

    def test_a_newer_bundle(self, run: Run, bundle: Path, tmp_path: Path) -> None:
        data = bundle.read_bytes()
        bundle.write_bytes(data.replace(b'{"pipevault_vault":2}', b'{"pipevault_vault":3}'))
        result = run("import", bundle, "--dir", tmp_path / "new")
        assert result.exit_code == 3
        assert "Upgrade pipevault" in result.stderr

    def test_a_folder_that_is_no_vault(self, run: Run, bundle: Path, tmp_path: Path) -> None:
        (tmp_path / "letters").mkdir()
        (tmp_path / "letters" / "letter.txt").write_text("hello")
        assert run("import", bundle, "--dir", tmp_path / "letters").exit_code == 1


@pytest.mark.parametrize("command", ["export", "import"])
def test_help_has_examples(run: Run, command: str) -> None:
    result = run(command, "--help")
    assert result.exit_code == 0
    assert f"  pipevault {command} " in result.stdout.partition("Examples:")[2]


def test_no_torch(vault: Vault, tmp_path: Path) -> None:
    import subprocess
    import sys

    path = tmp_path / "x.zip"
    calls = [["export", "--all", "-o", str(path)], ["verify"], ["import", str(path)]]
    code = (
        "import sys\nfrom pipevault.cli.app import main\n"
        f"for call in {calls!r}:\n"
        f"    try:\n        main([*call, '--dir', {str(vault.root)!r}])\n"
        "    except SystemExit as error:\n        assert error.code == 0\n"
        "assert not {'torch', 'numpy', 'diffusers'} & sys.modules.keys()\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_entries_that_a_load_will_refuse_are_told_of(
    run: Run, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipevault.store.trust.signing_keys import write_key_pair

    public = write_key_pair(tmp_path / "signing.key", comment="")
    assert "no signature" not in run("import", bundle, "--dir", tmp_path / "first").stderr
    monkeypatch.setenv("PIPEVAULT_SIGNATURE", "require")
    monkeypatch.setenv("PIPEVAULT_TRUSTED_KEYS", public.text)
    result = run("import", bundle, "--dir", tmp_path / "second")
    assert result.exit_code == 0
    assert "no signature by a trusted key" in result.stderr
