"""Scratch folders: private, empty, held while their owner lives, gone afterwards."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pipevault.errors import TemporaryFolderError, TemporaryFolderFullError
from pipevault.files import scratch
from pipevault.files.scratch import scratch_folder

NAME = "a" * 32


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return tmp_path


def test_it_is_private_and_gone_afterwards(temporary: Path) -> None:
    with scratch_folder("build", NAME) as folder:
        assert folder == temporary / f"pipevault.build.{NAME}"
        assert folder.stat().st_mode & 0o777 == 0o700
        (folder / "file").write_bytes(b"x")
    assert list(temporary.iterdir()) == []


def test_it_is_gone_when_the_block_raises(temporary: Path) -> None:
    with pytest.raises(KeyError), scratch_folder("build", NAME):
        raise KeyError
    assert list(temporary.iterdir()) == []


def test_one_at_a_time(temporary: Path) -> None:
    with scratch_folder("build", NAME) as folder:
        with pytest.raises(OSError, match="is in use"), scratch_folder("build", NAME):
            pytest.fail("two owners")
        assert folder.exists()
    with scratch_folder("build", NAME):
        pass


def test_what_a_dead_process_left_there_is_not_used(temporary: Path) -> None:
    left = temporary / f"pipevault.build.{NAME}"
    left.mkdir(mode=0o777)
    (left / "torn").write_bytes(b"x")
    with scratch_folder("build", NAME) as folder:
        assert list(folder.iterdir()) == []


@pytest.mark.parametrize("kind", ["link", "other user"])
def test_what_is_not_this_users_folder_is_refused(temporary: Path, kind: str) -> None:
    place = temporary / f"pipevault.build.{NAME}"
    if kind == "link":
        (temporary / "target").mkdir()
        place.symlink_to(temporary / "target")
    elif os.geteuid() == 0:
        place.mkdir()
        os.chown(place, 65534, 65534)
    else:
        pytest.skip("needs to change the user")
    with pytest.raises(OSError, match="not this user's folder"), scratch_folder("build", NAME):
        pytest.fail("used")
    assert place.exists()


def named(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """``TMPDIR`` names ``folder``, and there is no other."""
    monkeypatch.setattr("tempfile.tempdir", None)
    monkeypatch.setattr("tempfile.gettempdir", lambda: None)
    for variable in ("TEMP", "TMP"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setattr(scratch, "_USUAL", ())


@pytest.mark.parametrize("name", ["with a blank", "it's", 'a"quote', "a;b", "a$b", "a\nb", "a(b"])
def test_a_name_that_command_lines_do_not_survive_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    odd, plain = tmp_path / name, tmp_path / "plain"
    odd.mkdir()
    plain.mkdir()
    named(monkeypatch, odd)
    with pytest.raises(TemporaryFolderError, match="in its name") as caught, scratch_folder("build"):
        pytest.fail("used")
    assert caught.value.path == odd
    assert str(odd) in str(caught.value)
    monkeypatch.setattr(scratch, "_USUAL", (str(plain),))
    with scratch_folder("build") as folder:
        assert folder.parent == plain


@pytest.mark.parametrize("name", ["plain", "Ünïcode", "a.b-c_d+e=f", "@1:2,3%"])
def test_other_names_are_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    (tmp_path / name).mkdir()
    named(monkeypatch, tmp_path / name)
    with scratch_folder("build") as folder:
        assert folder.parent == tmp_path / name


@pytest.mark.parametrize(
    ("kind", "problem"),
    [
        ("absent", "does not exist"),
        ("file", "is not a folder"),
        ("read-only", "is on a read-only file system"),
        ("noexec", "is on a file system mounted noexec"),
        ("full", "has only 1 MB free"),
        ("closed", "cannot be written by this user"),
    ],
)
def test_each_problem_has_its_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, problem: str) -> None:
    folder = tmp_path / "folder"
    if kind == "file":
        folder.write_text("")
    elif kind != "absent":
        folder.mkdir()
    flags = {"read-only": os.ST_RDONLY, "noexec": os.ST_NOEXEC}.get(kind, 0)
    free = 1_000 if kind == "full" else 1_000_000
    status = os.statvfs_result((1_000, 1_000, 1_000_000, free, free, 1, 1, 1, flags, 255))
    monkeypatch.setattr(os, "statvfs", lambda path: status)
    monkeypatch.setattr(os, "access", lambda path, mode: kind != "closed")
    named(monkeypatch, folder)
    with (
        pytest.raises(TemporaryFolderError, match=f"{folder} {problem}.*Set TMPDIR") as caught,
        scratch_folder("build"),
    ):
        pytest.fail("used")
    assert isinstance(caught.value, TemporaryFolderFullError) is (kind == "full")
    assert caught.value.path == folder


def test_what_others_left_there_is_removed_by_the_next(temporary: Path) -> None:
    left = temporary / f"pipevault.graphs.{'b' * 32}"
    left.mkdir()
    (left / "graph.so").write_bytes(b"x")
    with scratch_folder("graphs") as first, scratch_folder("graphs") as second:
        assert sorted(temporary.iterdir()) == sorted([first, second])
