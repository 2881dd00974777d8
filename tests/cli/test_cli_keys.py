"""keygen, sign, and the signatures that show tells of."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import pytest

from helpers.command_runner import Run
from helpers.planned_entries import Planned
from pipevault.digest import Digest
from pipevault.store.places import signature_files
from pipevault.store.trust.signature import check_signature
from pipevault.store.trust.signing_keys import load_trusted
from pipevault.store.vault import Vault


@pytest.fixture
def key_file(run: Run, tmp_path: Path) -> Path:
    assert run("keygen", "-o", tmp_path / "key").exit_code == 0
    return tmp_path / "key"


def secret_lines(key_file: Path) -> list[str]:
    return [line for line in key_file.read_text().splitlines() if not line.startswith("-----")]


class TestKeygen:
    def test_it_prints_the_public_key_and_its_id_and_no_secret(self, run: Run, tmp_path: Path) -> None:
        result = run("keygen", "-o", tmp_path / "key", "--comment", "build machine")
        assert result.exit_code == 0
        assert result.stdout == (tmp_path / "key.pub").read_text()
        assert result.stdout.startswith("pipevault-ed25519 ")
        assert result.stdout.endswith(" build machine\n")
        [public] = load_trusted([result.stdout])
        assert f"Key {public.id}: {tmp_path / 'key'} signs" in result.stderr
        assert stat.S_IMODE((tmp_path / "key").stat().st_mode) == 0o600
        assert [line for line in secret_lines(tmp_path / "key") if line in result.stdout + result.stderr] == []

    def test_json(self, run: Run, tmp_path: Path) -> None:
        result = run("keygen", "-o", tmp_path / "key", "--json")
        document = json.loads(result.stdout)
        [public] = load_trusted([document["public_key"]])
        assert document == {
            "id": public.id,
            "public_key": public.text,
            "private_file": str(tmp_path / "key"),
            "public_file": str(tmp_path / "key.pub"),
        }
        assert [line for line in secret_lines(tmp_path / "key") if line in result.stdout + result.stderr] == []

    def test_a_key_is_not_overwritten(self, run: Run, key_file: Path) -> None:
        before = key_file.read_bytes()
        result = run("keygen", "-o", key_file)
        assert (result.exit_code, result.stdout) == (2, "")
        assert "never overwritten" in result.stderr
        assert key_file.read_bytes() == before

    def test_where_it_should_go_must_be_said(self, run: Run) -> None:
        result = run("keygen")
        assert result.exit_code == 2
        assert "--output" in result.stderr

    def test_a_comment_of_two_lines(self, run: Run, tmp_path: Path) -> None:
        result = run("keygen", "-o", tmp_path / "key", "--comment", "two\nlines")
        assert result.exit_code == 2
        assert not (tmp_path / "key").exists()


class TestSign:
    def test_one_entry(self, run: Run, vault: Vault, key_file: Path, small_key: Digest, large_key: Digest) -> None:
        result = run("sign", small_key.hex[:20], "--key", key_file, "--dir", vault.root)
        assert (result.exit_code, result.stdout) == (0, f"{small_key.short} signed\n")
        trusted = load_trusted([f"{key_file}.pub"])
        assert trusted[0].text in result.stderr
        manifest = vault.lookup(small_key)
        assert manifest is not None
        assert check_signature(vault.layout, manifest, policy="require", trusted=trusted) is None
        assert signature_files(vault.layout, large_key) == ()

    def test_all_entries_and_again(
        self, run: Run, vault: Vault, key_file: Path, small_key: Digest, large_key: Digest
    ) -> None:
        keys = sorted([small_key.hex, large_key.hex])
        first = run("sign", "--all", "--key", key_file, "--dir", vault.root)
        assert first.stdout == "".join(f"{key[:12]} signed\n" for key in keys)
        second = run("sign", "--all", "--key", key_file, "--dir", vault.root, "--json")
        document = json.loads(second.stdout)
        assert document["entries"] == [
            {"key": key, "state": "signed already", "code": None, "message": ""} for key in keys
        ]
        assert document["id"] == load_trusted([document["public_key"]])[0].id

    def test_one_entry_named_twice(self, run: Run, vault: Vault, key_file: Path, small_key: Digest) -> None:
        result = run("sign", small_key.hex, small_key.hex[:20], "--key", key_file, "--dir", vault.root)
        assert result.stdout == f"{small_key.short} signed\n"

    def test_what_is_damaged_is_not_signed_and_does_not_stop_the_others(
        self, run: Run, vault: Vault, key_file: Path, small_key: Digest, large_key: Digest, broken_key: Digest
    ) -> None:
        manifest = vault.lookup(large_key)
        assert manifest is not None
        own = vault.layout.artifact_file(manifest.artifacts[1].digest)
        own.chmod(0o644)
        own.write_bytes(b"x" * 500)
        result = run("sign", "--all", "--key", key_file, "--dir", vault.root)
        assert result.exit_code == 3
        assert sorted(result.stdout.splitlines()) == sorted(
            [f"{small_key.short} signed", f"{large_key.short} failed", f"{broken_key.short} failed"]
        )
        assert f"{large_key.short}: corrupt-entry: Artifact unet/1.pt2 is damaged" in result.stderr
        assert "1 of 3 entries have a signature" in result.stderr
        assert signature_files(vault.layout, large_key) == ()

    def test_a_plan_with_its_graphs(
        self, run: Run, vault: Vault, key_file: Path, planned: Planned, small_key: Digest
    ) -> None:
        result = run("sign", planned.plan.short, "--key", key_file, "--dir", vault.root)
        assert result.stdout.splitlines() == [f"{key.short} signed" for key in (planned.plan, *sorted(planned.graphs))]
        assert all(signature_files(vault.layout, key) for key in (planned.plan, *planned.graphs))
        assert signature_files(vault.layout, small_key) == ()

    def test_a_plan_whose_graph_is_gone(self, run: Run, vault: Vault, key_file: Path, planned: Planned) -> None:
        gone, there = planned.graphs
        vault.remove(vault.plan_removal([gone]))
        result = run("sign", planned.plan.short, "--key", key_file, "--dir", vault.root)
        assert (result.exit_code, result.stdout) == (0, f"{planned.plan.short} signed\n{there.short} signed\n")
        assert f"{planned.plan.short} needs {gone.short}, which is not in the vault" in result.stderr

    def test_an_empty_vault(self, run: Run, key_file: Path, tmp_path: Path) -> None:
        Vault.open(tmp_path / "empty")
        result = run("sign", "--all", "--key", key_file, "--dir", tmp_path / "empty")
        assert (result.exit_code, result.stdout) == (0, "")
        assert "0 entries have a signature" in result.stderr

    @pytest.mark.parametrize("arguments", [[], ["--all", "3f"]])
    def test_entries_or_all(self, run: Run, vault: Vault, key_file: Path, arguments: list[str]) -> None:
        result = run("sign", *arguments, "--key", key_file, "--dir", vault.root)
        assert result.exit_code == 2
        assert "give the beginning of one KEY or more, or --all alone" in result.stderr

    @pytest.mark.parametrize(("prefix", "message"), [("xyz", "is not a key"), ("0" * 20, "No entry of")])
    def test_an_unknown_entry_leaves_all_unsigned(
        self, run: Run, vault: Vault, key_file: Path, small_key: Digest, prefix: str, message: str
    ) -> None:
        result = run("sign", small_key.hex, prefix, "--key", key_file, "--dir", vault.root)
        assert result.exit_code == 1
        assert message in result.stderr
        assert signature_files(vault.layout, small_key) == ()

    def test_a_key_that_is_none(self, run: Run, vault: Vault, key_file: Path, small_key: Digest) -> None:
        advice = "Found no private key at /none/key. Give the path of one, or make one with: pipevault keygen -o FILE"
        for path, message in ((f"{key_file}.pub", "holds a public key"), ("/none/key", advice)):
            if os.path.exists(path):
                os.chmod(path, 0o644)
            result = run("sign", small_key.hex, "--key", path, "--dir", vault.root)
            assert result.exit_code == 2
            assert message in result.stderr
        assert "--key" in run("sign", small_key.hex, "--dir", vault.root).stderr

    def test_a_key_that_others_can_read(self, run: Run, vault: Vault, key_file: Path, small_key: Digest) -> None:
        key_file.chmod(0o644)
        result = run("sign", small_key.hex, "--key", key_file, "--dir", vault.root)
        assert result.exit_code == 2
        assert f"chmod 600 {key_file}" in result.stderr
        assert [line for line in secret_lines(key_file) if line in result.stderr] == []

    def test_no_vault(self, run: Run, key_file: Path, tmp_path: Path) -> None:
        result = run("sign", "--all", "--key", key_file, "--dir", tmp_path / "none")
        assert result.exit_code == 1
        assert not (tmp_path / "none").exists()

    def test_group_write_follows_the_setting(
        self, run: Run, vault: Vault, key_file: Path, small_key: Digest, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        vault.root.chmod(0o775)
        assert run("sign", small_key.hex, "--key", key_file, "--dir", vault.root).exit_code == 3
        monkeypatch.setenv("PIPEVAULT_ALLOW_GROUP_WRITE", "1")
        assert run("sign", small_key.hex, "--key", key_file, "--dir", vault.root).exit_code == 0


class TestShow:
    def text(self, run: Run, vault: Vault, key: Digest) -> str:
        lines = run("show", key.hex, "--dir", vault.root).stdout.splitlines()
        [line] = [line for line in lines if line.startswith("signatures")]
        return line.removeprefix("signatures").strip()

    def test_none(self, run: Run, vault: Vault, small_key: Digest) -> None:
        assert self.text(run, vault, small_key) == "none"
        assert json.loads(run("show", small_key.hex, "--dir", vault.root, "--json").stdout)["signatures"] == []

    def test_one(
        self, run: Run, vault: Vault, key_file: Path, small_key: Digest, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        run("sign", small_key.hex, "--key", key_file, "--dir", vault.root)
        [public] = load_trusted([f"{key_file}.pub"])
        assert self.text(run, vault, small_key) == f"{public.id} by a key that is not in trusted_keys"
        monkeypatch.setenv("PIPEVAULT_TRUSTED_KEYS", f"{key_file}.pub")
        assert self.text(run, vault, small_key) == f"{public.id} good, by a trusted key"
        [path] = signature_files(vault.layout, small_key)
        document = json.loads(run("show", small_key.hex, "--dir", vault.root, "--json").stdout)
        assert document["signatures"] == [{"public_key": public.id, "state": "good", "reason": "", "path": str(path)}]
        path.write_text("garbage")
        assert self.text(run, vault, small_key).startswith(f"{public.id} bad: the signature by {public.id} is damaged")

    def test_a_trusted_key_that_is_none(
        self, run: Run, vault: Vault, small_key: Digest, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("PIPEVAULT_TRUSTED_KEYS", "/none/key.pub")
        result = run("show", small_key.hex, "--dir", vault.root)
        assert result.exit_code == 2
        assert "Found no public key at /none/key.pub" in result.stderr
