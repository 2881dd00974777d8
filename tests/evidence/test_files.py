"""Files of evidence: whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pipevault.errors import CannotSaveError
from pipevault.evidence.files import replacing, write_data


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "a"
    assert write_data(path, b"old") == path

    def fail() -> None:
        with replacing(path) as temporary:
            temporary.write_bytes(b"half")
            raise ValueError("stop")

    with pytest.raises(ValueError, match="stop"):
        fail()
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
    write_data(path, b"new")
    assert path.read_bytes() == b"new"


def test_what_cannot_be_written_is_told_with_the_path(tmp_path: Path) -> None:
    with pytest.raises(CannotSaveError, match="could not be written: No such file") as caught:
        write_data(tmp_path / "none" / "a", b"")
    assert caught.value.path == tmp_path / "none" / "a"


def test_what_is_written_follows_the_umask_in_a_folder_of_a_group_too(tmp_path: Path) -> None:
    folder = tmp_path / "group"
    folder.mkdir()
    folder.chmod(0o2770)
    before = os.umask(0o077)
    try:
        write_data(folder / "out.bin", b"private")
    finally:
        os.umask(before)
    assert (folder / "out.bin").stat().st_mode & 0o777 == 0o600
