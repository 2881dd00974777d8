"""Full disk, read-only mount, missing permission, a clock that runs backwards, a folder that vanishes."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

from figures import Figure
from pipevault.digest import Digest
from pipevault.errors import NotAVaultError, VaultError, VaultFullError, VaultNotWritableError
from pipevault.store.retention.leftovers import sweep
from pipevault.store.retention.prune import carry_out, plan_prune
from pipevault.store.stats.summary import compact, count, summary
from pipevault.store.vault import Vault
from stress_entries import Entry, end_of, in_child, load, small_entry, state_of

_NEW_MOUNTS = 0x00020000
_NO_MOUNTS = 99
_NOBODY = 65534
_HOUR_S = 3600.0


def measure_limits(folder: Path) -> list[Figure]:
    """Each limit in a process of its own; a promise is broken if it dies of anything but what it expects."""
    cases: tuple[tuple[str, str, Callable[[Path], None], Callable[[Path, Callable[[], None]], int]], ...] = (
        ("full disk", "VaultFullError, nothing left behind, the vault whole", _full_disk, _on_tmpfs),
        ("read-only mount", "loads go on, writes are VaultNotWritableError", _read_only_mount, _on_tmpfs),
        ("permission denied", "loads go on, writes are VaultNotWritableError", _permission_denied, _as_it_is),
        ("clock moved backwards", "what is used, pinned, loaded or being written stays", _clock_backwards, _as_it_is),
        ("folder deleted while in use", "a miss, then a clear error or a new vault", _deleted_folder, _as_it_is),
    )
    figures = []
    for number, (name, outcome, case, place) in enumerate(cases):
        at = folder / f"limit{number}"
        at.mkdir(parents=True)
        at.chmod(0o755)
        code = place(at, lambda case=case, at=at: case(at))  # type: ignore[misc]
        if code == _NO_MOUNTS:
            figures.append(Figure(name, "not tried: this user may not mount", outcome))
        else:
            figures.append(Figure(name, "as promised" if code == 0 else "BROKEN, see above", outcome, code == 0))
    return figures


def _as_it_is(folder: Path, function: Callable[[], None]) -> int:
    del folder
    return end_of(in_child(function))


def _on_tmpfs(folder: Path, function: Callable[[], None]) -> int:
    """``folder`` is a file system of 400 kB in the child, and in no other process."""

    def run() -> None:
        if sys.platform != "linux" or os.geteuid() != 0 or ctypes.CDLL(None).unshare(_NEW_MOUNTS) != 0:
            os._exit(_NO_MOUNTS)
        mount = ["mount", "-t", "tmpfs", "-o", "size=400k", "none", str(folder)]
        for command in (["mount", "--make-rprivate", "/"], mount):
            if subprocess.run(command, capture_output=True).returncode:
                os._exit(_NO_MOUNTS)
        function()

    return end_of(in_child(run))


def _expect(holds: bool, what: str) -> None:
    if not holds:
        raise AssertionError(what)


def _expect_error(error: type[Exception], function: Callable[[], object], what: str) -> None:
    try:
        function()
    except error as found:
        _expect(str(found).strip() != "" and "\n" not in str(found), f"{what}: no message of one line")
        return
    raise AssertionError(f"{what}: no {error.__name__}")


def _published(vault: Vault, folder: Path, name: str) -> Entry:
    entry = small_entry(folder / "source", name)
    vault.publish(entry.manifest, entry.files)
    return entry


def _full_disk(folder: Path) -> None:
    vault = Vault.open(folder / "vault")
    there = _published(vault, folder, "there")
    filler = folder / "filler"
    with filler.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            pass
    source = Path("/dev/shm") / f"pipevault-stress-{os.getpid()}"
    try:
        new = small_entry(source, "new")
        _expect_error(VaultFullError, lambda: vault.publish(new.manifest, new.files), "publishing")
        count(vault.layout, "miss", reason="absent")
        vault.record_use(there.key)
        vault.lease(there.key).release()
        _expect(state_of(vault, there) == "whole", "the entry that was there")
        _expect(state_of(vault, new) == "absent", "the new entry")
        _expect(not any(vault.layout.tmp_dir.iterdir()), "something is left in tmp/")
        filler.unlink()
        vault.publish(new.manifest, new.files)
        _expect(state_of(vault, new) == "whole", "publishing once there is space")
    finally:
        shutil.rmtree(source, ignore_errors=True)


def _read_only_mount(folder: Path) -> None:
    vault = Vault.open(folder / "vault")
    there, new = _published(vault, folder, "there"), small_entry(folder / "source", "new")
    subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
    _refuses_writes(Vault.open(vault.root), there, new)


def _permission_denied(folder: Path) -> None:
    vault = Vault.open(folder / "vault")
    there, new = _published(vault, folder, "there"), small_entry(folder / "source", "new")
    if os.geteuid() == 0:
        os.setgid(_NOBODY)
        os.setuid(_NOBODY)
    else:
        for path in [vault.root, *(path for path in vault.root.rglob("*") if path.is_dir())]:
            path.chmod(0o555)
    _refuses_writes(Vault.open(vault.root), there, new)


def _refuses_writes(vault: Vault, there: Entry, new: Entry) -> None:
    os.environ["XDG_STATE_HOME"] = "/proc/none"  # where not even root can write
    _expect(not vault.writable, "the vault says that it can be written")
    _expect(state_of(vault, there) == "whole", "loading")
    vault.record_use(there.key)
    vault.lease(there.key).release()
    count(vault.layout, "published", key=there.key)
    summary(vault.layout)
    plan_prune(vault, max_size=0)
    _expect_error(VaultNotWritableError, lambda: vault.publish(new.manifest, new.files), "publishing")
    _expect_error(VaultNotWritableError, lambda: carry_out(vault, plan_prune(vault, max_size=0)), "pruning")
    _expect(vault.quarantine(vault.layout.manifest_file(there.key), "bad") is None, "quarantine")
    _expect(state_of(vault, there) == "whole", "loading afterwards")


def _clock_backwards(folder: Path) -> None:
    """Everything was used and written in the future, as seen from here."""
    vault = Vault.open(folder / "vault")
    entries = [_published(vault, folder, f"entry {number}") for number in range(4)]
    used, pinned, leased, _ = (entry.key for entry in entries)
    vault.record_use(used)
    vault.pin(pinned, "prod")
    lease = vault.lease(leased)
    now_s = time.time()
    with vault.staging() as staging, vault.lock(used, timeout_s=0):
        with mock.patch.object(time, "time", return_value=now_s - 30 * 24 * _HOUR_S):
            sweep(vault.layout)
            compact(vault.layout)
            count(vault.layout, "published")
            for entry in entries:
                vault.record_use(entry.key)
            plan = plan_prune(vault, older_than_s=_HOUR_S, unused=True)
            _expect(plan.entries == (), "an entry from the future counts as old")
            carry_out(vault, plan)
        _expect(staging.is_dir(), "the staging folder of a live process is gone")
        _expect(_all_whole(vault, entries), "an entry is gone")
    future_s = now_s + 30 * 24 * _HOUR_S
    os.utime(vault.layout.use_file(used), (future_s, future_s))
    carry_out(vault, plan_prune(vault, max_size=1))
    kept: set[Digest] = {entry.key for entry in entries if state_of(vault, entry) == "whole"}
    _expect({pinned, leased} <= kept, "a pinned or loaded entry was pruned")
    lease.release()
    for entry in entries:
        vault.publish(entry.manifest, entry.files)
    _expect(_all_whole(vault, entries), "publishing after pruning")


def _all_whole(vault: Vault, entries: list[Entry]) -> bool:
    return all(state_of(vault, entry) == "whole" for entry in entries)


def _deleted_folder(folder: Path) -> None:
    os.environ["XDG_STATE_HOME"] = str(folder / "state")
    vault = Vault.open(folder / "vault")
    there = _published(vault, folder, "there")
    count(vault.layout, "published")
    lease = vault.lease(there.key)
    shutil.rmtree(vault.root)
    _expect(load(vault, there.key) is None, "a lookup is no miss")
    count(vault.layout, "published")
    vault.record_use(there.key)
    lease.release()
    _expect(list(vault.manifests()) == [], "ls")
    _expect(not any(vault.layout.entries_dir.glob("*")), "an entry came back")
    _expect_error(NotAVaultError, lambda: Vault.open(vault.root, create=False), "opening")
    try:
        vault.publish(there.manifest, there.files)
    except VaultError:
        vault = Vault.open(vault.root)
        vault.publish(there.manifest, there.files)
    _expect(state_of(vault, there) == "whole", "publishing again")
