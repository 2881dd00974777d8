"""Leases: held while the process lives, judged by lock, then process, then age."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
from fault_steps import killed_at_each_step
from store_entries import leftovers

from pipevault.digest import canonical_json, digest_bytes
from pipevault.store import leases as leases_module
from pipevault.store.leases import (
    LEASE_LIMIT_S,
    REFRESH_INTERVAL_S,
    find_dead_leases,
    find_leases,
    leased_keys,
    remove_dead_leases,
)
from pipevault.store.liveness import ProcessIdentity
from pipevault.store.vault import Vault

KEY, OTHER = digest_bytes(b"key"), digest_bytes(b"other")


def hold(root: Path, pipe: Connection) -> None:
    lease = Vault.open(root).lease(KEY)
    pipe.send((lease.held, os.getpid()))
    pipe.recv()


@contextmanager
def another_process_holds(vault: Vault) -> Iterator[int]:
    """The pid of a process that holds a lease of ``KEY``, killed at the end."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=hold, args=(vault.root, theirs))
    process.start()
    held, pid = ours.recv()
    assert held
    try:
        yield pid
    finally:
        os.kill(pid, signal.SIGKILL)
        process.join()


def lie(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make every lock free, as some network file systems do."""
    monkeypatch.setattr(leases_module, "_try_lock", lambda *_, **__: True)


def place(vault: Vault, document: object, *, age_s: float = 0.0, host: str = "elsewhere") -> Path:
    """A lease that nobody has locked."""
    path = vault.layout.lease_file(KEY, host=host, pid=4711, random_hex="0" * 16)
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(document if isinstance(document, bytes) else canonical_json(document))
    os.utime(path, times=(time.time() - age_s,) * 2)
    return path


def of_another_host() -> dict[str, object]:
    process = replace(ProcessIdentity.current(), host="elsewhere", boot_id="another").to_json()
    return {"lease_version": 1, "process": process, "since": "2025-01-31T12:00:00+00:00"}


class TestHolding:
    def test_held_until_released(self, vault: Vault) -> None:
        lease = vault.lease(KEY)
        assert lease.held
        assert lease.problem == ""
        assert leased_keys(vault.layout) == {KEY}
        assert list(vault.foreign_files()) == []
        assert leftovers(vault) == []
        lease.release()
        lease.release()
        assert not lease.held
        assert list(vault.layout.leases_dir.iterdir()) == []

    def test_two_of_one_entry(self, vault: Vault) -> None:
        first, second = vault.lease(KEY), vault.lease(KEY)
        first.release()
        assert leased_keys(vault.layout) == {KEY}
        second.release()
        assert leased_keys(vault.layout) == set()

    def test_of_a_live_process_and_then_of_a_dead_one(self, vault: Vault) -> None:
        with another_process_holds(vault) as pid:
            [found] = find_leases(vault.layout)
            assert found.alive
            assert found.key == KEY
            assert found.holder.startswith(f"process {pid} on ")
            assert remove_dead_leases(vault.layout) == []
            assert leased_keys(vault.layout) == {KEY}
        assert leased_keys(vault.layout) == set()
        [dead] = find_dead_leases(vault.layout)
        assert dead.path.exists()
        assert remove_dead_leases(vault.layout) == [dead]
        assert not dead.path.exists()

    def test_a_forked_child_does_not_end_its_parents_lease(self, vault: Vault) -> None:
        lease = vault.lease(KEY)
        child = multiprocessing.get_context("fork").Process(target=lease.release)
        child.start()
        child.join()
        assert child.exitcode == 0
        assert lease.held
        assert leased_keys(vault.layout) == {KEY}
        lease.release()

    def test_killed_while_taking_one(self, vault: Vault) -> None:
        for _ in killed_at_each_step(lambda: vault.lease(KEY)):
            assert leased_keys(vault.layout) == set()
            assert list(vault.foreign_files()) == []
        remove_dead_leases(vault.layout)
        assert find_leases(vault.layout) == []


class TestNeverRaises:
    def test_a_read_only_vault(self, vault: Vault) -> None:
        lease = replace(vault, writable=False).lease(KEY)
        assert not lease.held
        assert "cannot be written" in lease.problem
        assert not vault.layout.leases_dir.exists()
        lease.refresh()
        lease.release()

    def test_a_file_where_the_folder_should_be(self, vault: Vault) -> None:
        vault.layout.leases_dir.write_text("")
        lease = vault.lease(KEY)
        assert not lease.held
        assert "leases" in lease.problem

    def test_the_folder_is_gone_at_the_release(self, vault: Vault, tmp_path: Path) -> None:
        lease = vault.lease(KEY)
        vault.root.rename(tmp_path / "elsewhere")
        lease.release()
        assert not lease.held


class TestLocksThatLie:
    def test_a_live_process_counts_though_its_lock_is_granted_to_all(
        self, vault: Vault, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        lie(monkeypatch)
        with another_process_holds(vault):
            assert leased_keys(vault.layout) == {KEY}
        assert leased_keys(vault.layout) == set()

    @pytest.mark.parametrize("answer", [True, None])
    def test_without_locks_the_process_decides(
        self, vault: Vault, monkeypatch: pytest.MonkeyPatch, answer: bool | None
    ) -> None:
        monkeypatch.setattr(leases_module, "_try_lock", lambda *_, **__: answer)
        lease = vault.lease(KEY)
        assert leased_keys(vault.layout) == {KEY}
        lease.release()


class TestThatCannotBeTold:
    @pytest.mark.parametrize("age_s", [0.0, LEASE_LIMIT_S - 3600, 3600 - LEASE_LIMIT_S])
    def test_another_host_counts_within_the_limit(self, vault: Vault, age_s: float) -> None:
        place(vault, of_another_host(), age_s=age_s)
        assert leased_keys(vault.layout) == {KEY}

    @pytest.mark.parametrize("age_s", [LEASE_LIMIT_S + 3600, -LEASE_LIMIT_S - 3600])
    def test_and_not_beyond_it_in_either_direction(self, vault: Vault, age_s: float) -> None:
        place(vault, of_another_host(), age_s=age_s)
        assert leased_keys(vault.layout) == set()

    @pytest.mark.parametrize("content", [b"", b"no JSON", b"[]", b'{"process":7}', b'{"process":{}}', b"[" * 100_000])
    def test_a_damaged_lease_counts_within_the_limit(self, vault: Vault, content: bytes) -> None:
        path = place(vault, content)
        assert leased_keys(vault.layout) == {KEY}
        os.utime(path, times=(0, 0))
        assert leased_keys(vault.layout) == set()

    def test_a_link_counts(self, vault: Vault, tmp_path: Path) -> None:
        path = place(vault, b"")
        path.unlink()
        path.symlink_to(tmp_path)
        assert leased_keys(vault.layout) == {KEY}

    def test_a_foreign_file_is_no_lease(self, vault: Vault) -> None:
        vault.layout.leases_dir.mkdir()
        (vault.layout.leases_dir / "notes.txt").write_text("")
        assert find_leases(vault.layout) == []


class TestRefresh:
    def test_renewed_when_it_is_due(self, vault: Vault, monkeypatch: pytest.MonkeyPatch) -> None:
        lease = vault.lease(KEY)
        assert lease.path is not None
        os.utime(lease.path, times=(0, 0))
        lease.refresh()
        assert lease.path.stat().st_mtime == 0
        later = time.monotonic() + REFRESH_INTERVAL_S
        monkeypatch.setattr(time, "monotonic", lambda: later)
        lease.refresh()
        assert lease.path.stat().st_mtime > 0
        lease.release()
        lease.refresh()
