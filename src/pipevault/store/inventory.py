"""What a vault holds, read in bulk: which artifacts and entries each manifest names, and the size of every file.

Each manifest is read once and each artifact looked at once. A manifest whose ``self_digest`` fits is as it was
published, so only its lists of artifacts and needed entries are parsed; any other is parsed in full.
"""

from __future__ import annotations

import errno
import hashlib
import heapq
import json
import os
import re
import stat
from collections.abc import Collection, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path

from pipevault.digest import Digest
from pipevault.errors import CorruptEntryError, NewerVaultError
from pipevault.files.atomic import vault_errors
from pipevault.key import SHELF_DIGITS
from pipevault.reading import DOCUMENT_LIMIT_BYTES, stamp_of
from pipevault.store.layout import MANIFEST_SUFFIX, Layout, stands_in
from pipevault.store.manifest import MANIFEST_VERSION, Manifest
from pipevault.store.read import read_manifest

_ARTIFACT_DIGITS = 2
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
"""The artifacts and the needed entries that a manifest names."""


@dataclass(frozen=True)
class FoundManifest:
    """A file at a manifest's place. ``artifacts`` and ``needs``: what it names or, unless it is ``understood``, every
    digest in it.

    One that is damaged, of a later format or another key's is not understood.
    """

    key: Digest
    artifacts: frozenset[Digest]
    needs: frozenset[Digest]
    size_bytes: int
    modified_ns: int
    understood: bool

    @property
    def modified_s(self) -> float:
        return self.modified_ns / 1e9


@dataclass(frozen=True)
class FoundFile:
    """``modified_s``: seconds since the epoch."""

    size_bytes: int
    modified_s: float


def find_manifests(layout: Layout) -> dict[Digest, FoundManifest]:
    """Every manifest by its key, sorted. :class:`~pipevault.errors.VaultError`: one cannot be read."""
    found = (read_found(layout, key) for key in manifest_keys(layout))
    return {manifest.key: manifest for manifest in found if manifest is not None}


def read_found(layout: Layout, key: Digest) -> FoundManifest | None:
    """The manifest of ``key``; ``None`` if there is none. Raises like :func:`find_manifests`."""
    try:
        data, modified_ns = _read(_manifest_path(os.fspath(layout.entries_dir), key.hex))
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


def find_artifacts(layout: Layout) -> dict[Digest, FoundFile]:
    """Every regular file at an artifact's place, sorted by digest."""
    with vault_errors(layout.artifacts_dir, "listed"):
        found = {}
        for name, entry in sorted(_sharded(layout.artifacts_dir, _ARTIFACT_DIGITS), key=itemgetter(0)):
            digest = _digest_of(name, "")
            if digest is not None:
                try:
                    status = entry.stat(follow_symlinks=False)
                except FileNotFoundError:
                    continue
                if stat.S_ISREG(status.st_mode):
                    found[digest] = FoundFile(status.st_size, status.st_mtime)
        return found


def find_files(folder: Path) -> dict[Path, FoundFile]:
    """Every regular file below ``folder``, sorted; an absent folder holds none. No link is followed."""
    found = {}
    with vault_errors(folder, "listed"):
        for parent, _, names in os.walk(folder):
            for name in names:
                path = Path(parent, name)
                try:
                    status = path.lstat()
                except FileNotFoundError:
                    continue
                if stat.S_ISREG(status.st_mode):
                    found[path] = FoundFile(status.st_size, status.st_mtime)
    return dict(sorted(found.items()))


def mentioned(layout: Layout, digests: Collection[Digest], *, without: Collection[Digest] = ()) -> set[Digest]:
    """Those of ``digests`` that a manifest names, whatever it means by it, other than those of the keys ``without``.

    Few are searched for in the bytes, which is much faster than to understand them. Raises like :func:`find_manifests`.
    """
    if len(digests) > _MOST_SEARCHED:
        manifests = find_manifests(layout)
        return named_by(found for key, found in manifests.items() if key not in without).intersection(digests)
    wanted = {digest: digest.hex.encode() for digest in digests}
    left_out = {f"{key}{MANIFEST_SUFFIX}" for key in without}
    found: set[Digest] = set()
    with vault_errors(layout.entries_dir, "read"):
        for name, entry in _sharded(layout.entries_dir, SHELF_DIGITS) if wanted else ():
            if name in left_out or _digest_of(name, MANIFEST_SUFFIX) is None:
                continue
            with suppress(FileNotFoundError):
                data, _ = _read(entry.path)
                found |= {digest for digest, text in wanted.items() if text in data}
    return found


def read_published(layout: Layout, key: Digest) -> Manifest | None:
    """The manifest of ``key`` for showing it, quickly: only that it is as it was published is looked at. Else, and for
    any that is not, what :func:`pipevault.store.read.read_manifest` gives and raises.
    """
    try:
        data, _ = _read(_manifest_path(os.fspath(layout.entries_dir), key.hex))
        if _named_quickly(data, key) is not None:
            return Manifest.published(json.loads(data))
    except (OSError, ValueError, LookupError, TypeError):
        pass
    return read_manifest(layout, key)


def named_by(manifests: Iterable[FoundManifest]) -> set[Digest]:
    return {digest for manifest in manifests for digest in manifest.artifacts}


def manifest_keys(layout: Layout) -> list[Digest]:
    """The keys that have a file at a manifest's place, sorted; what :func:`pipevault.store.read.iter_keys` gives."""
    with vault_errors(layout.entries_dir, "listed"):
        names = sorted(name for name, _ in _sharded(layout.entries_dir, SHELF_DIGITS))
    return [key for name in names if (key := _digest_of(name, MANIFEST_SUFFIX)) is not None]


def newest_keys(layout: Layout, count: int, shelf: Digest | None = None) -> list[Digest]:
    """The keys of the ``count`` manifests that were published last, newest first, on ``shelf`` or, without one, on the
    ``count`` shelves that changed last; no file is opened.
    """
    entries = layout.entries_dir
    with vault_errors(entries, "listed"):
        shelves = [(0, layout.shelf_dir(shelf).name)] if shelf else heapq.nlargest(count, _times(entries))
        files = [file for _, name in shelves for file in _times(entries / name) if stands_in(file[1], name)]
    keys = (_digest_of(name, MANIFEST_SUFFIX) for _, name in heapq.nlargest(count, files))
    return [key for key in keys if key is not None]


def _times(folder: Path) -> list[tuple[int, str]]:
    """When each thing in ``folder`` changed, in nanoseconds, and its name; an absent folder has none."""
    times = []
    try:
        with os.scandir(folder) as found:
            for entry in found:
                with suppress(FileNotFoundError):
                    times.append((entry.stat(follow_symlinks=False).st_mtime_ns, entry.name))
    except (FileNotFoundError, NotADirectoryError):
        return []
    return times


def manifest_stamps(layout: Layout) -> dict[Digest, str]:
    """For each file at a manifest's place, sorted by key, a text that changes when the file does; none is opened."""
    stamps = {}
    with vault_errors(layout.entries_dir, "listed"):
        for name, entry in sorted(_sharded(layout.entries_dir, SHELF_DIGITS), key=itemgetter(0)):
            key = _digest_of(name, MANIFEST_SUFFIX)
            if key is not None:
                try:
                    status = entry.stat(follow_symlinks=True)
                except FileNotFoundError:
                    continue
                stamps[key] = stamp_of(status)
    return stamps


def _read(path: str) -> tuple[bytes, int]:
    """The content and the time of change in nanoseconds."""
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_NONBLOCK", 0))
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or status.st_size > DOCUMENT_LIMIT_BYTES:
            raise OSError(errno.EINVAL, f"it is no regular file of at most {DOCUMENT_LIMIT_BYTES >> 20} MiB", path)
        data = os.read(descriptor, status.st_size + 1)
        while len(data) < status.st_size and (more := os.read(descriptor, status.st_size)):
            data += more
    finally:
        os.close(descriptor)
    return data, status.st_mtime_ns


def _manifest_path(entries: str, key: str) -> str:
    """What :meth:`Layout.manifest_file` gives, at a tenth of its price."""
    return f"{entries}{os.sep}{key[-SHELF_DIGITS:]}{os.sep}{key}{MANIFEST_SUFFIX}"


def _sharded(folder: Path, digits: int) -> Iterator[tuple[str, os.DirEntry[str]]]:
    """The files in the folders of so many ``digits`` in ``folder`` that belong there by their names."""
    try:
        shards = os.scandir(folder)
    except (FileNotFoundError, NotADirectoryError):
        return
    with shards:
        for shard in shards:
            if len(shard.name) == digits and shard.is_dir(follow_symlinks=False):
                with suppress(FileNotFoundError), os.scandir(shard.path) as files:  # a shelf goes when it is empty
                    yield from ((file.name, file) for file in files if stands_in(file.name, shard.name))


def _digest_of(name: str, suffix: str) -> Digest | None:
    if not name.endswith(suffix):
        return None
    try:
        return Digest(name.removesuffix(suffix))
    except ValueError:
        return None


def _named_quickly(data: bytes, key: Digest) -> Named | None:
    """What a manifest of the known version names that is as it was published; ``None``: it must be parsed in full."""
    tail = _SELF_DIGEST.fullmatch(data, len(data) - _TAIL_BYTES)
    if tail is None or not data.startswith(_LIST_START):
        return None
    # A single field of this name, so it is the document's own and no part's; in a text its quotes would be escaped.
    if (
        data.count(_VERSION) != 1
        or (needs := _NEEDS.search(data)) is None
        or b'"key":{"digest":"%b"' % key.hex.encode() not in data
    ):
        return None
    hasher = hashlib.sha256(memoryview(data)[: tail.start()])
    hasher.update(b"}")
    if hasher.hexdigest().encode() != tail[1]:
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
        # It may be a later format or mended by hand: keep everything that it could mean.
        found = _digests_in(data)
        return (found, found), False


def _digests_in(data: bytes) -> frozenset[Digest]:
    return frozenset(Digest(match.decode()) for match in _DIGEST_IN_TEXT.findall(data))
