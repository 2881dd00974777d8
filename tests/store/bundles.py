"""Bundles made by hand, for what a writer of bundles would never write."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from pipevault.digest import canonical_json, digest_bytes
from pipevault.store.bundle_index import INDEX_NAME
from pipevault.store.bundle_zip import Stored, end_of_file, local_header
from pipevault.store.vault import Vault

Files = Sequence[tuple[str, bytes]]


def index_document(files: Files) -> dict[str, Any]:
    """The body of the index that describes ``files`` truly, in their order, whatever they are."""
    members = [{"digest": digest_bytes(data).hex, "name": name, "size_bytes": len(data)} for name, data in files]
    return {"members": members, "pipevault_bundle": 2}


def sealed(document: dict[str, Any]) -> bytes:
    body = {name: value for name, value in document.items() if name != "self_digest"}
    return canonical_json({**body, "self_digest": digest_bytes(canonical_json(body)).hex})


def bundle_bytes(index: bytes, files: Iterable[tuple[str, bytes]]) -> bytes:
    """A container of ``index`` and ``files``, its own records true."""
    stored, parts = [], []
    for name, data in [(INDEX_NAME, index), *files]:
        stored.append(Stored(name, len(data), zlib.crc32(data)))
        parts.append(local_header(stored[-1]) + data)
    return b"".join(parts) + end_of_file(stored)


def honest_bundle(files: Files) -> bytes:
    """The index describes ``files`` as they are; only their names and contents may be wrong."""
    return bundle_bytes(sealed(index_document(files)), files)


def files_of(vault: Vault) -> list[tuple[str, bytes]]:
    """The members of a bundle of the whole vault, sorted by name."""
    folders = (vault.layout.artifacts_dir, vault.layout.entries_dir, vault.layout.signatures_dir)
    paths = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    return sorted((path.relative_to(vault.root).as_posix(), path.read_bytes()) for path in paths)


def everything_below(folder: Path) -> dict[str, bytes | None]:
    """Each path below ``folder`` with its bytes, ``None`` for a folder."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }
