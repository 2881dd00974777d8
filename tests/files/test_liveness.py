"""Whether a process lives: its number used again, zombies, other hosts, boots and containers, hidden processes."""

from __future__ import annotations

import ctypes
import json
import multiprocessing
import os
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from helpers.mounts import in_child
from pipevault.files import liveness
from pipevault.files.liveness import ProcessIdentity

CONTEXT = multiprocessing.get_context("fork")
NOBODY = 65534
_NEW_MOUNTS = 0x00020000
_NO_MOUNTS = 99
DESCRIBE = (
    "import json; from pipevault.files.liveness import ProcessIdentity as P; print(json.dumps(P.current().to_json()))"
)

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")


def run_python(code: str, *, before: tuple[str, ...] = (), argument: str = "") -> str:
    command = [*before, sys.executable, "-c", code, argument]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def ended_process() -> ProcessIdentity:
    """A process that ended and was waited for."""
    return ProcessIdentity.from_json(json.loads(run_python(DESCRIBE)))


def test_this_process_lives() -> None:
    here = ProcessIdentity.current()
    assert (here.pid, here.is_alive()) == (os.getpid(), True)
    assert here.started is not None


def test_a_process_that_ended_is_dead() -> None:
    assert ended_process().is_alive() is False


def test_a_zombie_is_dead() -> None:
    process = subprocess.Popen([sys.executable, "-c", DESCRIBE], stdout=subprocess.PIPE)
    assert process.stdout is not None
    identity = ProcessIdentity.from_json(json.loads(process.stdout.read()))
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert identity.is_alive() is False
    process.communicate()


def test_a_number_that_is_used_again_is_another_process() -> None:
    here = ProcessIdentity.current()
    assert here.started is not None
    assert replace(here, started=here.started - 1).is_alive() is False


@pytest.mark.root
def test_another_users_process_can_be_told() -> None:
    parent = ProcessIdentity.current()

    def look() -> None:
        os.setuid(NOBODY)
        assert parent.is_alive() is True
        assert replace(parent, started=1).is_alive() is False

    assert in_child(look) == 0


@pytest.mark.parametrize(
    "change",
    [
        {"host": "elsewhere"},
        {"boot_id": "00000000-0000-0000-0000-000000000000"},
        {"boot_id": None},
        {"namespaces": "1.1"},
        {"namespaces": None},
        {"started": None},
    ],
)
def test_what_cannot_be_told(change: dict[str, Any]) -> None:
    assert replace(ProcessIdentity.current(), **change).is_alive() is None


@pytest.mark.parametrize("pid", [2**40, 2**80])
def test_a_number_that_no_process_can_have(pid: int) -> None:
    assert replace(ProcessIdentity.current(), pid=pid).is_alive() is not True


def test_a_group_of_processes_is_never_asked() -> None:
    here = ProcessIdentity.current()
    assert replace(here, pid=0).is_alive() is None
    assert replace(here, pid=-1).is_alive() is None


def test_a_forked_child_is_another_process() -> None:
    parent = ProcessIdentity.current()

    def look() -> None:
        here = ProcessIdentity.current()
        assert here.pid == os.getpid() != parent.pid
        assert here.is_alive() is True
        assert parent.is_alive() is True

    assert in_child(look) == 0


def test_it_survives_a_thread() -> None:
    found: list[ProcessIdentity] = []
    thread = threading.Thread(target=lambda: found.append(ProcessIdentity.current()))
    thread.start()
    thread.join()
    assert found == [ProcessIdentity.current()]


def test_containers_that_share_a_vault_but_no_pid_namespace() -> None:
    """Their boot ids are equal while their numbers mean other processes."""
    outside = ProcessIdentity.current()
    code = (
        f"{DESCRIBE}; import sys; other = P.from_json(json.loads(sys.argv[1]));"
        "print(json.dumps([other.is_alive(), P.current().is_alive()]))"
    )
    try:
        said = run_python(
            code, before=("unshare", "--pid", "--fork", "--mount-proc"), argument=json.dumps(outside.to_json())
        )
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("this user may not make a pid namespace")
    described, answers = said.splitlines()
    inside = ProcessIdentity.from_json(json.loads(described))
    assert inside.boot_id == outside.boot_id
    assert inside.namespaces != outside.namespaces
    assert json.loads(answers) == [None, True]
    assert inside.is_alive() is None


def test_a_pid_namespace_with_the_proc_of_another() -> None:
    code = f"{DESCRIBE}; print(json.dumps(P.current().is_alive()))"
    try:
        described, answer = run_python(code, before=("unshare", "--pid", "--fork")).splitlines()
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("this user may not make a pid namespace")
    assert json.loads(described)["boot_id"] is None
    assert json.loads(answer) is None


@pytest.mark.root
def test_processes_that_the_kernel_hides() -> None:
    parent, dead = ProcessIdentity.current(), ended_process()

    def look() -> None:
        libc = ctypes.CDLL(None)
        if libc.unshare(_NEW_MOUNTS) or subprocess.run(["mount", "--make-rprivate", "/"]).returncode:
            os._exit(_NO_MOUNTS)
        if subprocess.run(["mount", "-t", "proc", "-o", "hidepid=2", "proc", "/proc"]).returncode:
            os._exit(_NO_MOUNTS)
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
        assert not Path(f"/proc/{parent.pid}").exists()
        assert parent.is_alive() is None
        assert dead.is_alive() is False
        assert ProcessIdentity.current().is_alive() is True

    code = in_child(look)
    if code == _NO_MOUNTS:
        pytest.skip("this system may not mount /proc")
    assert code == 0


def test_without_proc_nothing_is_claimed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(liveness, "_PROC", tmp_path)
    liveness._current.cache_clear()
    try:
        here = ProcessIdentity.current()
        assert (here.boot_id, here.started) == (None, None)
        assert here.is_alive() is None
    finally:
        liveness._current.cache_clear()


@pytest.mark.parametrize(
    ("name", "state", "threads", "running"),
    [
        ("python", "S", 1, True),
        ("a) Z 1 (b", "R", 1, True),
        ("python", "Z", 1, False),
        ("python", "X", 1, False),
        ("first thread ended", "Z", 3, True),
    ],
)
def test_the_status_of_a_process(tmp_path: Path, name: str, state: str, threads: int, running: bool) -> None:
    (tmp_path / "stat").write_text(f"7 ({name}) {state} {'0 ' * 16}{threads} 0 1234 {'0 ' * 30}\n")
    assert liveness._status(tmp_path) == (1234, running)


@pytest.mark.parametrize("text", ["", "7", "7 (python) S", "7 (python) S " + "x " * 40])
def test_a_status_that_cannot_be_read(tmp_path: Path, text: str) -> None:
    (tmp_path / "stat").write_text(text)
    assert liveness._status(tmp_path) is None
    assert liveness._status(tmp_path / "absent") is None


def test_it_is_written_down_and_read_again() -> None:
    here = ProcessIdentity.current()
    assert ProcessIdentity.from_json(json.loads(json.dumps(here.to_json()))) == here


def test_the_note_of_an_older_release_is_read() -> None:
    identity = ProcessIdentity.from_json({"host": "worker-3", "pid": 4711, "since": "2025-01-31T12:00:00+00:00"})
    assert identity == ProcessIdentity("worker-3", 4711)
    assert identity.is_alive() is None


@pytest.mark.parametrize(
    "document",
    [
        None,
        [],
        {},
        {"host": "a"},
        {"host": 1, "pid": 1},
        {"host": "a", "pid": "1"},
        {"host": "a", "pid": True},
        {"host": "a", "pid": 0},
        {"host": "a", "pid": -1},
        {"host": "a", "pid": 1, "boot_id": 7},
        {"host": "a", "pid": 1, "namespaces": 7},
        {"host": "a", "pid": 1, "started": "7"},
        {"host": "a", "pid": 1, "started": -7},
    ],
)
def test_what_describes_no_process(document: Any) -> None:
    with pytest.raises(ValueError, match=r"^(Expected|Object missing required field)"):
        ProcessIdentity.from_json(document)


def test_a_mark_tells_place_and_start_apart() -> None:
    here = ProcessIdentity.current()
    assert here.started is not None
    assert len(here.mark) == 24
    assert replace(here, host="elsewhere").mark[:16] != here.mark[:16]
    assert replace(here, started=here.started + 1).mark[:16] == here.mark[:16]
    assert replace(here, started=here.started + 1).mark != here.mark
