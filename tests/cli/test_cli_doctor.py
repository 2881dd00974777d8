"""``doctor``: each line ok or with what to do, and the exit code that follows."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shutil
import stat
import sys
from collections import namedtuple
from pathlib import Path

import pytest

from helpers.command_runner import Run
from helpers.mounts import silent
from pipevault.cli import doctor
from pipevault.cli.doctor import (
    Check,
    check_compiler,
    check_packages,
    check_system_root,
    check_temporary_folder,
    check_torch,
    check_user_folders,
    check_vault,
)
from pipevault.digest import Digest, digest_bytes
from pipevault.errors import NoHomeError
from pipevault.files import scratch
from pipevault.settings import Settings
from pipevault.store.vault import Vault


def vault_checks(root: Path) -> dict[str, Check]:
    return {check.name: check for check in check_vault(Settings(root))}


class TestCommand:
    def test_a_healthy_machine(self, run: Run, vault: Vault) -> None:
        result = run("doctor", "--dir", vault.root)
        assert result.exit_code == 0, result.stdout
        assert "FAIL" not in result.stdout
        for name in ("python", "torch", "c++ compiler", "gpu", "vault", "permissions", "free space", "onediffx"):
            assert f"ok   {name}: " in result.stdout

    def test_a_failed_check_gives_exit_code_1(self, run: Run, vault: Vault, broken_key: Digest) -> None:
        result = run("doctor", "--dir", vault.root)
        assert result.exit_code == 1
        assert "FAIL entries: 3, 1 with a manifest that cannot be used" in result.stdout
        assert f"-> Run: pipevault rm {broken_key.short} --dir {vault.root}\n" in result.stdout

    def test_json(self, run: Run, vault: Vault, broken_key: Digest) -> None:
        result = run("doctor", "--dir", vault.root, "--json")
        document = json.loads(result.stdout)
        assert result.exit_code == 1
        assert (document["ok"], document["code"]) == (False, "check-failed")
        assert [check["name"] for check in document["checks"] if not check["ok"]] == ["entries"]


class TestVault:
    def test_a_folder_that_does_not_exist_yet(self, tmp_path: Path) -> None:
        checks = vault_checks(tmp_path / "a" / "b")
        assert checks["vault"].ok
        assert "will be made" in checks["vault"].detail
        assert not (tmp_path / "a").exists()

    def test_an_empty_folder(self, tmp_path: Path) -> None:
        assert vault_checks(tmp_path)["vault"].ok
        assert list(tmp_path.iterdir()) == []

    def test_a_folder_below_a_file(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        assert not vault_checks(tmp_path / "file" / "vault")["vault"].ok

    def test_a_folder_that_is_no_vault(self, tmp_path: Path) -> None:
        (tmp_path / "letter.txt").write_text("")
        check = vault_checks(tmp_path)["vault"]
        assert not check.ok
        assert "letter.txt" in check.remedy

    def test_foreign_files_are_named_and_do_no_harm(self, vault: Vault) -> None:
        for name in ("a", "b", "c", "d"):
            (vault.root / name).write_text("")
        check = vault_checks(vault.root)["foreign files"]
        assert check.ok
        assert check.detail.endswith(f"{vault.root / 'c'} and more")
        assert "ignored" in check.remedy

    def test_orphans_are_counted_with_their_bytes(self, vault: Vault) -> None:
        assert vault_checks(vault.root)["orphans"] == Check("orphans", True, "no artifact without an entry")
        path = vault.layout.artifact_file(digest_bytes(b"orphan"))
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"orphan")
        young = vault_checks(vault.root)["orphans"]
        assert (young.ok, young.remedy) == (True, "")
        assert young.detail.startswith("1 artifact, 6 B, without an entry, younger than an hour")
        os.utime(path, times=(0, 0))
        old = vault_checks(vault.root)["orphans"]
        assert old.ok
        assert old.remedy == f"Run: pipevault rm --orphans --dir {vault.root}"

    def test_others_may_write(self, vault: Vault) -> None:
        vault.root.chmod(0o777)
        check = vault_checks(vault.root)["permissions"]
        assert not check.ok
        assert "chmod go-w" in check.remedy

    def test_read_only(self, vault: Vault, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("pipevault.store.vault.is_writable", lambda layout: False)
        check = vault_checks(vault.root)["permissions"]
        assert not check.ok
        assert check.detail == "read-only for this user"

    def test_a_check_that_the_vault_breaks_does_not_stop_the_others(
        self, vault: Vault, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from pipevault.errors import VaultError

        def fail(vault: Vault) -> None:
            raise VaultError("entries cannot be read", vault.root)

        monkeypatch.setattr(Vault, "manifests", fail)
        checks = vault_checks(vault.root)
        assert not checks["entries"].ok
        assert checks["entries"].remedy == "entries cannot be read"
        assert checks["foreign files"].ok

    def test_a_full_disk(self, vault: Vault, monkeypatch: pytest.MonkeyPatch) -> None:
        usage = namedtuple("usage", "total used free")
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**10, 10**10, 5_000_000))
        check = vault_checks(vault.root)["free space"]
        assert not check.ok
        assert check.detail == "5.0 MB"


class TestFolders:
    @pytest.fixture(autouse=True)
    def named(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        """The folder that TMPDIR names; there is one more, ``usual``."""
        (tmp_path / "usual").mkdir()
        monkeypatch.setattr(scratch, "_USUAL", (str(tmp_path / "usual"),))
        monkeypatch.setattr("tempfile.tempdir", None)
        monkeypatch.setattr("tempfile.gettempdir", lambda: None)
        for variable in ("TEMP", "TMP"):
            monkeypatch.delenv(variable, raising=False)
        monkeypatch.setenv("TMPDIR", str(tmp_path / "named"))
        return tmp_path / "named"

    def test_the_one_that_is_named(self, named: Path) -> None:
        named.mkdir()
        check = check_temporary_folder()
        assert (check.ok, check.remedy) == (True, "")
        assert check.detail.startswith(f"{named}, ")

    def test_another_is_used_and_why(self, named: Path) -> None:
        check = check_temporary_folder()
        assert check.ok
        assert check.detail.startswith(f"{named.parent / 'usual'}, ")
        assert check.detail.endswith(f"for {named} does not exist")
        assert "TMPDIR" in check.remedy

    @pytest.mark.parametrize("name", ["a blank", "a'quote"])
    def test_a_name_that_compilers_do_not_survive(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
    ) -> None:
        (tmp_path / name).mkdir()
        monkeypatch.setenv("TMPDIR", str(tmp_path / name))
        assert f"{tmp_path / name} has {name[1]!r} in its name" in check_temporary_folder().detail

    def test_none(self, named: Path) -> None:
        (named.parent / "usual").rmdir()
        check = check_temporary_folder()
        assert not check.ok
        assert f"{named} does not exist" in check.remedy
        compiler = check_compiler()
        assert not compiler.ok
        assert "temporary folder" in compiler.remedy

    def test_without_a_home_each_folder_has_a_line_and_the_rest_is_checked(
        self, run: Run, monkeypatch: pytest.MonkeyPatch, vault: Vault
    ) -> None:
        def homeless(kind: str) -> Path:
            raise NoHomeError(f"no {kind} folder")

        for module in ("pipevault.cli.doctor", "pipevault.settings", "pipevault.store.stats.event_log"):
            monkeypatch.setattr(f"{module}.user_folder", homeless)
        monkeypatch.delenv("PIPEVAULT_DIR", raising=False)
        result = run("doctor")
        assert result.exit_code == 1
        for kind in ("config", "cache", "state"):
            assert f"ok   {kind} folder: none, and nothing is kept there\n     -> no {kind} folder" in result.stdout
        assert "FAIL vault: no folder is set for it\n     -> no cache folder" in result.stdout
        assert "ok   root file system: " in result.stdout
        assert run("doctor", "--dir", vault.root).stdout.count("FAIL") == 0

    def test_a_state_folder_that_cannot_be_written(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(os, "access", lambda path, mode: False)
        checks = {check.name: check for check in check_user_folders()}
        assert "cannot be written" in checks["state folder"].detail
        assert checks["state folder"].remedy == "Set HOME or XDG_STATE_HOME."
        assert "cannot" not in checks["config folder"].detail

    @pytest.mark.parametrize(("flags", "detail"), [(0, "writable"), (os.ST_RDONLY, "read-only")])
    def test_the_systems_root(self, monkeypatch: pytest.MonkeyPatch, flags: int, detail: str) -> None:
        status = os.statvfs_result((1, 1, 1, 1, 1, 1, 1, 1, flags, 255))
        monkeypatch.setattr(os, "statvfs", lambda path: status)
        assert check_system_root().detail == detail


class TestTiers:
    def test_a_line_for_each(self, run: Run, vault: Vault, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        Vault.open(tmp_path / "shared")
        (tmp_path / "file").write_text("")
        folders = [str(tmp_path / "shared"), str(tmp_path / "file"), str(vault.root)]
        monkeypatch.setenv("PIPEVAULT_TIERS", os.pathsep.join(folders))
        result = run("doctor", "--dir", vault.root)
        assert result.exit_code == 1
        assert f"ok   tier {folders[0]}: writable, hits are copied, signature off\n" in result.stdout
        assert f"FAIL tier {folders[1]}: every load leaves it out\n     -> {folders[1]} is a file" in result.stdout
        assert result.stdout.count(str(vault.root)) == 1, "the vault itself has a line already"

    def test_one_that_does_not_answer(
        self, run: Run, vault: Vault, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("PIPEVAULT_TIERS", str(tmp_path / "silent"))
        monkeypatch.setenv("PIPEVAULT_TIER_TIMEOUT_S", "0.2")
        with silent(tmp_path / "silent"):
            assert "did not answer within 0.2 s" in run("doctor", "--dir", vault.root).stdout

    def test_without_tiers_there_is_no_line(self, run: Run, vault: Vault) -> None:
        assert not re.search(r"^(ok  |FAIL) tier", run("doctor", "--dir", vault.root).stdout, re.MULTILINE)


class TestCompiler:
    def test_the_one_of_this_machine(self) -> None:
        assert check_compiler().ok

    def test_none(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("CXX", "no-such-compiler")
        check = check_compiler()
        assert not check.ok
        assert "Install g++" in check.remedy

    def test_one_that_cannot_compile(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        script = tmp_path / "compiler"
        script.write_text("#!/bin/sh\necho 'cannot find iostream' >&2\nexit 1\n")
        script.chmod(stat.S_IRWXU)
        monkeypatch.setenv("CXX", str(script))
        check = check_compiler()
        assert not check.ok
        assert "cannot find iostream" in check.detail

    def test_one_that_does_not_run(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        script = tmp_path / "compiler"
        script.write_bytes(b"\x7fELF")
        script.chmod(stat.S_IRWXU)
        monkeypatch.setenv("CXX", str(script))
        assert not check_compiler().ok


class TestPackages:
    def test_one_is_missing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def version(name: str) -> str:
            if name == "onediff":
                raise importlib.metadata.PackageNotFoundError(name)
            return "1.0"

        monkeypatch.setattr(doctor, "version", version)
        [missing] = [check for check in check_packages() if not check.ok]
        assert missing == Check("onediff", False, "not installed", "Run: pip install onediff")

    def test_torch_is_missing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "torch", None)
        assert not check_torch().ok

    @pytest.mark.parametrize(
        ("release", "ok", "remedy"),
        [
            ("2.13.0+cpu", True, ""),
            ("2.15.0", True, ""),
            ("2.14.1", True, "torch 2.14.1 was not tried"),
            ("2.8.0", False, "Install torch 2.9 or newer."),
        ],
    )
    def test_torch_release(self, monkeypatch: pytest.MonkeyPatch, release: str, ok: bool, remedy: str) -> None:
        import torch

        monkeypatch.setattr(torch, "__version__", release)
        check = check_torch()
        assert (check.ok, check.detail) == (ok, release)
        assert check.remedy.startswith(remedy)
        assert bool(check.remedy) is bool(remedy)


class TestSignatures:
    def test_one_is_required_and_no_key_is_trusted(
        self, run: Run, vault: Vault, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("PIPEVAULT_SIGNATURE", "require")
        result = run("doctor", "--dir", vault.root)
        assert result.exit_code == 1
        assert "FAIL signatures: required, and no key is trusted" in result.stdout

    def test_a_trusted_key_that_cannot_be_read(
        self, run: Run, vault: Vault, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        monkeypatch.setenv("PIPEVAULT_TRUSTED_KEYS", str(tmp_path / "absent.pub"))
        result = run("doctor", "--dir", vault.root)
        assert result.exit_code == 1
        assert "FAIL signatures: trusted_keys cannot be used" in result.stdout
