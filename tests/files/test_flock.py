"""The lock of a file: held by one, freed with its process, waited for no longer than asked."""

from __future__ import annotations

import errno
import fcntl
import os
import threading
import time
from pathlib import Path

import pytest

from pipevault.files.flock import HeldLock, NotLocked, lock_descriptor, locked, try_lock


def test_one_holds_it(tmp_path: Path) -> None:
    first = try_lock(tmp_path / "lock")
    assert isinstance(first, HeldLock)
    assert try_lock(tmp_path / "lock") is NotLocked.HELD_ELSEWHERE
    first.release()
    again = try_lock(tmp_path / "lock")
    assert isinstance(again, HeldLock)
    again.release()


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def fail(descriptor: int, operation: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", fail)
    assert try_lock(tmp_path / "lock") is NotLocked.NO_LOCKS
    with locked(tmp_path / "lock", timeout_s=60) as is_locked:
        assert not is_locked


def test_a_descriptor_is_locked_until_it_is_closed(tmp_path: Path) -> None:
    with (tmp_path / "file").open("wb") as file:
        assert lock_descriptor(file.fileno()) is None
        assert try_lock(tmp_path / "file") is NotLocked.HELD_ELSEWHERE
    with locked(tmp_path / "file", timeout_s=0) as is_locked:
        assert is_locked


def test_a_file_system_without_modes_is_locked_and_nothing_stays_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(descriptor: int, mode: int) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    (tmp_path / "lock").touch()
    (tmp_path / "lock").chmod(0o600)
    monkeypatch.setattr(os, "fchmod", fail)
    before = len(os.listdir("/dev/fd"))
    lock = try_lock(tmp_path / "lock")
    assert isinstance(lock, HeldLock)
    lock.release()
    assert len(os.listdir("/dev/fd")) == before


class TestLocked:
    def test_it_is_held_while_the_block_runs(self, tmp_path: Path) -> None:
        with locked(tmp_path / "lock", timeout_s=0) as is_locked:
            assert is_locked
            with locked(tmp_path / "lock", timeout_s=0.01) as is_locked_twice:
                assert not is_locked_twice
        with locked(tmp_path / "lock", timeout_s=0) as is_locked:
            assert is_locked

    def test_it_is_waited_for(self, tmp_path: Path) -> None:
        held = try_lock(tmp_path / "lock")
        assert isinstance(held, HeldLock)
        timer = threading.Timer(0.1, held.release)
        timer.start()
        start_s = time.monotonic()
        with locked(tmp_path / "lock", timeout_s=60) as is_locked:
            assert is_locked
        assert time.monotonic() - start_s >= 0.05
        timer.join()

    def test_a_file_that_was_replaced_meanwhile_is_not_the_one(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Whoever locks a file that is gone from its path holds nothing that others see."""
        flock = fcntl.flock
        taken: list[int] = []

        def replace_first(descriptor: int, operation: int) -> None:
            flock(descriptor, operation)
            if not taken:
                taken.append(descriptor)
                (tmp_path / "lock").unlink()

        monkeypatch.setattr(fcntl, "flock", replace_first)
        with locked(tmp_path / "lock", timeout_s=0.1) as is_locked:
            assert is_locked
            assert try_lock(tmp_path / "lock") is NotLocked.HELD_ELSEWHERE

    def test_a_folder_that_cannot_be_written_is_no_error(self, tmp_path: Path) -> None:
        with locked(tmp_path / "absent" / "lock", timeout_s=60) as is_locked:
            assert not is_locked
