"""Pipes, sockets, devices, folders, huge files in the place of any file: no command hangs or ends in a traceback."""

from __future__ import annotations

import os
import shutil
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from helpers.command_runner import Run
from pipevault.digest import Digest
from pipevault.errors import PipevaultError
from pipevault.store.stats.event_log import count
from pipevault.store.stats.summary import compact
from pipevault.store.trust.signing_keys import read_private_key, write_key_pair
from pipevault.store.vault import Vault

LIMIT_S = 10
"""Far more than a command takes, and far less than for ever."""


def pipe(path: Path) -> None:
    os.mkfifo(path)


def unix_socket(path: Path) -> None:
    here = os.getcwd()
    os.chdir(path.parent)  # the path of a socket is short
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind("s")
        os.rename("s", path.name)
    finally:
        os.chdir(here)


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def folder(path: Path) -> None:
    path.mkdir()


def blanks(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(200_000_000)


THINGS = (pipe, unix_socket, device, folder, blanks)
COMMANDS = (
    ("ls",),
    ("verify",),
    ("prune", "--max-size", "1", "--dry-run"),
    ("stats",),
    ("pins",),
    ("show", "KEY"),
    ("rm", "KEY", "--dry-run"),
    ("export", "KEY", "-o", "OUT", "--overwrite"),
    ("doctor",),
    ("where",),
)
PLACES: dict[str, Callable[[Vault, Digest, Path], Path]] = {
    "marker": lambda vault, key, folder: vault.layout.vault_file,
    "manifest": lambda vault, key, folder: vault.layout.manifest_file(key),
    "artifact": lambda vault, key, folder: vault.layout.artifact_file(_manifest(vault, key)),
    "pin": lambda vault, key, folder: vault.layout.pin_file("prod"),
    "signature": lambda vault, key, folder: next(vault.layout.signatures_dir.rglob("*.json")),
    "totals": lambda vault, key, folder: vault.layout.totals_file,
    "totals lock": lambda vault, key, folder: vault.layout.totals_lock,
    "lease": lambda vault, key, folder: vault.layout.lease_file(key, host="h", pid=1, random_hex="0" * 16),
    "holder note": lambda vault, key, folder: vault.layout.holder_file(key),
    "lock": lambda vault, key, folder: vault.layout.lock_file(key),
    "use": lambda vault, key, folder: vault.layout.use_file(key),
    "events": lambda vault, key, folder: vault.layout.events_file(host="h", pid=1, random_hex="0" * 16),
    "config file": lambda vault, key, folder: folder / "config.toml",
    "trusted key": lambda vault, key, folder: folder / "signing.key.pub",
}


def _manifest(vault: Vault, key: Digest) -> Digest:
    manifest = vault.lookup(key)
    assert manifest is not None
    return manifest.artifacts[0].digest


@pytest.fixture
def full_vault(vault: Vault, small_key: Digest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Vault:
    """With a pin, signatures, a lease, totals and a config file."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    write_key_pair(tmp_path / "signing.key", comment="")
    private = read_private_key(tmp_path / "signing.key")
    for manifest in (vault.lookup(small_key),):
        assert manifest is not None
        vault.sign(manifest, private)
    vault.pin(small_key, "prod")
    vault.record_use(small_key)
    count(vault.layout, "published", key=small_key)
    compact(vault.layout)
    (tmp_path / "config.toml").write_text(
        f'signature = "warn"\ntrusted_keys = ["{tmp_path / "signing.key.pub"}"]\nmax_size = "1GB"\n'
    )
    monkeypatch.setenv("PIPEVAULT_CONFIG", str(tmp_path / "config.toml"))
    return vault


@pytest.fixture
def in_time() -> Iterator[None]:
    """Fails what hangs."""

    def ring(*_: object) -> None:
        raise AssertionError(f"it did not end within {LIMIT_S} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(LIMIT_S)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("thing", THINGS, ids=lambda thing: thing.__name__)
@pytest.mark.usefixtures("in_time")
def test_no_command_hangs_or_breaks(
    run: Run, full_vault: Vault, small_key: Digest, tmp_path: Path, place: str, thing: Callable[[Path], None]
) -> None:
    path = PLACES[place](full_vault, small_key, tmp_path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    thing(path)
    for command in COMMANDS:
        if command == ("doctor",) and place not in ("marker", "manifest", "config file"):
            continue  # it looks at the compiler each time, which takes longest
        words = [{"KEY": small_key.short, "OUT": str(tmp_path / "out.pvb")}.get(word, word) for word in command]
        result = run(*words, *([] if "--dir" in words else ["--dir", str(full_vault.root)]))
        assert result.exception is None or isinstance(result.exception, (SystemExit, PipevaultError)), (
            words,
            repr(result.exception),
        )
        if place == "marker" and command[0] not in ("doctor", "where"):
            assert result.exit_code != 0, words
            assert str(path) in result.stderr or str(full_vault.root) in result.stderr, words
    assert os.path.lexists(path)
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
