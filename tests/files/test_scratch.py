"""Scratch folders: private, empty, held while their owner lives, gone afterwards."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pipevault.files.scratch import scratch_folder

NAME = "a" * 32


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return tmp_path


def test_it_is_private_and_gone_afterwards(temporary: Path) -> None:
    with scratch_folder("build", NAME) as folder:
        assert folder == temporary / f"pipevault-build-{NAME}"
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
    left = temporary / f"pipevault-build-{NAME}"
    left.mkdir(mode=0o777)
    (left / "torn").write_bytes(b"x")
    with scratch_folder("build", NAME) as folder:
        assert list(folder.iterdir()) == []


@pytest.mark.parametrize("kind", ["link", "other user"])
def test_what_is_not_this_users_folder_is_refused(temporary: Path, kind: str) -> None:
    place = temporary / f"pipevault-build-{NAME}"
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
    assert not place.with_name(f"{place.name}.lock").exists()
