"""SHA-256 as a value type, canonical JSON, and hashing of bytes and files.

Canonical JSON is UTF-8 with sorted keys, no white space, no NaN and no infinity, so that equal documents
have equal bytes on every machine and Python version.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipevault.reading import chunks, open_regular

SHORT_LENGTH = 12
_PATTERN = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, order=True)
class Digest:
    """64 hexadecimal digits that name bytes or an entry: a full SHA-256, or an entry's key, which is composed of two of
    them (:attr:`pipevault.key.Key.digest`). It is written whole on disk; :attr:`short` is for screens only.
    """

    hex: str

    def __post_init__(self) -> None:
        if not _PATTERN.fullmatch(self.hex):
            raise ValueError(f"{self.hex!r} is not a digest. Give 64 lower-case hexadecimal digits.")

    @property
    def short(self) -> str:
        return self.hex[:SHORT_LENGTH]

    def __str__(self) -> str:
        return self.hex


def canonical_json(document: Any) -> bytes:
    """Return the one byte form of ``document``; ``ValueError`` or ``TypeError`` if it is not plain JSON."""
    text = json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return text.encode("utf-8")


def digest_bytes(data: bytes) -> Digest:
    return Digest(hashlib.sha256(data).hexdigest())


def digest_json(document: Any) -> Digest:
    return digest_bytes(canonical_json(document))


def digest_chunks(pieces: Iterable[bytes | memoryview], *sinks: Callable[[bytes | memoryview], object]) -> Digest:
    """Return the digest of bytes that come in pieces, and hand each piece to ``sinks`` on the way."""
    hasher = hashlib.sha256()
    for piece in pieces:
        hasher.update(piece)
        for sink in sinks:
            sink(piece)
    return Digest(hasher.hexdigest())


def digest_file(path: Path) -> Digest:
    """Return the digest of a regular file. Raises ``OSError`` if ``path`` cannot be read."""
    with open_regular(path) as file:
        return digest_chunks(chunks(file))
