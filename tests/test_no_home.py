"""A user without a home: whoever needs a folder there is told so, and everything else works."""

from __future__ import annotations

import os
import pwd
import subprocess
import sys
from pathlib import Path

import pytest

from pipevault.digest import digest_bytes
from pipevault.errors import NoHomeError, SettingsError
from pipevault.settings import Settings, config_file
from pipevault.settings.user_folders import expand_user, user_folder
from pipevault.store.retention.usage import last_use_s, record_use
from pipevault.store.stats.event_log import compact, count, read_sums
from pipevault.store.vault import Vault

KEY = digest_bytes(b"key")


@pytest.fixture(autouse=True)
def homeless(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for variable in [name for name in os.environ if name.startswith(("XDG_", "PIPEVAULT_"))] + ["HOME"]:
        monkeypatch.delenv(variable, raising=False)

    def unknown(uid: int) -> None:
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    monkeypatch.chdir(tmp_path)


def test_the_vaults_folder_is_all_that_is_needed(tmp_path: Path) -> None:
    assert Settings.resolve(environ={"PIPEVAULT_DIR": str(tmp_path)}).dir == tmp_path
    assert Settings.resolve(environ={}, dir=tmp_path).dir == tmp_path
    assert config_file({}) is None


def test_without_it_the_error_names_the_variable() -> None:
    with pytest.raises(NoHomeError, match=r"HOME is not set.*PIPEVAULT_DIR") as caught:
        Settings.resolve(environ={})
    assert isinstance(caught.value, SettingsError)


def test_no_folder_named_tilde_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Older versions of platformdirs return the path unchanged."""
    monkeypatch.setattr("platformdirs.user_cache_path", lambda *_, **__: Path("~/.cache/pipevault"))
    with pytest.raises(NoHomeError):
        user_folder("cache")


def test_a_variable_that_names_the_folder_is_enough(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert user_folder("cache") == tmp_path / "pipevault"


def test_a_tilde_says_what_is_wrong() -> None:
    with pytest.raises(NoHomeError, match="'~/vault' begins with ~"):
        expand_user("~/vault")
    with pytest.raises(SettingsError, match="Invalid dir '~/vault'"):
        Settings.resolve(environ={"PIPEVAULT_DIR": "~/vault"})


def test_a_vault_works(tmp_path: Path) -> None:
    vault = Vault.open(tmp_path / "vault")
    vault.lease(KEY).release()
    record_use(vault.layout, KEY, writable=False)
    assert last_use_s(vault.layout, KEY) is None
    record_use(vault.layout, KEY)
    assert last_use_s(vault.layout, KEY) is not None
    count(vault.layout, "miss", reason="absent")
    compact(vault.layout)
    read_sums(vault.layout)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["vault"]


@pytest.mark.parametrize("arguments", [["-c", "import pipevault"], ["-m", "pipevault", "--version"]])
def test_importing_and_asking_for_the_version_need_no_folder(arguments: list[str]) -> None:
    environ = {name: value for name, value in os.environ.items() if name in ("PATH", "PYTHONPATH", "LD_LIBRARY_PATH")}
    command = [sys.executable, *arguments]
    if os.geteuid() == 0:
        command = ["setpriv", "--reuid", "4711", "--clear-groups", *command]
    done = subprocess.run(command, env={**environ, "TMPDIR": "/nowhere"}, cwd="/", capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
