"""The file of a bundle: written from files, and read with every byte checked.

:mod:`pipevault.store.bundle_zip` is the container, :mod:`pipevault.store.bundle_index` its first member.
"""

from __future__ import annotations

import hashlib
import os
import stat
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from pipevault.digest import Digest
from pipevault.errors import BundleError, CorruptEntryError, PipevaultError
from pipevault.store.atomic import vault_errors
from pipevault.store.bundle_index import INDEX_LIMIT_BYTES, INDEX_NAME, BundleIndex, Member
from pipevault.store.bundle_zip import (
    LOCAL_HEADER_SIZE_BYTES,
    Stored,
    end_of_file,
    file_size_bytes,
    local_header,
    parse_local_header,
    rest_of_header_size_bytes,
)

Progress = Callable[[int, int], None]
"""Called with the bytes done so far and the bytes in all."""

_CHUNK_SIZE_BYTES = 1 << 20
_NOTHING_IMPORTED = "Nothing was imported; get the bundle again."


def ignore_progress(done_bytes: int, total_bytes: int) -> None:
    """Tells nobody."""
    del done_bytes, total_bytes


def write_bundle(file: BinaryIO, index: BundleIndex, root: Path, progress: Progress) -> int:
    """Write the bundle of ``index`` from the vault at ``root`` to the empty, seekable ``file``; its size in bytes.

    :class:`CorruptEntryError`: a member's file does not have the bytes that the index says. An ``OSError`` of ``file``
    passes.
    """
    data = index.to_bytes()
    total_bytes, done_bytes = sum(member.size_bytes for member in index.members), 0
    stored = [Stored(INDEX_NAME, len(data), zlib.crc32(data))]
    file.write(local_header(stored[0]) + data)
    for member in index.members:
        start, source = file.tell(), root / member.name
        file.write(local_header(Stored(member.name, member.size_bytes, 0)))
        hasher, crc32, size_bytes = hashlib.sha256(), 0, 0
        for chunk in _chunks(source):
            hasher.update(chunk)
            crc32 = zlib.crc32(chunk, crc32)
            size_bytes += len(chunk)
            file.write(chunk)
            progress(done_bytes + size_bytes, total_bytes)
        if (Digest(hasher.hexdigest()), size_bytes) != (member.digest, member.size_bytes):
            raise CorruptEntryError(
                f"{source} is damaged: it does not have the {member.size_bytes} bytes with digest "
                f"{member.digest.short} that were published. Run `pipevault verify --fix` and freeze the entry again.",
                source,
            )
        done_bytes += size_bytes
        stored.append(Stored(member.name, size_bytes, crc32))
        file.seek(start)  # only now is the CRC-32 known that the header holds
        file.write(local_header(stored[-1]))
        file.seek(0, os.SEEK_END)
    file.write(end_of_file(stored))
    return file.tell()


def _chunks(source: Path) -> Iterator[bytes]:
    with vault_errors(source, "read"), source.open("rb") as reader:
        while chunk := reader.read(_CHUNK_SIZE_BYTES):
            yield chunk


class BundleFile:
    """A bundle that is open for reading; its index is verified, and the file's size is what the index says."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self.path = path
        self._file = file
        first, data = self._read_index()
        self.index = BundleIndex.from_bytes(data, path)
        self._stored_index = first
        sizes = [(INDEX_NAME, len(data)), *((member.name, member.size_bytes) for member in self.index.members)]
        expected_bytes, found_bytes = file_size_bytes(sizes), os.fstat(file.fileno()).st_size
        if found_bytes != expected_bytes:
            what = "was cut off" if found_bytes < expected_bytes else "has something added"
            raise self._bad(f"it {what}: it has {found_bytes} bytes, and its index makes {expected_bytes}")
        self._offsets, offset = {}, file.tell()
        for member in self.index.members:
            self._offsets[member] = offset
            offset += len(local_header(Stored(member.name, member.size_bytes, 0))) + member.size_bytes

    def read(self, member: Member) -> bytes:
        """The verified bytes of ``member``, a manifest or a signature. :class:`BundleError`."""
        chunks: list[bytes] = []
        self._file.seek(self._offsets[member])
        self._read_member(member, chunks.append)
        return b"".join(chunks)

    def extract(self, target_of: Callable[[Member], Path | None], progress: Progress) -> None:
        """Verify the whole file and write each member to the new file that ``target_of`` gives for it, if any.

        :class:`BundleError`: what was written is not to be used. An ``OSError`` in writing passes.
        """
        total_bytes, done_bytes = sum(member.size_bytes for member in self.index.members), 0
        stored = [self._stored_index]

        def count(chunk: bytes) -> None:
            nonlocal done_bytes
            done_bytes += len(chunk)
            progress(done_bytes, total_bytes)

        for member in self.index.members:
            self._file.seek(self._offsets[member])
            target = target_of(member)
            if target is None:
                stored.append(self._read_member(member, count))
                continue
            # os.open, so that the file is this user's alone from the start
            with open(target, "xb", opener=lambda path, flags: os.open(path, flags, 0o600)) as writer:

                def take(chunk: bytes, writer: BinaryIO = writer) -> None:
                    writer.write(chunk)
                    count(chunk)

                stored.append(self._read_member(member, take))
        if self._read_exactly(len(end := end_of_file(stored))) != end or self._read(1):
            raise self._bad("its end does not fit its members")

    def _read_index(self) -> tuple[Stored, bytes]:
        start = self._read(LOCAL_HEADER_SIZE_BYTES)
        try:
            stored = parse_local_header(start + self._read(rest_of_header_size_bytes(start)))
        except ValueError as error:
            raise self._no_bundle(str(error)) from error
        if stored.name != INDEX_NAME:
            raise self._no_bundle(f"its first member is {stored.name!r}, not {INDEX_NAME!r}")
        if stored.size_bytes > INDEX_LIMIT_BYTES:
            raise self._bad(f"its index has {stored.size_bytes} bytes; the limit is {INDEX_LIMIT_BYTES}")
        data = self._read_exactly(stored.size_bytes)
        if zlib.crc32(data) != stored.crc32:
            raise self._bad("the bytes of its index do not have the CRC-32 that stands before them")
        return stored, data

    def _read_member(self, member: Member, take: Callable[[bytes], None]) -> Stored:
        """Hand the bytes of ``member``, whose header comes next, to ``take``; what it really is."""
        expected = Stored(member.name, member.size_bytes, 0)
        header = self._read_exactly(len(local_header(expected)))
        try:
            stored = parse_local_header(header)
        except ValueError as error:
            raise self._bad(f"{error}, before {member.name}") from error
        if (stored.name, stored.size_bytes) != (member.name, member.size_bytes):
            raise self._bad(f"{stored.name!r} with {stored.size_bytes} bytes stands where its index has {member.name}")
        hasher, crc32, left_bytes = hashlib.sha256(), 0, member.size_bytes
        while left_bytes:
            chunk = self._read_exactly(min(left_bytes, _CHUNK_SIZE_BYTES))
            left_bytes -= len(chunk)
            hasher.update(chunk)
            crc32 = zlib.crc32(chunk, crc32)
            take(chunk)
        if Digest(hasher.hexdigest()) != member.digest or crc32 != stored.crc32:
            raise self._bad(f"the bytes of {member.name} are not those that its index says")
        return stored

    def _read_exactly(self, size_bytes: int) -> bytes:
        data = self._read(size_bytes)
        if len(data) != size_bytes:
            raise self._bad("it was cut off")
        return data

    def _read(self, size_bytes: int) -> bytes:
        try:
            return self._file.read(size_bytes)
        except OSError as error:
            raise self._bad(f"it cannot be read: {error.strerror or error}") from error

    def _bad(self, reason: str) -> BundleError:
        return BundleError(f"The bundle {self.path} is damaged: {reason}. {_NOTHING_IMPORTED}", self.path)

    def _no_bundle(self, reason: str) -> BundleError:
        return BundleError(
            f"{self.path} is no bundle: {reason}. Give a file that `pipevault export` wrote.",
            self.path,
        )


@contextmanager
def open_bundle(path: Path) -> Iterator[BundleFile]:
    """The bundle at ``path``. :class:`BundleError`, :class:`NewerBundleError`, also for what cannot be read."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # to open a named pipe would wait for a writer
            raise BundleError(f"{path} is no regular file. Give a file that `pipevault export` wrote.", path)
        file = path.open("rb")
    except PipevaultError:
        raise
    except OSError as error:
        raise BundleError(f"The bundle {path} cannot be read: {error.strerror or error}.", path) from error
    with file:
        yield BundleFile(file, path)
