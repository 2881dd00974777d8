"""The lock of a key between processes, and file systems that have none."""

from __future__ import annotations

import errno
import fcntl
import math
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

from helpers.fault_steps import disk_full, strike_at
from helpers.mounts import in_child
from helpers.store_entries import Entry, leftovers
from pipevault.digest import Digest, canonical_json, digest_bytes
from pipevault.errors import LockTimeoutError, VaultError, VaultNotWritableError
from pipevault.files import flock
from pipevault.files.flock import HeldLock, try_lock
from pipevault.files.heartbeat import BEAT_LIMIT_S
from pipevault.files.liveness import ProcessIdentity
from pipevault.store.layout import Layout
from pipevault.store.locks import lock as lock_module
from pipevault.store.locks.lock import Holder, read_holder
from pipevault.store.places import iter_foreign
from pipevault.store.vault import Vault

KEY = digest_bytes(b"key")
TAKERS = 6
DEAD = replace(ProcessIdentity.current(), started=1)
"""This process's number, used before by a process that ended."""
SINCE, SINCE_S = "2025-01-31T12:00:00+00:00", 1738324800.0
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
        assert holder.process == ProcessIdentity.current()
    assert not note.exists()
    assert leftovers(vault) == []
    assert list(iter_foreign(vault.layout)) == []


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
            assert holder.process == ProcessIdentity.current()


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


@pytest.mark.parametrize(
    ("elapsed_s", "text"),
    [
        (0, "0 s"),
        (59.9, "59 s"),
        (125, "2 min 5 s"),
        (3600 * 26 + 61, "26 h 1 min"),
    ],
)
def test_a_holder_reads_as_a_sentence_part(elapsed_s: float, text: str) -> None:
    assert Holder(ProcessIdentity("worker-3", 7), SINCE).describe(SINCE_S + elapsed_s) == (
        f"process 7 on worker-3 (since {SINCE}, {text})"
    )


@pytest.mark.parametrize(("since", "now_s"), [("yesterday", SINCE_S), (SINCE, SINCE_S - 5)])
def test_no_time_elapsed_where_it_cannot_be_told(since: str, now_s: float) -> None:
    holder = Holder(ProcessIdentity("worker-3", 7), since)
    assert holder.describe(now_s) == f"process 7 on worker-3 (since {since})"


def failing_flock(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def fail(descriptor: int, operation: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", fail)


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_without_locks_the_work_is_done_all_the_same(
    vault: Vault, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    failing_flock(monkeypatch, number)
    said: list[str] = []
    with vault.lock(KEY, timeout_s=0, on_wait=said.append):
        pass
    assert len(said) == 1
    assert "has no locks" in said[0]


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES])
def test_a_lock_file_that_cannot_be_made(vault: Vault, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    vault.layout.locks_dir.mkdir()

    def fail(path: Path, flags: int, *mode: int) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "open", fail)
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


HOLD_AND_DIE = """
import ctypes, os, signal, sys
from pathlib import Path
from typing import Any
from pipevault.digest import Digest
from pipevault.store.vault import Vault

fork = os.fork if sys.argv[3] == "python" else ctypes.PyDLL(None).fork
with Vault.open(Path(sys.argv[1])).lock(Digest(sys.argv[2]), timeout_s=0):
    reader, writer = os.pipe()
    if fork() == 0:
        os.write(writer, b"x")
        sys.stdin.read()  # lives on until the test ends, with the lock file open
        os._exit(0)
    os.read(reader, 1)
    os.kill(os.getpid(), signal.SIGKILL)
"""


@contextmanager
def dead_holder_with_a_living_child(vault: Vault, *, fork: str = "native", reaped: bool = True) -> Iterator[int]:
    """A process took the lock, forked, and was killed; its child lives. ``native``: a fork that Python does not see."""
    command = [sys.executable, "-c", HOLD_AND_DIE, str(vault.root), KEY.hex, fork]
    process = subprocess.Popen(command, stdin=subprocess.PIPE)
    if reaped:
        assert process.wait() == -signal.SIGKILL
    else:
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    try:
        yield process.pid
    finally:
        process.communicate()


def is_free(path: Path) -> bool:
    with path.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True


class TestTakingOver:
    @pytest.mark.parametrize("reaped", [True, False])
    def test_a_lock_that_a_forked_child_keeps(self, vault: Vault, reaped: bool) -> None:
        said: list[str] = []
        with dead_holder_with_a_living_child(vault, reaped=reaped) as pid:
            assert not is_free(vault.layout.lock_file(KEY))
            old = vault.layout.lock_file(KEY).stat().st_ino
            with vault.lock(KEY, timeout_s=0, on_wait=said.append):
                assert vault.layout.lock_file(KEY).stat().st_ino != old
                holder = read_holder(vault.layout.holder_file(KEY))
                assert holder is not None
                assert holder.process == ProcessIdentity.current()
                with pytest.raises(LockTimeoutError), vault.lock(KEY, timeout_s=0):
                    pytest.fail("two holders")
            with vault.lock(KEY, timeout_s=0):
                pass
        assert len(said) == 1
        assert re.match(rf"Took over key {KEY.short} from process {pid} on .* \(since .*, \d+ s\)", said[0])
        assert leftovers(vault) == []
        assert list(iter_foreign(vault.layout)) == []

    def test_a_child_that_python_forked_keeps_no_lock(self, vault: Vault) -> None:
        said: list[str] = []
        with dead_holder_with_a_living_child(vault, fork="python"):
            assert is_free(vault.layout.lock_file(KEY))
            with vault.lock(KEY, timeout_s=0, on_wait=said.append):
                pass
        assert said == []

    def test_of_many_takers_one_holds_it_at_a_time(self, vault: Vault, tmp_path: Path) -> None:
        fork = multiprocessing.get_context("fork")
        barrier, inside = fork.Barrier(TAKERS), tmp_path / "inside"

        def take() -> None:
            barrier.wait(30)
            with vault.lock(KEY, timeout_s=60):
                inside.mkdir()  # fails if another is in
                read_holder(vault.layout.holder_file(KEY))
                inside.rmdir()

        for _ in range(3):
            with dead_holder_with_a_living_child(vault):
                processes = [fork.Process(target=take) for _ in range(TAKERS)]
                for process in processes:
                    process.start()
                for process in processes:
                    process.join()
                assert [process.exitcode for process in processes] == [0] * TAKERS

    @pytest.mark.parametrize("change", [{"host": "elsewhere"}, {"boot_id": "x"}, {"namespaces": "1.1"}])
    def test_a_process_that_cannot_be_judged_keeps_it(self, vault: Vault, change: dict[str, Any]) -> None:
        with raw_holder(vault, replace(ProcessIdentity.current(), **change)):
            with (
                pytest.raises(LockTimeoutError, match=r"cannot be told from here.*on_lock_timeout"),
                vault.lock(KEY, timeout_s=0),
            ):
                pytest.fail("two holders")
            assert read_holder(vault.layout.holder_file(KEY)) is not None

    @pytest.mark.parametrize("age_s", [0.0, BEAT_LIMIT_S - 60, BEAT_LIMIT_S + 60, 1e6])
    def test_where_locks_prove_nothing_a_quarter_of_an_hour_without_a_sign_of_life_decides(
        self, vault: Vault, monkeypatch: pytest.MonkeyPatch, age_s: float
    ) -> None:
        """The holder is of another host, whose lock a file server still believes in."""
        monkeypatch.setattr(lock_module, "locks_hold", lambda path: False)
        monkeypatch.setattr(lock_module, "start_beating", lambda path: None)
        with raw_holder(vault, replace(ProcessIdentity.current(), host="elsewhere")):
            os.utime(vault.layout.holder_file(KEY), times=(time.time() - age_s,) * 2)
            if age_s < BEAT_LIMIT_S:
                with pytest.raises(LockTimeoutError), vault.lock(KEY, timeout_s=0):
                    pytest.fail("two holders")
            else:
                with vault.lock(KEY, timeout_s=0):
                    pass

    def test_where_locks_hold_a_note_without_a_sign_of_life_is_no_reason(self, vault: Vault) -> None:
        with raw_holder(vault, replace(ProcessIdentity.current(), host="elsewhere")):
            os.utime(vault.layout.holder_file(KEY), times=(0, 0))
            with pytest.raises(LockTimeoutError), vault.lock(KEY, timeout_s=0):
                pytest.fail("two holders")

    def test_the_holder_leaves_signs_of_life_where_locks_prove_nothing(
        self, vault: Vault, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        beating: set[Path] = set()
        monkeypatch.setattr(lock_module, "locks_hold", lambda path: False)
        monkeypatch.setattr(lock_module, "start_beating", beating.add)
        monkeypatch.setattr(lock_module, "stop_beating", beating.discard)
        with vault.lock(KEY, timeout_s=0):
            assert beating == {vault.layout.holder_file(KEY)}
        assert beating == set()

    @pytest.mark.parametrize("note", [None, b"torn"])
    def test_nor_is_it_taken_without_a_note(self, vault: Vault, note: bytes | None) -> None:
        with raw_holder(vault, None):
            if note is not None:
                vault.layout.holder_file(KEY).write_bytes(note)
            with pytest.raises(LockTimeoutError, match="another process"), vault.lock(KEY, timeout_s=0):
                pytest.fail("two holders")

    def test_the_last_holders_note_is_not_taken_for_that_of_the_next(
        self, vault: Vault, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A process has the lock and not yet left its note: a taker may replace the lock file, not join it."""
        with raw_holder(vault, DEAD):
            pass
        original = lock_module.guard
        first: list[AbstractContextManager[None]] = []

        @contextmanager
        def slow_guard(layout: Layout, key: Digest) -> Iterator[bool]:
            monkeypatch.setattr(lock_module, "guard", original)
            first.append(vault.lock(KEY, timeout_s=0))
            first[0].__enter__()
            with original(layout, key) as guarded:
                yield guarded

        monkeypatch.setattr(lock_module, "guard", slow_guard)
        with pytest.raises(LockTimeoutError, match=f"process {os.getpid()}"), vault.lock(KEY, timeout_s=0):
            pytest.fail("two holders")
        first[0].__exit__(None, None, None)
        with vault.lock(KEY, timeout_s=0):
            pass

    def test_a_taker_that_comes_second_waits(self, vault: Vault, monkeypatch: pytest.MonkeyPatch) -> None:
        """Between reading the note of the dead and the guard, another took over."""
        with raw_holder(vault, DEAD):
            original = lock_module._take_over
            first: list[AbstractContextManager[None]] = []

            def late(layout: Layout, key: Digest, dead: Holder) -> object:
                monkeypatch.setattr(lock_module, "_take_over", original)
                first.append(vault.lock(KEY, timeout_s=0))
                first[0].__enter__()
                return original(layout, key, dead)

            monkeypatch.setattr(lock_module, "_take_over", late)
            with pytest.raises(LockTimeoutError), vault.lock(KEY, timeout_s=0):
                pytest.fail("two holders")
            first[0].__exit__(None, None, None)

    def test_a_guard_that_hangs_stops_takers_and_no_one_else(
        self, vault: Vault, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(lock_module, "guard", lambda layout, key: nullcontext(False))
        with vault.lock(KEY, timeout_s=0):
            pass
        with raw_holder(vault, DEAD), pytest.raises(LockTimeoutError), vault.lock(KEY, timeout_s=0):
            pytest.fail("two holders")


@contextmanager
def raw_holder(vault: Vault, process: ProcessIdentity | None, since: str = SINCE) -> Iterator[None]:
    """The lock file is locked, and the note says that ``process`` has it."""
    vault.layout.locks_dir.mkdir(exist_ok=True)
    held = try_lock(vault.layout.lock_file(KEY))
    assert isinstance(held, HeldLock)
    if process is not None:
        write_note(vault, process, since)
    try:
        yield
    finally:
        held.release()


def write_note(vault: Vault, process: ProcessIdentity, since: str) -> None:
    vault.layout.holder_file(KEY).write_bytes(canonical_json({**process.to_json(), "since": since}))


def test_a_waiter_says_since_when_and_again_when_the_holder_changes(vault: Vault) -> None:
    said: list[str] = []
    later = "2025-02-01T00:00:00+00:00"
    with ExitStack() as stack:
        stack.enter_context(raw_holder(vault, ProcessIdentity.current()))

        def on_wait(message: str) -> None:
            said.append(message)
            if len(said) == 1:
                write_note(vault, ProcessIdentity.current(), later)
            else:
                stack.close()

        with vault.lock(KEY, timeout_s=math.inf, on_wait=on_wait):
            pass
    assert len(said) == 2
    assert re.search(rf"process {os.getpid()} on .* \(since {re.escape(SINCE)}, \d+ h \d+ min\)", said[0])
    assert later in said[1]


def test_the_note_of_a_dead_holder_goes_even_if_the_disk_is_full(vault: Vault, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else waiters would take this process, which cannot leave its own note, for the dead one."""
    with raw_holder(vault, DEAD):
        pass
    with strike_at(0, disk_full, ("write",)), vault.lock(KEY, timeout_s=0):
        assert not vault.layout.holder_file(KEY).exists()
        with pytest.raises(LockTimeoutError, match="another process"), vault.lock(KEY, timeout_s=0):
            pytest.fail("two holders")


def test_a_forked_child_that_leaves_the_block_does_not_free_the_parents_lock(vault: Vault) -> None:
    block = vault.lock(KEY, timeout_s=0)
    with block:
        assert in_child(lambda: block.__exit__(None, None, None)) == 0
        assert not is_free(vault.layout.lock_file(KEY))
        assert vault.layout.holder_file(KEY).exists()


def test_a_lock_file_that_was_removed_while_it_was_waited_for_is_no_lock(
    vault: Vault, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = lock_module.try_lock  # type: ignore[attr-defined]

    def removed_meanwhile(path: Path) -> HeldLock | flock.NotLocked:
        monkeypatch.setattr(lock_module, "try_lock", original)
        held = original(path)
        path.unlink()
        return held

    monkeypatch.setattr(lock_module, "try_lock", removed_meanwhile)
    with vault.lock(KEY, timeout_s=1):
        assert not is_free(vault.layout.lock_file(KEY))


@pytest.mark.root
def test_a_lock_file_of_another_user_needs_no_right_to_write() -> None:
    with tempfile.TemporaryDirectory() as folder:  # pytest's own are closed to other users
        Path(folder).chmod(0o755)
        path = Path(folder, "file.lock")
        path.touch(0o644)

        def lock() -> None:
            os.setuid(65534)
            assert isinstance(try_lock(path), HeldLock)
            assert not is_free(path)

        assert in_child(lock) == 0


def test_a_link_in_the_place_of_a_lock_file_is_not_followed(vault: Vault, tmp_path: Path) -> None:
    vault.layout.locks_dir.mkdir()
    vault.layout.lock_file(KEY).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(VaultError, match="could not be locked"), vault.lock(KEY, timeout_s=0):
        pytest.fail("followed")
    assert not (tmp_path / "elsewhere").exists()
