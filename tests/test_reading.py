"""Nothing but a regular file of bounded size is read, and nothing in its place blocks."""

from __future__ import annotations

import os
import socket
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest

from pipevault.digest import digest_bytes, digest_chunks, digest_file
from pipevault.reading import chunks, open_place, open_regular, read_file


def _socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(path))


PLACES: dict[str, Callable[[Path], None]] = {
    "pipe": lambda path: os.mkfifo(path),
    "socket": _socket,
    "folder": lambda path: path.mkdir(),
    "endless device": lambda path: path.symlink_to("/dev/zero"),
}


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)  # a socket's path has at most 107 bytes
    return Path("file")


@pytest.mark.parametrize("place", PLACES)
def test_only_regular_files_are_read(path: Path, place: str) -> None:
    PLACES[place](path)
    before = len(os.listdir("/dev/fd"))
    for read in (read_file, open_regular):
        with pytest.raises(OSError, match=str(path)) as caught:
            read(path)
        assert caught.value.filename == str(path)
    assert len(os.listdir("/dev/fd")) == before


def test_a_large_file_is_refused_without_reading_it(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(200_000_000)
    tracemalloc.start()
    try:
        with pytest.raises(OSError, match="more than"):
            read_file(path)
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()


def test_the_limit_itself_is_read(path: Path) -> None:
    path.write_bytes(b"12345")
    assert read_file(path, limit_bytes=5) == b"12345"
    with pytest.raises(OSError, match="more than 4 bytes"):
        read_file(path, limit_bytes=4)


def test_a_link_is_refused_where_links_are_not_followed(path: Path) -> None:
    Path("target").write_bytes(b"1")
    path.symlink_to("target")
    assert read_file(path) == b"1"
    with pytest.raises(OSError, match="file"):
        read_file(path, follow_links=False)


def test_a_place_is_opened_whatever_stands_there_but_a_link(path: Path) -> None:
    for place in ("pipe", "folder"):
        PLACES[place](Path(place))
        os.close(open_place(Path(place)))
    path.symlink_to("folder")
    with pytest.raises(OSError, match="file"):
        open_place(path)


@pytest.mark.parametrize("size_bytes", [0, 1, 1 << 20, (1 << 20) + 1, 5_000_000])
def test_pieces_make_the_whole(path: Path, size_bytes: int) -> None:
    data = os.urandom(size_bytes)
    path.write_bytes(data)
    with open_regular(path) as file:
        assert b"".join(chunks(file)) == data
    with open_regular(path) as file:
        assert b"".join(chunks(file, 1000)) == data[:1000]
    sink, other = bytearray(), bytearray()
    with open_regular(path) as file:
        assert digest_chunks(chunks(file), sink.extend, other.extend) == digest_bytes(data) == digest_file(path)
    assert sink == other == data
