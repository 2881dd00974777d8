"""The file of a bundle: a zip file of one form, written by the standard library and read by writing it once more.

Every member is stored uncompressed, dated 1980-01-01, with the mode 0644; members follow one another without a gap. So
names and contents decide each byte of the file. A reader takes the names and sizes from the zip's directory, and hands
the contents to the same writer, whose every byte must stand in the file already: a second name for a member, a link, a
compressed or hidden member, a lie about a size or CRC-32, or anything before, between or after is a difference.
"""

from __future__ import annotations

import io
import os
import struct
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import IO

import msgspec

from pipevault.digest import Digest, canonical_json, digest_chunks
from pipevault.errors import BundleError, NewerBundleError, NoBundleError
from pipevault.files.byte_progress import Progress
from pipevault.files.documents import Format
from pipevault.reading import open_regular
from pipevault.store.layout import Layout
from pipevault.store.marker import VAULT_VERSION

MARKER = canonical_json({"pipevault_vault": VAULT_VERSION})
"""A bundle's ``vault.json``, which tells no time, unlike that of a vault in a folder."""
MARKER_NAME = "vault.json"
MEMBER_LIMIT = 200_000
MANIFEST_LIMIT_BYTES = 16 << 20
SIGNATURE_LIMIT_BYTES = 4096

_OLD_FIRST_NAME = "pipevault_bundle.json"
_READ_LIMIT_BYTES = 48 << 20
"""The most that one read takes: more than the directory of so many members takes."""
_CHUNK_SIZE_BYTES = 1 << 20
_HEADER_SIZE_BYTES = 30
"""The bytes before the name of a small member."""
_ROOT = Path("/")
_LAYOUT = Layout(_ROOT)


@dataclass(frozen=True)
class Member:
    """A file of the bundle other than its marker: the manifest of ``key``, the bytes of ``artifact``, or a signature of
    the entry ``signed_key``. ``name`` is its path in a vault, with ``/``.
    """

    name: str
    size_bytes: int
    key: Digest | None
    artifact: Digest | None
    signed_key: Digest | None


class _Marker(msgspec.Struct, forbid_unknown_fields=True):
    pipevault_vault: int


_FORMAT = Format(
    _Marker,
    "pipevault_vault",
    VAULT_VERSION,
    damaged=lambda problem: _bad(problem.path, f"its {MARKER_NAME} is not {MARKER.decode()}: {problem.what}"),
    newer=lambda problem: NewerBundleError(
        f"The {MARKER_NAME} of the bundle {problem} Upgrade pipevault. Nothing was imported.", problem.path
    ),
)


@contextmanager
def new_member(bundle: zipfile.ZipFile, name: str, size_bytes: int) -> Iterator[IO[bytes]]:
    """Write the next member, whose content of ``size_bytes`` the block writes."""
    info = zipfile.ZipInfo(name)  # dated 1980-01-01
    info.create_system = 3  # Unix, so that the mode counts
    info.external_attr = 0o100644 << 16
    info.file_size = size_bytes
    with bundle.open(info, "w") as file:
        yield file


@contextmanager
def open_bundle(path: Path) -> Iterator[BundleFile]:
    """Open the bundle at ``path``. :class:`NoBundleError`: nothing is there. :class:`BundleError`,
    :class:`NewerBundleError`: also for what cannot be read.
    """
    try:
        file = _Limited(open_regular(path))
    except FileNotFoundError as error:
        raise NoBundleError(f"The bundle {path} does not exist. Give the path of one.", path) from error
    except OSError as error:
        raise BundleError(f"The bundle {path} cannot be read: {error.strerror or error}.", path) from error
    with file:
        try:
            yield BundleFile(file, path)
        except _ReadError as error:
            raise BundleError(f"The bundle {path} cannot be read: {error}. Nothing was imported.", path) from error


class BundleFile:
    """A bundle that is open for reading; its marker, and the names and sizes of its members are sound."""

    def __init__(self, file: _Limited, path: Path) -> None:
        self.path = path
        self._file = file
        self._size_bytes = os.fstat(file.fileno()).st_size
        try:
            listed = [(info.filename, info.file_size) for info in zipfile.ZipFile(file).infolist()]
        except _UNREADABLE as error:
            raise BundleError(
                f"{path} is not a bundle, or was cut off: {error}. Give a file that `pipevault export` wrote.", path
            ) from error
        first, marker_bytes = listed[0] if listed else ("", 0)
        if first == _OLD_FIRST_NAME:
            raise BundleError(
                f"{path} is a bundle of an older form. Nothing was imported; export again with this pipevault.", path
            )
        if first != MARKER_NAME or not 0 <= marker_bytes <= _CHUNK_SIZE_BYTES:
            raise BundleError(
                f"{path} is not a bundle: its first member is {first!r}, not {MARKER_NAME}. Give a file that "
                "`pipevault export` wrote.",
                path,
            )
        self._file.seek(_HEADER_SIZE_BYTES + len(MARKER_NAME))
        _FORMAT.parse(self._file.read(marker_bytes), path)
        names = [name for name, _ in listed[1:]]
        if len(names) > MEMBER_LIMIT:
            raise self.bad(f"it has {len(names)} members; the limit is {MEMBER_LIMIT}")
        self.members = tuple(self._member(name, size_bytes) for name, size_bytes in listed[1:])
        if any(one >= other for one, other in pairwise(names)):
            raise self.bad("its members are not sorted, or two share a name")
        if not self.keys:
            raise self.bad("it holds no entry")
        if sum(size_bytes for _, size_bytes in listed) > self._size_bytes:
            raise self.bad(f"its members are said to be larger than the file, which has {self._size_bytes} bytes")

    @property
    def keys(self) -> tuple[Digest, ...]:
        return tuple(sorted(member.key for member in self.members if member.key is not None))

    def extract(self, folder: Path, is_wanted: Callable[[Member], bool], progress: Progress) -> None:
        """Verify the whole file, and write each member that is wanted to its name in ``folder``; after a
        :class:`BundleError` nothing of it is to be used. An ``OSError`` in writing passes.
        """
        same = _Same(self._file)
        total_bytes, done_bytes = sum(member.size_bytes for member in self.members), 0

        def count(chunk: bytes | memoryview) -> None:
            nonlocal done_bytes
            done_bytes += len(chunk)
            progress(done_bytes, total_bytes)

        progress(0, total_bytes)
        with zipfile.ZipFile(same, "w") as again:
            with new_member(again, MARKER_NAME, len(MARKER)) as copy:
                copy.write(MARKER)
            for member in self.members:
                with (
                    new_member(again, member.name, member.size_bytes) as copy,
                    _target(folder, member, is_wanted) as out,
                ):
                    digest = digest_chunks(self._chunks(same.tell(), member), copy.write, out.write, count)
                if member.artifact not in (None, digest):
                    raise self.bad(f"the bytes of {member.name} have digest {digest.short}")
        if same.tell() != self._size_bytes:
            raise self.bad(f"it has {self._size_bytes} bytes, and its members make {same.tell()}")
        if (place := same.first_difference) is not None:
            raise self.bad(f"at byte {place} it differs from what `pipevault export` writes for these members")

    def bad(self, reason: str) -> BundleError:
        return _bad(self.path, reason)

    def _member(self, name: str, size_bytes: int) -> Member:
        place = _ROOT / name
        key, artifact = _LAYOUT.key_of_manifest(place), _LAYOUT.digest_of_artifact(place)
        signed_key = _LAYOUT.key_of_signature(place)
        # "entries//x", "./x" and the like are another spelling of a place.
        if not (key or artifact or signed_key) or place.as_posix() != f"/{name}":
            raise self.bad(f"{name!r} is not a place in a vault")
        limit_bytes = MANIFEST_LIMIT_BYTES if key else SIGNATURE_LIMIT_BYTES if signed_key else self._size_bytes
        if not 0 <= size_bytes <= limit_bytes:
            raise self.bad(f"{name!r} has {size_bytes} bytes; the limit is {limit_bytes}")
        return Member(name, size_bytes, key, artifact, signed_key)

    def _chunks(self, place: int, member: Member) -> Iterator[bytes]:
        left_bytes = member.size_bytes
        while left_bytes:
            self._file.seek(place)
            chunk = self._file.read(min(left_bytes, _CHUNK_SIZE_BYTES))
            if not chunk:
                raise self.bad("it was cut off")
            yield chunk
            place += len(chunk)
            left_bytes -= len(chunk)


def _bad(path: Path, reason: str) -> BundleError:
    return BundleError(f"The bundle {path} is damaged: {reason}. Nothing was imported; get the bundle again.", path)


class _ReadError(Exception):
    """The file of a bundle cannot be read."""


class _Limited(io.BufferedReader):
    """A file whose reads do not fill the memory, whatever size a directory claims to have."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is not None and size > _READ_LIMIT_BYTES:
            raise zipfile.BadZipFile(f"its directory is said to have {size} bytes; the limit is {_READ_LIMIT_BYTES}")
        try:
            return super().read(_READ_LIMIT_BYTES if size is None or size < 0 else size)
        except OSError as error:
            raise _ReadError(error.strerror or str(error)) from error


class _Same:
    """A file to write to that only compares with another one, and notes where that differs.

    What is written again at the same place counts again, as a member's header does once its CRC-32 is known.
    """

    def __init__(self, file: _Limited) -> None:
        self._file = file
        self._place = 0
        self._different: set[tuple[int, int]] = set()

    @property
    def first_difference(self) -> int | None:
        return min(self._different)[0] if self._different else None

    def write(self, data: bytes, /) -> int:
        self._file.seek(self._place)
        piece = (self._place, len(data))
        if self._file.read(len(data)) == data:
            self._different.discard(piece)
        else:
            self._different.add(piece)
        self._place += len(data)
        return len(data)

    def seek(self, place: int, whence: int = 0, /) -> int:
        if whence != os.SEEK_SET:
            raise io.UnsupportedOperation("Only places from the start are known.")
        self._place = place
        return place

    def tell(self) -> int:
        return self._place

    def flush(self) -> None:
        """Do nothing: nothing waits."""

    def close(self) -> None:
        """Do nothing: the other file is the caller's."""


_UNREADABLE = (zipfile.BadZipFile, NotImplementedError, ValueError, struct.error, OverflowError, EOFError, OSError)
"""The errors that :mod:`zipfile` raises for the directories that others make."""


@contextmanager
def _target(folder: Path, member: Member, is_wanted: Callable[[Member], bool]) -> Iterator[IO[bytes]]:
    if not is_wanted(member):
        with open(os.devnull, "wb") as nowhere:
            yield nowhere
        return
    target = folder / member.name  # checked to be a place of the layout
    target.parent.mkdir(parents=True, exist_ok=True)
    # os.open, so that the file is this user's alone from the start
    with open(target, "xb", opener=lambda path, flags: os.open(path, flags, 0o600)) as file:
        yield file
