"""Reading entries: one manifest, one artifact, all manifests, a shelf, a key by its beginning. Nothing here writes."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pipevault.digest import Digest
from pipevault.errors import CorruptEntryError, NewerVaultError, UnknownKeyError, VaultError
from pipevault.files.opened import open_verified
from pipevault.reading import read_file
from pipevault.store.layout import SYSTEM_NAMES, Layout
from pipevault.store.manifest import ArtifactRef, Manifest

_SHOWN_CANDIDATES = 10


@dataclass(frozen=True)
class BrokenManifest:
    """A file at a manifest's place that is not the manifest of ``key``; ``reason`` is a sentence."""

    path: Path
    reason: str
    key: Digest


def read_manifest(layout: Layout, key: Digest) -> Manifest | None:
    """The manifest of ``key``, verified; ``None`` if there is none.

    :class:`CorruptEntryError` if it is unreadable, edited or another key's; :class:`NewerVaultError`.
    """
    path = layout.manifest_file(key)
    try:
        data = read_file(path)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise CorruptEntryError(f"The manifest {path} cannot be read: {error.strerror}.", path) from error
    return parse_manifest(data, path, key)


def parse_manifest(data: bytes, path: Path, key: Digest) -> Manifest:
    """The manifest of ``key`` in the bytes of the file at ``path``, verified. Raises like :func:`read_manifest`."""
    manifest = Manifest.from_bytes(data, path)
    if manifest.key.digest != key:
        raise CorruptEntryError(
            f"The manifest {path} is damaged: it belongs to key {manifest.key.digest.short}, not {key.short}",
            path,
        )
    return manifest


def check_artifact(layout: Layout, ref: ArtifactRef) -> Path:
    """The path of ``ref``'s bytes, whose size and digest were compared just now; else
    :class:`CorruptEntryError`.
    """
    path = layout.artifact_file(ref.digest)
    open_verified(path, ref.digest, ref.size_bytes, what=f"Artifact {ref.name}").close()
    return path


def iter_keys(layout: Layout, prefix: str = "") -> Iterator[Digest]:
    """The keys that have a manifest file, sorted, whether or not it is intact.

    The folder of a key is named by its last digits, so the names in all of them are listed whatever ``prefix`` is.
    """
    shelves = (shelf for shelf in _children(layout.entries_dir) if layout.is_shard(shelf))
    yield from sorted(key for shelf in shelves for key in _keys_in(layout, shelf, prefix))


def shelf_keys(layout: Layout, shelf: Digest) -> list[Digest]:
    """The keys on ``shelf`` that have a manifest file, sorted; one folder is listed and no file opened.

    An absent folder holds none. :class:`~pipevault.errors.VaultError`: it cannot be read.
    """
    return _keys_in(layout, layout.shelf_dir(shelf))


def iter_manifests(layout: Layout, shelf: Digest | None = None) -> Iterator[Manifest | BrokenManifest]:
    """Every manifest, or those on ``shelf``, sorted by key; one that vanishes meanwhile is left out."""
    for key in iter_keys(layout) if shelf is None else shelf_keys(layout, shelf):
        try:
            manifest = read_manifest(layout, key)
        except (CorruptEntryError, NewerVaultError) as error:
            yield BrokenManifest(layout.manifest_file(key), str(error), key)
        else:
            if manifest is not None:
                yield manifest


def find_manifest(layout: Layout, prefix: str) -> Manifest:
    """The one manifest whose key begins with ``prefix``; else :class:`UnknownKeyError`. Raises like
    :func:`read_manifest`.
    """
    wanted = prefix.strip().lower()
    if not re.fullmatch(r"[0-9a-f]{1,64}", wanted):
        raise UnknownKeyError(f"{prefix!r} is no key: give its first hexadecimal digits.", prefix)
    keys = list(iter_keys(layout, wanted))
    if len(keys) > 1:
        shown = ", ".join(key.short for key in keys[:_SHOWN_CANDIDATES])
        more = f" and {len(keys) - _SHOWN_CANDIDATES} more" if len(keys) > _SHOWN_CANDIDATES else ""
        raise UnknownKeyError(
            f"{len(keys)} keys begin with {prefix}: {shown}{more}. Give more digits.",
            prefix,
            tuple(key.hex for key in keys),
        )
    manifest = read_manifest(layout, keys[0]) if keys else None
    if manifest is None:
        raise UnknownKeyError(f"No entry of {layout.root} has a key that begins with {prefix}.", prefix)
    return manifest


def iter_foreign(layout: Layout) -> Iterator[Path]:
    """Files, folders and links that the layout does not know, sorted; of a foreign folder only the folder
    itself.
    """
    for path in _children(layout.root):
        if path == layout.vault_file or path.name in SYSTEM_NAMES:
            continue
        if path not in layout.folders or not _is_real_folder(path):
            yield path
            continue
        for child in _children(path):
            if not layout.owns(child):
                yield child
            elif layout.is_shard(child):
                if _is_real_folder(child):
                    yield from (file for file in _children(child) if not layout.owns(file))
                else:
                    yield child


def _keys_in(layout: Layout, shelf: Path, prefix: str = "") -> list[Digest]:
    """The keys that have a manifest file in the folder ``shelf`` and begin with ``prefix``, sorted."""
    files = (file for file in _children(shelf) if file.name.startswith(prefix))
    return [key for file in files if (key := layout.key_of_manifest(file)) is not None]


def _is_real_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def _children(folder: Path) -> list[Path]:
    try:
        return [folder / name for name in sorted(os.listdir(folder))]
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise VaultError(f"{folder} cannot be read: {error.strerror}. Mend its permissions.", folder) from error
