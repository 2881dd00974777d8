"""What was verified is what is used: files held open, and copies that nobody can change."""

from __future__ import annotations

import os
import socket
import stat
from pathlib import Path

import pytest

from pipevault.digest import digest_bytes
from pipevault.errors import CorruptEntryError
from pipevault.files import opened as opened_module
from pipevault.files.file_systems import is_local
from pipevault.files.opened import OpenedFile, open_verified

BYTES = b"graph" * 1000


def changeable(descriptor: int, status: os.stat_result) -> bool:
    return True


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "file"
    path.write_bytes(BYTES)
    return path


def opened(path: Path, *, copy: bool = False, digest: bytes = BYTES) -> OpenedFile:
    if copy:
        return open_verified(path, digest_bytes(digest), len(digest), what="The file", is_changeable=changeable)
    return open_verified(path, digest_bytes(digest), len(digest), what="The file")


@pytest.mark.parametrize("copy", [False, True])
def test_a_file_put_in_its_place_is_not_what_is_read(file: Path, copy: bool) -> None:
    with opened(file, copy=copy) as held:
        other = file.with_name("other")
        other.write_bytes(b"other" * 1000)
        os.replace(other, file)
        assert held.path.read_bytes() == BYTES
        assert held.origin == file


def test_a_write_to_the_file_does_not_reach_the_copy(file: Path) -> None:
    with file.open("r+b") as writer, opened(file, copy=True) as held:
        writer.write(b"other")
        writer.flush()
        assert held.path.read_bytes() == BYTES


def test_nobody_can_change_the_copy(file: Path) -> None:
    with opened(file, copy=True) as held, pytest.raises(PermissionError):
        held.path.open("r+b", buffering=0).write(b"other")


def test_a_copy_has_the_same_bytes(file: Path) -> None:
    with opened(file) as held, held.copied() as copy:
        assert os.readlink(copy.path) != str(file)
        assert copy.path.read_bytes() == BYTES


def test_without_paths_of_descriptors_a_copy_lies_in_a_private_folder(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(opened_module, "_DESCRIPTORS", (Path("/nowhere"),))
    with opened(file, copy=True) as held:
        folder = held.path.parent
        assert held.path.read_bytes() == BYTES
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        assert stat.S_IMODE(held.path.stat().st_mode) == 0o500
        with held.duplicate() as again:
            assert again.path != held.path
            assert again.path.read_bytes() == BYTES
    assert not folder.exists()
    with opened(file) as held:
        assert held.path == file


@pytest.mark.parametrize("copy", [False, True])
def test_other_bytes_are_refused_and_nothing_stays_open(file: Path, copy: bool) -> None:
    before = os.listdir("/proc/self/fd")
    file.write_bytes(BYTES[:-1] + b"x")
    with pytest.raises(CorruptEntryError, match=r"The file is damaged: .* digest"):
        opened(file, copy=copy)
    file.write_bytes(BYTES + b"x")
    with pytest.raises(CorruptEntryError, match="5001 bytes instead of 5000"):
        opened(file, copy=copy)
    assert os.listdir("/proc/self/fd") == before


def test_what_is_no_regular_file_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "socket"))
        for name in ("pipe", "folder", "socket"):
            with pytest.raises(CorruptEntryError, match=r"not a regular file|cannot be read"):
                opened(tmp_path / name)
    with pytest.raises(CorruptEntryError, match="missing"):
        opened(tmp_path / "absent")
    with pytest.raises(CorruptEntryError, match="not a regular file"):
        opened(Path("/dev/zero"))


def test_what_is_asked_about_a_file_is_asked_about_the_open_one(file: Path) -> None:
    asked = []

    def question(descriptor: int, status: os.stat_result) -> bool:
        asked.append(os.fstat(descriptor).st_ino == status.st_ino == file.stat().st_ino)
        return False

    open_verified(file, digest_bytes(BYTES), what="The file", is_changeable=question).close()
    assert asked == [True]


def test_proc_is_no_file_system_of_files() -> None:
    descriptor = os.open("/proc/self/status", os.O_RDONLY)
    try:
        assert not is_local(descriptor)
    finally:
        os.close(descriptor)
