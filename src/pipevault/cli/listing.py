"""The rows of ``pipevault ls``. Those of a large vault are remembered in the user's cache folder.

Parsing thousands of manifests takes seconds, so ``pipevault/listings/<16 digits>.json`` holds, for each key, the stamp
of its manifest (times, inode, size) and its row; the digits are the first of the SHA-256 of the vault's path. A
manifest whose stamp differs is read again. The file only decides what is shown; one that cannot be read is replaced.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import msgspec

from pipevault import __version__
from pipevault.digest import Digest, digest_bytes
from pipevault.errors import CorruptEntryError, NewerVaultError, NoHomeError, VaultError
from pipevault.reading import read_file
from pipevault.settings.user_folders import user_folder

if TYPE_CHECKING:
    from pipevault.store.manifest import Manifest
    from pipevault.store.vault import BrokenManifest, Vault

REMEMBERED_FROM = 200
"""Entries; a smaller vault is read each time."""
_DIGITS = 16
_LIMIT_BYTES = 1 << 30
_FORM = f"{__version__} 3"
"""Rows that another release, or another form of them, remembered are not used."""
Describe = Callable[["Manifest"], tuple[str, ...]]
_Record: TypeAlias = tuple[str, str, tuple[str, ...], dict[str, int]]
"""Stamp, time, cells and artifacts of an entry."""


class _Listing(msgspec.Struct):
    version: str
    rows: dict[str, _Record]


@dataclass(frozen=True)
class Row:
    """An entry: ``cells`` are its texts, ``artifacts`` sizes in bytes by the first digits of a digest."""

    key: Digest
    created_at: str
    cells: tuple[str, ...]
    artifacts: Mapping[str, int]

    @property
    def size_bytes(self) -> int:
        return sum(self.artifacts.values())


def row_of(manifest: Manifest, describe: Describe) -> Row:
    """Return the row of ``manifest``."""
    artifacts = {digest.hex[:_DIGITS]: size for digest, size in manifest.artifact_sizes.items()}
    return Row(manifest.key.digest, manifest.created_at, describe(manifest), artifacts)


def read_rows(vault: Vault, describe: Describe) -> tuple[list[Row], list[BrokenManifest]]:
    """Return the entries, sorted by key, and those that cannot be used. :class:`VaultError`."""
    from pipevault.store.inventory import manifest_stamps, read_published
    from pipevault.store.read import BrokenManifest

    stamps = manifest_stamps(vault.layout)
    file = _file(vault) if len(stamps) >= REMEMBERED_FROM else None
    known = _load(file) if file else {}
    rows, broken, is_new = [], [], len(known) != len(stamps)
    remembered: dict[str, _Record] = {}
    for key, stamp in stamps.items():
        record = known.get(key.hex)
        if record is None or record[0] != stamp:
            try:
                manifest = read_published(vault.layout, key)
            except (CorruptEntryError, NewerVaultError) as error:
                broken.append(BrokenManifest(vault.layout.manifest_file(key), str(error), key))
                continue
            if manifest is None:
                continue
            row, is_new = row_of(manifest, describe), True
            record = (stamp, row.created_at, row.cells, dict(row.artifacts))
        remembered[key.hex] = record
        rows.append(Row(key, record[1], record[2], record[3]))
    if file and is_new:
        _save(file, remembered)
    return rows, broken


def _file(vault: Vault) -> Path | None:
    try:
        folder = user_folder("cache")
    except NoHomeError:
        return None
    return folder / "listings" / f"{digest_bytes(os.fsencode(vault.root)).hex[:_DIGITS]}.json"


def _load(file: Path) -> dict[str, _Record]:
    try:
        listing = msgspec.json.decode(read_file(file, limit_bytes=_LIMIT_BYTES), type=_Listing)
    except (OSError, ValueError, RecursionError):
        return {}
    return listing.rows if listing.version == _FORM else {}


def _save(file: Path, rows: dict[str, _Record]) -> None:
    from pipevault.files.atomic import make_folder, write_file

    # Without it the next listing is slower, and nothing else.
    with suppress(OSError, VaultError):
        make_folder(file.parent)
        write_file(file, msgspec.json.encode(_Listing(_FORM, rows)))
