"""SHA-256 as a value type, canonical JSON, and hashing of bytes and files.

Canonical JSON is UTF-8 with sorted keys, no white space, no NaN and no infinity, so that equal documents
have equal bytes on every machine and Python version.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SHORT_LENGTH = 12
_CHUNK_SIZE_BYTES = 1 << 20
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
    """The one byte form of ``document``; ``ValueError`` or ``TypeError`` if it is not plain JSON."""
    text = json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return text.encode("utf-8")


def digest_bytes(data: bytes) -> Digest:
    return Digest(hashlib.sha256(data).hexdigest())


def digest_json(document: Any) -> Digest:
    return digest_bytes(canonical_json(document))


def digest_file(path: Path) -> Digest:
    """Raises ``OSError`` if ``path`` cannot be read."""
    hasher = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_SIZE_BYTES):
            hasher.update(chunk)
    return Digest(hasher.hexdigest())
