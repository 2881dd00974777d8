"""Bundles made by hand, for what a writer of bundles would never write."""

from __future__ import annotations

import io
import warnings
import zipfile
from collections.abc import Sequence
from pathlib import Path

from pipevault.store.bundle.zip_file import MARKER, MARKER_NAME, new_member
from pipevault.store.vault import Vault

Files = Sequence[tuple[str, bytes]]


def bundle_bytes(files: Files, *, marker: bytes = MARKER, marker_name: str = MARKER_NAME) -> bytes:
    """The container of ``files`` in their order, its own records true; only names and contents may be wrong."""
    file = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(file, "w") as bundle:
        warnings.simplefilter("ignore")  # a name that stands there twice
        for name, data in [(marker_name, marker), *files]:
            with new_member(bundle, name, len(data)) as member:
                member.write(data)
    return file.getvalue()


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
