"""The container of a bundle: a zip file of one fixed form, which any zip program opens.

Every member is stored uncompressed, carries a ZIP64 extra field whatever its size, the time 1980-01-01 and the mode
0644; members follow one another without a gap, then the central directory, then the end. So the names, sizes and
CRC-32 of the members decide every other byte, and a reader takes nothing but these bytes: a second name for a member,
a link, a compressed or hidden member, or anything before, between or after them is a difference.

Format: https://pkware.cachefly.net/webdocs/APPNOTE/APPNOTE-6.3.9.TXT, 4.3.7, 4.3.12, 4.3.14 to 4.3.16, 4.5.3.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

NAME_LIMIT_BYTES = 1024

_LOCAL = struct.Struct("<I5H3I2H")
_LOCAL_EXTRA = struct.Struct("<2H2Q")
_CENTRAL = struct.Struct("<I6H3I5H2I")
_CENTRAL_EXTRA = struct.Struct("<2H3Q")
_END_64 = struct.Struct("<IQ2H2I4Q")
_LOCATOR_64 = struct.Struct("<IIQI")
_END = struct.Struct("<I4H2IH")

_VERSION = 45  # of the format, the first with ZIP64
_MADE_BY = 3 << 8 | _VERSION  # Unix, so that the mode counts
_TIME, _DATE = 0, 1 << 5 | 1  # 1980-01-01, the earliest that the format has
_MODE = 0o100644 << 16
_IN_EXTRA_16, _IN_EXTRA_32 = 0xFFFF, 0xFFFFFFFF

LOCAL_HEADER_SIZE_BYTES = _LOCAL.size
"""Of the part of a member's header that stands before its name."""


@dataclass(frozen=True)
class Stored:
    """A member as the container knows it."""

    name: str
    size_bytes: int
    crc32: int


def local_header(member: Stored) -> bytes:
    """The bytes before the member's data."""
    name = member.name.encode("ascii")
    fixed = _LOCAL.pack(
        *(0x04034B50, _VERSION, 0, 0, _TIME, _DATE, member.crc32, _IN_EXTRA_32, _IN_EXTRA_32),
        *(len(name), _LOCAL_EXTRA.size),
    )
    return fixed + name + _LOCAL_EXTRA.pack(1, _LOCAL_EXTRA.size - 4, member.size_bytes, member.size_bytes)


def rest_of_header_size_bytes(start: bytes) -> int:
    """How much of a header follows its first :data:`LOCAL_HEADER_SIZE_BYTES`; ``ValueError`` if it is none of ours."""
    if len(start) != _LOCAL.size:
        raise ValueError("it ends too early")
    signature, *_, name_size, extra_size = _LOCAL.unpack(start)
    if signature != 0x04034B50 or name_size > NAME_LIMIT_BYTES or extra_size != _LOCAL_EXTRA.size:
        raise ValueError("a member's header is not in the form of a bundle")
    return int(name_size) + int(extra_size)


def parse_local_header(data: bytes) -> Stored:
    """The member whose header is ``data``; ``ValueError`` if a writer of bundles would have written other bytes."""
    if len(data) != _LOCAL.size + rest_of_header_size_bytes(data[: _LOCAL.size]):
        raise ValueError("it ends too early")
    crc32 = _LOCAL.unpack_from(data)[6]
    *_, size_bytes = _LOCAL_EXTRA.unpack_from(data, len(data) - _LOCAL_EXTRA.size)
    member = Stored(data[_LOCAL.size : -_LOCAL_EXTRA.size].decode("ascii"), size_bytes, crc32)
    if local_header(member) != data:
        raise ValueError("a member's header is not in the form of a bundle")
    return member


def end_of_file(members: Sequence[Stored]) -> bytes:
    """The bytes after the last member's data: the central directory and the records that end the file."""
    records, offset = [], 0
    for member in members:
        name = member.name.encode("ascii")
        fixed = _CENTRAL.pack(
            *(0x02014B50, _MADE_BY, _VERSION, 0, 0, _TIME, _DATE, member.crc32, _IN_EXTRA_32, _IN_EXTRA_32),
            *(len(name), _CENTRAL_EXTRA.size, 0, 0, 0, _MODE, _IN_EXTRA_32),
        )
        extra = _CENTRAL_EXTRA.pack(1, _CENTRAL_EXTRA.size - 4, member.size_bytes, member.size_bytes, offset)
        records.append(fixed + name + extra)
        offset += _header_size_bytes(member.name) + member.size_bytes
    directory = b"".join(records)
    count, end_offset = len(members), offset + len(directory)
    end_64 = _END_64.pack(
        *(0x06064B50, _END_64.size - 12, _MADE_BY, _VERSION, 0, 0, count, count, len(directory), offset)
    )
    locator = _LOCATOR_64.pack(0x07064B50, 0, end_offset, 1)
    end = _END.pack(0x06054B50, 0, 0, _IN_EXTRA_16, _IN_EXTRA_16, _IN_EXTRA_32, _IN_EXTRA_32, 0)
    return directory + end_64 + locator + end


def file_size_bytes(members: Iterable[tuple[str, int]]) -> int:
    """Size of the whole file, from the names and sizes of its members."""
    size_bytes = _END_64.size + _LOCATOR_64.size + _END.size
    for name, member_size_bytes in members:
        size_bytes += _header_size_bytes(name) + member_size_bytes
        size_bytes += _CENTRAL.size + len(name) + _CENTRAL_EXTRA.size
    return size_bytes


def _header_size_bytes(name: str) -> int:
    return _LOCAL.size + len(name) + _LOCAL_EXTRA.size
