"""Folders as one file: equal bytes for equal content, and nothing but plain files comes out."""

from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path

import pytest

from pipevault.errors import CorruptEntryError
from pipevault.files.archive import pack_files, unpack_files


def folder(root: Path) -> dict[str, Path]:
    (root / "ab").mkdir(parents=True)
    (root / "ab" / "code.so").write_bytes(b"code")
    (root / "ab" / "code.so").chmod(0o755)
    (root / "entry").write_bytes(b"")
    return {"ab/code.so": root / "ab" / "code.so", "entry": root / "entry"}


def test_bytes_depend_on_names_and_contents_alone(tmp_path: Path) -> None:
    first, second = folder(tmp_path / "first"), folder(tmp_path / "second")
    os.utime(second["entry"], (1, 1))
    pack_files(first, tmp_path / "first.tar")
    pack_files(dict(reversed(second.items())), tmp_path / "second.tar")
    assert (tmp_path / "first.tar").read_bytes() == (tmp_path / "second.tar").read_bytes()


def test_what_is_unpacked_and_what_stays(tmp_path: Path) -> None:
    pack_files(folder(tmp_path / "first"), tmp_path / "archive.tar")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "entry").write_bytes(b"mine")
    assert unpack_files(tmp_path / "archive.tar", tmp_path / "out") == ("ab/code.so", "entry")
    assert (tmp_path / "out" / "entry").read_bytes() == b"mine"
    assert (tmp_path / "out" / "ab" / "code.so").read_bytes() == b"code"
    assert (tmp_path / "out" / "ab" / "code.so").stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("name", ["../outside", "/absolute", "a/../../outside", "a\\b"])
def test_names_that_lead_outside(tmp_path: Path, name: str) -> None:
    with tarfile.open(tmp_path / "archive.tar", "w") as archive:
        archive.addfile(tarfile.TarInfo("fine"), io.BytesIO())
        archive.addfile(tarfile.TarInfo(name), io.BytesIO())
    with pytest.raises(CorruptEntryError, match="not a plain file"):
        unpack_files(tmp_path / "archive.tar", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE])
def test_what_is_no_file(tmp_path: Path, kind: bytes) -> None:
    member = tarfile.TarInfo("member")
    member.type, member.linkname = kind, "/etc/passwd"
    with tarfile.open(tmp_path / "archive.tar", "w") as archive:
        archive.addfile(member)
    with pytest.raises(CorruptEntryError, match="not a plain file"):
        unpack_files(tmp_path / "archive.tar", tmp_path / "out")


def test_what_is_no_archive(tmp_path: Path) -> None:
    (tmp_path / "archive.tar").write_bytes(b"x" * 2000)
    with pytest.raises(CorruptEntryError, match="is not an archive"):
        unpack_files(tmp_path / "archive.tar", tmp_path)
