"""Reading entries: one manifest, one artifact, a key by its beginning."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from pipevault.digest import Digest
from pipevault.errors import CorruptEntryError, UnknownKeyError
from pipevault.files.opened import open_verified
from pipevault.reading import read_file
from pipevault.store.layout import Layout
from pipevault.store.manifest import ArtifactRef, Manifest

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
