"""Leases: they count while their process lives, wherever it runs, and no longer."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from helpers.fault_steps import killed_at_each_step
from helpers.store_entries import Entry, leftovers
from pipevault.digest import digest_bytes
from pipevault.files import claims
from pipevault.files.flock import HeldLock, NotLocked, lock_open
from pipevault.files.heartbeat import BEAT_LIMIT_S
from pipevault.store.locks.leases import live_leases
from pipevault.store.places import iter_foreign
from pipevault.store.retention.leftovers import TIDY_ABOVE, find_leftovers, sweep
from pipevault.store.retention.prune import enforce_max_size
from pipevault.store.vault import Vault

KEY = digest_bytes(b"key")


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


def far(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the file system one of the network, on which locks prove nothing."""
    monkeypatch.setattr(claims, "is_local", lambda descriptor: False)


def place(vault: Vault, *, age_s: float = 0.0, host: str = "elsewhere", number: int = 0, content: bytes = b"") -> Path:
    """A lease that nobody has locked, of another host or container."""
    path = vault.layout.lease_file(KEY, host=host, pid=4711, random_hex=f"{number:016x}")
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    os.utime(path, times=(time.time() - age_s,) * 2)
    return path


class TestHolding:
    def test_held_until_released(self, vault: Vault) -> None:
        lease = vault.lease(KEY)
        assert lease.held
        assert live_leases(vault.layout).keys() == {KEY}
        assert list(iter_foreign(vault.layout)) == []
        assert leftovers(vault) == []
        lease.release()
        lease.release()
        assert not lease.held
        assert list(vault.layout.leases_dir.iterdir()) == []

    def test_two_of_one_entry(self, vault: Vault) -> None:
        first, second = vault.lease(KEY), vault.lease(KEY)
        first.release()
        assert live_leases(vault.layout).keys() == {KEY}
        second.release()
        assert live_leases(vault.layout).keys() == set()

    def test_of_a_live_process_and_then_of_a_dead_one(self, vault: Vault) -> None:
        with another_process_holds(vault) as pid:
            [(key, [holder])] = live_leases(vault.layout).items()
            assert key == KEY
            assert holder.startswith(f"process {pid} on ")
            assert sweep(vault.layout) == []
            assert live_leases(vault.layout).keys() == {KEY}
        assert live_leases(vault.layout).keys() == set()
        [dead] = find_leftovers(vault.layout)
        assert dead.path.exists()
        assert sweep(vault.layout) == [dead]
        assert not dead.path.exists()

    def test_a_forked_child_does_not_end_its_parents_lease(self, vault: Vault) -> None:
        lease = vault.lease(KEY)
        child = multiprocessing.get_context("fork").Process(target=lease.release)
        child.start()
        child.join()
        assert child.exitcode == 0
        assert lease.held
        assert live_leases(vault.layout).keys() == {KEY}
        lease.release()

    def test_killed_while_taking_one(self, vault: Vault) -> None:
        for _ in killed_at_each_step(lambda: vault.lease(KEY)):
            assert live_leases(vault.layout).keys() == set()
            assert list(iter_foreign(vault.layout)) == []
        sweep(vault.layout)
        assert os.listdir(vault.layout.leases_dir) == []


class TestNeverRaises:
    def test_a_read_only_vault(self, vault: Vault) -> None:
        lease = replace(vault, writable=False).lease(KEY)
        assert not lease.held
        assert not vault.layout.leases_dir.exists()
        lease.release()

    def test_a_file_where_the_folder_should_be(self, vault: Vault) -> None:
        vault.layout.leases_dir.write_text("")
        lease = vault.lease(KEY)
        assert not lease.held

    def test_the_folder_is_gone_at_the_release(self, vault: Vault, tmp_path: Path) -> None:
        lease = vault.lease(KEY)
        vault.root.rename(tmp_path / "elsewhere")
        lease.release()
        assert not lease.held


class TestOfAnotherContainer:
    """A file of this machine's own file system tells, whatever host, boot or pid namespace its process was of."""

    @pytest.mark.parametrize("age_s", [0.0, 1e6, -1e6])
    @pytest.mark.parametrize("content", [b"", b"no JSON", b'{"lease_version":1,"process":{"host":"x","pid":1}}'])
    def test_that_is_not_locked_is_dead_at_once(self, vault: Vault, age_s: float, content: bytes) -> None:
        path = place(vault, age_s=age_s, content=content)
        assert live_leases(vault.layout).keys() == set()
        assert [item.path for item in sweep(vault.layout)] == [path]

    def test_in_a_pid_namespace_of_its_own(self, vault: Vault) -> None:
        code = (
            "import sys; from pathlib import Path; from pipevault.digest import Digest\n"
            "from pipevault.store.vault import Vault\n"
            "lease = Vault.open(Path(sys.argv[1])).lease(Digest(sys.argv[2])); print(lease.held, flush=True)\n"
            "sys.stdin.read()"
        )
        inner = [sys.executable, "-c", code, str(vault.root), KEY.hex]
        command = ["unshare", "--pid", "--uts", "--fork", "--kill-child", *inner]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        assert process.stdout is not None
        if process.stdout.readline() != b"True\n":
            process.communicate()
            pytest.skip("needs the right to make a pid namespace")
        assert " 1 on " in live_leases(vault.layout)[KEY][0]
        process.kill()  # --kill-child: with SIGKILL
        process.communicate()
        for _ in range(500):
            if not live_leases(vault.layout):
                break
            time.sleep(0.01)
        assert live_leases(vault.layout).keys() == set()

    def test_a_link_counts(self, vault: Vault, tmp_path: Path) -> None:
        path = place(vault)
        path.unlink()
        path.symlink_to(tmp_path)
        assert live_leases(vault.layout).keys() == {KEY}

    def test_a_foreign_file_is_no_lease(self, vault: Vault) -> None:
        vault.layout.leases_dir.mkdir()
        (vault.layout.leases_dir / "notes.txt").write_text("")
        assert live_leases(vault.layout).keys() == set()


class TestWhereLocksProveNothing:
    @pytest.mark.parametrize("age_s", [0.0, BEAT_LIMIT_S - 60, 60 - BEAT_LIMIT_S])
    def test_it_counts_for_a_quarter_of_an_hour(
        self, vault: Vault, monkeypatch: pytest.MonkeyPatch, age_s: float
    ) -> None:
        far(monkeypatch)
        place(vault, age_s=age_s)
        assert live_leases(vault.layout).keys() == {KEY}
        assert sweep(vault.layout) == []

    @pytest.mark.parametrize("age_s", [BEAT_LIMIT_S + 60, -BEAT_LIMIT_S - 60])
    def test_and_no_longer_in_either_direction(
        self, vault: Vault, monkeypatch: pytest.MonkeyPatch, age_s: float
    ) -> None:
        far(monkeypatch)
        path = place(vault, age_s=age_s)
        assert live_leases(vault.layout).keys() == set()
        assert [item.path for item in sweep(vault.layout)] == [path]

    def test_one_that_is_locked_lives_however_old(self, vault: Vault, monkeypatch: pytest.MonkeyPatch) -> None:
        far(monkeypatch)
        lease = vault.lease(KEY)
        assert lease.path is not None
        os.utime(lease.path, times=(0, 0))
        assert live_leases(vault.layout).keys() == {KEY}
        lease.release()


class TestThousandsOfStarts:
    def test_a_start_that_is_killed_leaves_one_file_and_later_ones_remove_it(self, vault: Vault) -> None:
        """Each start leases an entry and is killed: what it leaves is a file that nobody has locked."""
        most = 0
        for number in range(1_000):
            vault.lease(KEY).release()
            place(vault, host=f"container-{number}", number=number)
            most = max(most, len(list(vault.layout.leases_dir.iterdir())))
        assert most <= TIDY_ABOVE + 2
        assert live_leases(vault.layout).keys() == set()

    def test_live_ones_among_them_stay(self, vault: Vault) -> None:
        leases = [vault.lease(KEY) for _ in range(TIDY_ABOVE + 1)]
        for number in range(500):
            place(vault, number=number)
        for _ in range(400):
            vault.lease(KEY).release()
        assert all(lease.path and lease.path.exists() for lease in leases)
        assert len(os.listdir(vault.layout.leases_dir)) < 2 * TIDY_ABOVE
        for lease in leases:
            lease.release()

    def test_they_hold_no_entry_above_the_largest_size(self, vault: Vault, entry: Entry) -> None:
        vault.publish(entry.manifest, entry.files)
        path = vault.layout.lease_file(entry.key, host="container", pid=1, random_hex="0" * 16)
        path.parent.mkdir(exist_ok=True)
        path.touch()
        report = enforce_max_size(vault, KEY, max_size=1)
        assert report is not None
        assert [going.key for going in report.entries] == [entry.key]
        assert vault.lookup(entry.key) is None


def test_whoever_saw_a_lease_before_it_was_locked_notices(vault: Vault, monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(descriptor: int, path: Path, **options: bool) -> HeldLock | NotLocked:
        os.utime(path, times=(0, 0))
        return lock_open(descriptor, path, **options)

    monkeypatch.setattr(claims, "lock_open", slow)
    lease = vault.lease(KEY)
    assert lease.path is not None
    assert lease.path.stat().st_mtime > 0
    lease.release()
