"""The content of a vault, read in bulk: which artifacts and entries each manifest names, and the size of every file.

Each manifest is read once and each artifact looked at once. A manifest whose ``self_digest`` fits is as it was
published, so only its lists of artifacts and needed entries are parsed; any other is parsed in full.
"""

from __future__ import annotations

import heapq
import json
import os
import re
import stat
from collections.abc import Collection, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from pipevault.digest import Digest, digest_chunks
from pipevault.errors import CorruptEntryError, NewerVaultError
from pipevault.files.atomic import vault_errors
from pipevault.key import SHELF_DIGITS
from pipevault.reading import open_regular, read_file, read_open, stamp_of
from pipevault.store.layout import MANIFEST_SUFFIX, Layout, digest_or_none, stands_in
from pipevault.store.manifest import MANIFEST_VERSION, Manifest, read_manifest
from pipevault.store.places import iter_keys, key_in, spread

_MOST_SEARCHED = 16
_DIGEST_IN_TEXT = re.compile(rb"(?<![0-9a-f])[0-9a-f]{64}(?![0-9a-f])")
_LIST_START = b'{"artifacts":'
_SELF_DIGEST = re.compile(rb',"self_digest":"([0-9a-f]{64})"}')
_TAIL_BYTES = len(',"self_digest":""}') + 64
_VERSION = b'"manifest_version":'
_NEEDS = re.compile(
    rb'"manifest_version":%d,"needs":\[((?:"[0-9a-f]{64}"(?:,"[0-9a-f]{64}")*)?)\],"parts":' % MANIFEST_VERSION
)

Named = tuple[frozenset[Digest], frozenset[Digest]]
"""The artifacts and the entries that a manifest names."""


@dataclass(frozen=True)
class FoundManifest:
    """A file at a manifest's place. ``artifacts`` and ``needs``: what it names or, unless it is ``understood`` (it is
    damaged, of a later format or another key's), every digest in it.
    """

    key: Digest
    artifacts: frozenset[Digest]
    needs: frozenset[Digest]
    size_bytes: int
    modified_ns: int
    understood: bool


def find_manifests(layout: Layout) -> dict[Digest, FoundManifest]:
    """Return every manifest by its key, sorted. :class:`~pipevault.errors.VaultError`: one cannot be read."""
    found = (read_found(layout, key) for key in iter_keys(layout))
    return {manifest.key: manifest for manifest in found if manifest is not None}


def read_found(layout: Layout, key: Digest) -> FoundManifest | None:
    """Return the manifest of ``key``; ``None`` if there is none. Raises like :func:`find_manifests`."""
    path = _manifest_path(os.fspath(layout.entries_dir), key.hex)
    try:
        file = open_regular(path)
        modified_ns = os.fstat(file.fileno()).st_mtime_ns
        data = read_open(file, path)
    except FileNotFoundError:
        return None
    except OSError as error:
        with vault_errors(layout.manifest_file(key), "read"):
            raise error
    named = _named_quickly(data, key)
    understood = named is not None
    if named is None:
        named, understood = _named(data, layout.manifest_file(key), key)
    return FoundManifest(key, *named, len(data), modified_ns, understood)


def find_spread(layout: Layout, folder: Path, *, skip_unreadable: bool = False) -> dict[Digest, os.stat_result]:
    """Return every regular file at the place of a manifest, an artifact or the note of a use, as ``folder`` is
    ``entries/``, ``artifacts/`` or ``uses/``; by the digest in its name, sorted. None is opened.
    """
    digest_of = key_in if folder == layout.entries_dir else digest_or_none
    with vault_errors(folder, "listed"):
        files = spread(layout, folder, skip_unreadable=skip_unreadable)
        looked = ((digest_of(file.name), _look(file)) for file in files)
        return {digest: found for digest, found in looked if digest is not None and found is not None}


def find_files(folder: Path) -> dict[Path, os.stat_result]:
    """Return every regular file below ``folder``, which may be absent, sorted. No link is followed."""
    with vault_errors(folder, "listed"):
        paths = sorted(Path(parent, name) for parent, _, names in os.walk(folder) for name in names)
        return {path: found for path in paths if (found := _look(path))}


def statuses(folder: Path) -> list[tuple[str, os.stat_result]]:
    """Return the name and the status of each thing in ``folder``; an absent one holds nothing. No link is followed."""
    found = []
    with (
        vault_errors(folder, "listed"),
        suppress(FileNotFoundError, NotADirectoryError),
        os.scandir(folder) as entries,
    ):
        for entry in entries:
            with suppress(FileNotFoundError):
                found.append((entry.name, entry.stat(follow_symlinks=False)))
    return found


def size_bytes_of(path: Path) -> int:
    """Return the bytes of a regular file, or of all below a folder; what cannot be looked at counts as empty."""
    below = (os.path.join(folder, name) for folder, _, names in os.walk(path) for name in names)
    size_bytes = 0
    for place in (os.fspath(path), *below):
        with suppress(OSError):  # gone by now
            status = os.lstat(place)
            size_bytes += status.st_size if stat.S_ISREG(status.st_mode) else 0
    return size_bytes


def mentioned(layout: Layout, digests: Collection[Digest], *, without: Collection[Digest] = ()) -> set[Digest]:
    """Return those of ``digests`` that a manifest names, whatever it means by it; those of ``without`` do not count.
    Few are searched for in the bytes, which is much faster than to understand them. Raises like :func:`find_manifests`.
    """
    if len(digests) > _MOST_SEARCHED:
        manifests = find_manifests(layout)
        return named_by(found for key, found in manifests.items() if key not in without).intersection(digests)
    wanted = {digest: digest.hex.encode() for digest in digests}
    left_out = {f"{key}{MANIFEST_SUFFIX}" for key in without}
    found: set[Digest] = set()
    with vault_errors(layout.entries_dir, "read"):
        for file in spread(layout, layout.entries_dir) if wanted else ():
            if file.name not in left_out and key_in(file.name) is not None:
                with suppress(FileNotFoundError):
                    data = read_file(file.path)
                    found |= {digest for digest, text in wanted.items() if text in data}
    return found


def read_published(layout: Layout, key: Digest) -> Manifest | None:
    """Return the manifest of ``key``, without its ``parts``, to show it; it is as it was published.
    :func:`~pipevault.store.manifest.read_manifest` refuses any other.
    """
    with suppress(OSError, ValueError, RecursionError):
        data = read_file(layout.manifest_file(key))
        if _named_quickly(data, key) is not None:
            return Manifest.published(data)
    return read_manifest(layout, key)


def named_by(manifests: Iterable[FoundManifest]) -> set[Digest]:
    return {digest for manifest in manifests for digest in manifest.artifacts}


def newest_keys(layout: Layout, count: int, shelf: Digest | None = None) -> list[Digest]:
    """Return the keys of the ``count`` manifests that were published last, newest first, on ``shelf`` or, without one,
    on the ``count`` shelves that changed last; no file is opened.
    """
    entries = layout.entries_dir
    if shelf is not None:
        shelves = [layout.shelf_dir(shelf).name]
    else:
        changed = ((status.st_mtime_ns, name) for name, status in statuses(entries))
        shelves = [name for _, name in heapq.nlargest(count, changed)]
    files = ((name, found) for name in shelves for found in statuses(entries / name))
    times = [(status.st_mtime_ns, file) for shelf_name, (file, status) in files if stands_in(file, shelf_name)]
    return [key for _, name in heapq.nlargest(count, times) if (key := key_in(name)) is not None]


def manifest_stamps(layout: Layout) -> dict[Digest, str]:
    """Return, for each file at a manifest's place, a text that changes when the file does; none is opened."""
    stamps = {}
    with vault_errors(layout.entries_dir, "listed"):
        for file in spread(layout, layout.entries_dir):
            if (key := key_in(file.name)) is not None:
                with suppress(FileNotFoundError):
                    stamps[key] = stamp_of(file.stat())
    return stamps


def _look(file: Path | os.DirEntry[str]) -> os.stat_result | None:
    try:
        status = file.stat(follow_symlinks=False)
    except FileNotFoundError:
        return None
    return status if stat.S_ISREG(status.st_mode) else None


def _manifest_path(entries: str, key: str) -> str:
    """:meth:`Layout.manifest_file` at a tenth of its price."""
    return f"{entries}{os.sep}{key[-SHELF_DIGITS:]}{os.sep}{key}{MANIFEST_SUFFIX}"


def _named_quickly(data: bytes, key: Digest) -> Named | None:
    """Read what a manifest names that is of the known version and as it was published; ``None``: parse it in full."""
    tail = _SELF_DIGEST.fullmatch(data, len(data) - _TAIL_BYTES)
    if tail is None or not data.startswith(_LIST_START):
        return None
    # A single field of this name, so it is the document's own and no part's; in a text its quotes would be escaped.
    if (
        data.count(_VERSION) != 1
        or (needs := _NEEDS.search(data)) is None
        or b'"key":{"digest":"%b"' % key.hex.encode() not in data
        or digest_chunks((memoryview(data)[: tail.start()], b"}")).hex.encode() != tail[1]
    ):
        return None
    end = data.find(b',"created_at":"')
    try:
        artifacts = frozenset([Digest(item["digest"]) for item in json.loads(data[len(_LIST_START) : end].decode())])
    except (ValueError, TypeError, LookupError):
        return None
    return artifacts, _digests_in(needs[1])


def _named(data: bytes, path: Path, key: Digest) -> tuple[Named, bool]:
    try:
        manifest = Manifest.from_bytes(data, path)
        return (frozenset(manifest.artifact_sizes), frozenset(manifest.needs)), manifest.key.digest == key
    except (CorruptEntryError, NewerVaultError):
        # It may be a later format or edited by hand: keep everything that it could mean.
        found = _digests_in(data)
        return (found, found), False


def _digests_in(data: bytes) -> frozenset[Digest]:
    return frozenset(Digest(match.decode()) for match in _DIGEST_IN_TEXT.findall(data))
