"""Reading entries: one manifest, one artifact, all manifests, an entry by the beginning of its key."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from pipevault.digest import Digest
from pipevault.errors import CorruptEntryError, NewerVaultError, UnknownKeyError
from pipevault.files.opened import open_verified
from pipevault.reading import read_file
from pipevault.store.layout import Layout
from pipevault.store.manifest import ArtifactRef, Manifest
from pipevault.store.places import iter_keys

_SHOWN_CANDIDATES = 10


@dataclass(frozen=True)
class BrokenManifest:
    """A file at a manifest's place that is not the manifest of ``key``; ``reason`` is a sentence."""

    path: Path
    reason: str
    key: Digest


def read_manifest(layout: Layout, key: Digest) -> Manifest | None:
    """Return the manifest of ``key``, verified; ``None`` if there is none.

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
    """Return the manifest of ``key`` in the bytes of the file ``path``. Raises like :func:`read_manifest`."""
    manifest = Manifest.from_bytes(data, path)
    if manifest.key.digest != key:
        raise CorruptEntryError(
            f"The manifest {path} is damaged: it belongs to key {manifest.key.digest.short}, not {key.short}",
            path,
        )
    return manifest


def check_artifact(layout: Layout, ref: ArtifactRef) -> Path:
    """Return the path of ``ref``'s bytes, whose size and digest were compared just now; :class:`CorruptEntryError`."""
    path = layout.artifact_file(ref.digest)
    open_verified(path, ref.digest, ref.size_bytes, what=f"Artifact {ref.name}").close()
    return path


def iter_manifests(layout: Layout) -> Iterator[Manifest | BrokenManifest]:
    """Give every manifest, sorted by key; one that vanishes meanwhile is left out."""
    for key in iter_keys(layout):
        try:
            manifest = read_manifest(layout, key)
        except (CorruptEntryError, NewerVaultError) as error:
            yield BrokenManifest(layout.manifest_file(key), str(error), key)
        else:
            if manifest is not None:
                yield manifest


def find_manifest(layout: Layout, prefix: str) -> Manifest:
    """Return the manifest whose key begins with ``prefix``. Raises like :func:`the_key`, :func:`read_manifest`."""
    key = the_key(prefix, iter_keys(layout), f"entry of {layout.root}")
    manifest = read_manifest(layout, key)
    if manifest is None:
        raise UnknownKeyError(f"The entry of {key.short} was removed from {layout.root} just now.", prefix)
    return manifest


def the_key(prefix: str, keys: Iterable[Digest], what: str) -> Digest:
    """Return the one of ``keys``, those of each ``what``, that begins with ``prefix``.

    :class:`~pipevault.errors.UnknownKeyError`: none or, with ``candidates``, several.
    """
    wanted = prefix.strip().lower()
    if not re.fullmatch(r"[0-9a-f]{1,64}", wanted):
        raise UnknownKeyError(f"{prefix!r} is not a key: give its first hexadecimal digits.", prefix)
    found = sorted(key for key in keys if key.hex.startswith(wanted))
    if len(found) == 1:
        return found[0]
    if not found:
        raise UnknownKeyError(f"No {what} has a key that begins with {prefix}.", prefix)
    shown = ", ".join(key.short for key in found[:_SHOWN_CANDIDATES])
    more = f" and {len(found) - _SHOWN_CANDIDATES} more" if len(found) > _SHOWN_CANDIDATES else ""
    raise UnknownKeyError(
        f"{len(found)} keys begin with {prefix}: {shown}{more}. Give more digits.",
        prefix,
        tuple(key.hex for key in found),
    )
