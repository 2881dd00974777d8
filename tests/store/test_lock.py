"""The lock of a key between processes, and file systems that have none."""

from __future__ import annotations

import errno
import math
import multiprocessing
import os
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path

import filelock
import pytest
from store_entries import Entry, leftovers

from pipevault.digest import digest_bytes
from pipevault.errors import LockTimeoutError, VaultNotWritableError
from pipevault.store.lock import Holder, read_holder
from pipevault.store.vault import Vault

KEY = digest_bytes(b"key")
CONTEXT = multiprocessing.get_context("spawn")


def hold(root: Path, connection: Connection) -> None:
    """Take the lock, say so, and keep it until told to end (or for ever, if the other end is closed first)."""
    with Vault.open(root).lock(KEY, timeout_s=60):
        connection.send("held")
        connection.recv()


@contextmanager
def other_holder(root: Path) -> Iterator[multiprocessing.process.BaseProcess]:
    ours, theirs = CONTEXT.Pipe()
    process = CONTEXT.Process(target=hold, args=(root, theirs))
    process.start()
    try:
        assert ours.recv() == "held"
        yield process
    finally:
        if process.is_alive():
            ours.send("end")
        process.join()


def test_the_note_names_the_holder_while_the_lock_is_held(vault: Vault) -> None:
    note = vault.layout.holder_file(KEY)
    with vault.lock(KEY, timeout_s=0):
        holder = read_holder(note)
        assert holder is not None
        assert holder.pid == os.getpid()
    assert not note.exists()
    assert leftovers(vault) == []
    assert list(vault.foreign_files()) == []


def test_it_is_released_when_the_block_raises(vault: Vault) -> None:
    with pytest.raises(KeyError), vault.lock(KEY, timeout_s=0):
        raise KeyError
    with vault.lock(KEY, timeout_s=0):
        pass


def test_other_keys_are_not_held_up(vault: Vault) -> None:
    with vault.lock(KEY, timeout_s=0), vault.lock(digest_bytes(b"other"), timeout_s=0):
        pass


def test_a_waiter_names_the_holder_and_times_out(vault: Vault) -> None:
    said: list[str] = []
    with other_holder(vault.root) as process:
        with (
            pytest.raises(LockTimeoutError, match=f"process {process.pid}") as caught,
            vault.lock(KEY, timeout_s=0.1, on_wait=said.append),
        ):
            pytest.fail("two holders")
        assert caught.value.key == KEY.hex
        assert caught.value.waited_s >= 0.1
    assert len(said) == 1
    assert f"process {process.pid}" in said[0]
    assert KEY.short in said[0]


def test_a_waiter_goes_on_when_the_holder_ends(vault: Vault) -> None:
    with other_holder(vault.root) as process:

        def let_go(message: str) -> None:
            assert process.pid is not None
            os.kill(process.pid, 9)

        with vault.lock(KEY, timeout_s=math.inf, on_wait=let_go):
            holder = read_holder(vault.layout.holder_file(KEY))
            assert holder is not None
            assert holder.pid == os.getpid()


def test_threads_of_one_process_exclude_each_other(vault: Vault) -> None:
    with (
        vault.lock(KEY, timeout_s=0),
        pytest.raises(LockTimeoutError, match=f"process {os.getpid()}"),
        vault.lock(KEY, timeout_s=0),
    ):
        pytest.fail("two holders")


@pytest.mark.parametrize("timeout_s", [-1, -0.001, math.nan])
def test_a_timeout_that_is_no_duration(vault: Vault, timeout_s: float) -> None:
    with pytest.raises(ValueError, match="timeout_s"), vault.lock(KEY, timeout_s=timeout_s):
        pass


@pytest.mark.parametrize("note", [b"", b"[]", b"{}", b"\xff", b'{"host": "a", "pid": "x", "since": ""}'])
def test_a_note_that_cannot_be_read_is_no_holder(tmp_path: Path, note: bytes) -> None:
    (tmp_path / "note").write_bytes(note)
    assert read_holder(tmp_path / "note") is None
    assert read_holder(tmp_path / "absent") is None


def test_a_holder_reads_as_a_sentence_part() -> None:
    assert str(Holder("worker-3", 7, "2025-01-31T12:00:00+00:00")) == (
        "process 7 on worker-3 (since 2025-01-31T12:00:00+00:00)"
    )


@pytest.mark.parametrize(
    "failure",
    [OSError(errno.ENOLCK, "No locks available"), OSError(errno.EOPNOTSUPP, "no"), NotImplementedError("flock")],
)
def test_without_locks_the_work_is_done_all_the_same(
    vault: Vault, monkeypatch: pytest.MonkeyPatch, failure: Exception
) -> None:
    def fail(lock: filelock.FileLock, **options: object) -> None:
        raise failure

    monkeypatch.setattr(filelock.FileLock, "acquire", fail)
    said: list[str] = []
    with vault.lock(KEY, timeout_s=0, on_wait=said.append):
        pass
    assert len(said) == 1
    assert "has no locks" in said[0]


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES])
def test_a_lock_file_that_cannot_be_made(vault: Vault, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def fail(lock: filelock.FileLock, **options: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(filelock.FileLock, "acquire", fail)
    with (
        pytest.raises(VaultNotWritableError, match="could not be locked"),
        vault.lock(KEY, timeout_s=0),
    ):
        pytest.fail("not locked")


def test_a_full_disk_costs_only_the_note(vault: Vault, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(descriptor: int, data: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", fail)
    with vault.lock(KEY, timeout_s=0):
        assert not vault.layout.holder_file(KEY).exists()
    assert leftovers(vault) == []


def test_publishing_needs_no_lock(vault: Vault, entry: Entry) -> None:
    with other_holder(vault.root):
        vault.publish(entry.manifest, entry.files)
    assert vault.lookup(entry.key) == entry.manifest
