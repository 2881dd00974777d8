"""What a process claims is seen to be its while it lives, by lock or by signs of life, and abandoned afterwards."""

from __future__ import annotations

import errno
import fcntl
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pipevault.files import claims, heartbeat
from pipevault.files.claims import Claim, abandoned, claim_file, claim_folder, locks_hold
from pipevault.files.heartbeat import BEAT_LIMIT_S, is_silent, start_beating, stop_beating

CLAIMS = pytest.mark.parametrize("claim", [claim_file, claim_folder])
Claimer = Callable[[Path], "Claim | None"]


@pytest.fixture(autouse=True)
def no_thread_stays() -> Iterator[None]:
    yield
    if thread := heartbeat._thread:
        thread.join(30)
        assert not thread.is_alive()
    heartbeat._clock_ahead_s.cache_clear()


@pytest.fixture
def far(monkeypatch: pytest.MonkeyPatch) -> None:
    """The file system is one of the network, on which locks prove nothing."""
    monkeypatch.setattr(claims, "is_local", lambda descriptor: False)


def is_abandoned(path: Path) -> bool:
    with abandoned(path) as is_free:
        return is_free


def made(claim: Claimer, path: Path) -> Claim:
    found = claim(path)
    assert found is not None
    return found


@CLAIMS
def test_held_until_released(tmp_path: Path, claim: Claimer) -> None:
    path = tmp_path / "it"
    held = made(claim, path)
    assert held.held
    assert path.exists()
    assert not is_abandoned(path)
    held.release()
    held.release()
    assert not held.held
    assert not path.exists()


@CLAIMS
def test_of_a_killed_process(tmp_path: Path, claim: Claimer) -> None:
    path, context = tmp_path / "it", multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()

    def hold() -> None:
        held = claim(path)
        theirs.send(held is not None)
        threading.Event().wait()

    process = context.Process(target=hold)
    process.start()
    assert ours.recv()
    assert not is_abandoned(path)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert is_abandoned(path)


@pytest.mark.parametrize(("claim", "outlives"), [(claim_file, True), (claim_folder, False)])
def test_a_forked_child(tmp_path: Path, claim: Claimer, outlives: bool) -> None:
    """A child keeps the file that its parent claimed, as it keeps what is loaded; not a folder."""
    path, context = tmp_path / "it", multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    end = context.Event()

    def parent() -> None:
        held = made(claim, path)
        child = os.fork()
        if child == 0:
            held.release()  # does nothing in a child
            theirs.send(path.exists())
            end.wait()
            os._exit(0)
        os.waitpid(child, os.WNOHANG)
        threading.Event().wait()

    process = context.Process(target=parent)
    process.start()
    assert ours.recv()
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert is_abandoned(path) is not outlives
    end.set()
    for _ in range(500):
        if is_abandoned(path):
            break
        time.sleep(0.01)
    assert is_abandoned(path)


@CLAIMS
def test_one_that_was_taken_for_abandoned_before_it_was_locked(
    tmp_path: Path, claim: Claimer, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = claims.lock_open  # type: ignore[attr-defined]

    def swept(descriptor: int, path: Path, **options: bool) -> object:
        monkeypatch.setattr(claims, "lock_open", original)
        claims.remove(path)
        return original(descriptor, path, **options)

    monkeypatch.setattr(claims, "lock_open", swept)
    assert claim(tmp_path / "it") is None


@CLAIMS
def test_one_that_somebody_looks_at_just_then(tmp_path: Path, claim: Claimer, monkeypatch: pytest.MonkeyPatch) -> None:
    original = claims.lock_open  # type: ignore[attr-defined]

    def looked_at(descriptor: int, path: Path, **options: bool) -> object:
        monkeypatch.setattr(claims, "lock_open", original)
        with abandoned(path) as is_free:
            assert is_free
            return original(descriptor, path, **options)

    monkeypatch.setattr(claims, "lock_open", looked_at)
    assert claim(tmp_path / "it") is None
    assert is_abandoned(tmp_path / "it")


@pytest.mark.parametrize("kind", ["absent", "link", "fifo"])
def test_what_is_no_file_is_not_abandoned(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "it"
    if kind == "link":
        path.symlink_to(tmp_path)
    elif kind == "fifo":
        os.mkfifo(path)
    assert not is_abandoned(path)


def test_others_may_look_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o077)
    try:
        held = made(claim_file, tmp_path / "it")
    finally:
        os.umask(before)
    assert held.path.stat().st_mode & 0o777 == 0o644
    held.release()


@CLAIMS
def test_where_there_are_no_locks_it_leaves_signs_of_life(
    tmp_path: Path, claim: Claimer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", fail)
    held = made(claim, tmp_path / "it")
    assert held.path in heartbeat._beating
    assert not is_abandoned(held.path)
    os.utime(held.path, times=(0, 0))
    assert is_abandoned(held.path)
    held.release()
    assert not held.path.exists()


@CLAIMS
@pytest.mark.usefixtures("far")
def test_where_locks_prove_nothing_it_leaves_signs_of_life(
    tmp_path: Path, claim: Claimer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(heartbeat, "BEAT_INTERVAL_S", 0.01)
    held = made(claim, tmp_path / "it")
    os.utime(held.path, times=(0, 0))
    for _ in range(500):
        if held.path.stat().st_mtime > 0:
            break
        time.sleep(0.01)
    assert held.path.stat().st_mtime > 0
    held.release()


def test_a_local_file_system_needs_no_thread(tmp_path: Path) -> None:
    held = made(claim_file, tmp_path / "it")
    assert locks_hold(held.path)
    assert heartbeat._beating == set()
    held.release()
    assert not locks_hold(held.path)


class TestHeartbeat:
    @pytest.mark.parametrize(
        ("age_s", "silent"),
        [(0, False), (BEAT_LIMIT_S - 60, False), (BEAT_LIMIT_S + 60, True), (-BEAT_LIMIT_S - 60, True)],
    )
    def test_age(self, tmp_path: Path, age_s: float, silent: bool) -> None:
        path = tmp_path / "it"
        path.touch()
        os.utime(path, times=(time.time() - age_s,) * 2)
        assert is_silent(path) is silent

    def test_the_clock_is_that_of_the_file_system(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """This machine's clock is hours behind the one that dates the files."""
        path = tmp_path / "it"
        path.touch()
        now_s = time.time()
        monkeypatch.setattr(heartbeat.time, "time", lambda: now_s - 4 * 3600)  # type: ignore[attr-defined]
        assert not is_silent(path)

    def test_without_the_right_to_ask_for_it_this_machines_clock_counts(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = tmp_path / "it"
        path.touch()

        def fail(*arguments: object, **options: object) -> None:
            raise PermissionError(errno.EACCES, "Permission denied")

        monkeypatch.setattr(os, "utime", fail)
        assert not is_silent(path)

    def test_one_thread_for_all_that_ends_when_nothing_is_left(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(heartbeat, "BEAT_INTERVAL_S", 0.01)
        paths = [tmp_path / name for name in "ab"]
        for path in paths:
            path.touch()
            start_beating(path)
        thread = heartbeat._thread
        assert thread is not None
        assert [one.name for one in threading.enumerate()].count("pipevault heartbeat") == 1
        for path in paths:
            stop_beating(path)
        thread.join(30)
        assert not thread.is_alive()
        assert heartbeat._thread is None
