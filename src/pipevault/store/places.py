"""Listing the folders of a vault: names that stand where the layout has them. No file is opened.

An absent folder holds nothing; one that cannot be listed is a :class:`~pipevault.errors.VaultError`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from contextlib import suppress
from operator import attrgetter
from pathlib import Path

from pipevault.digest import Digest
from pipevault.errors import UnknownKeyError
from pipevault.files.atomic import vault_errors
from pipevault.store.layout import MANIFEST_SUFFIX, SYSTEM_NAMES, Layout, digest_or_none, stands_in

_SHOWN_CANDIDATES = 10


def children(folder: Path) -> list[Path]:
    with vault_errors(folder, "listed"):
        try:
            return [folder / name for name in sorted(os.listdir(folder))]
        except FileNotFoundError:
            return []


def spread(layout: Layout, folder: Path, *, skip_unreadable: bool = False) -> list[os.DirEntry[str]]:
    """List the files in the folders that ``folder`` is spread over which belong there by their names, sorted. With
    ``skip_unreadable``, one of those folders that cannot be read is left out.
    """
    skipped = OSError if skip_unreadable else FileNotFoundError  # a shelf goes when it is empty
    found: list[os.DirEntry[str]] = []
    with vault_errors(folder, "listed"):
        try:
            shards = os.scandir(folder)
        except (FileNotFoundError, NotADirectoryError):
            return []
        with shards:
            for shard in shards:
                if shard.is_dir(follow_symlinks=False) and layout.is_shard(folder / shard.name):
                    with suppress(skipped), os.scandir(shard.path) as files:
                        found += [file for file in files if stands_in(file.name, shard.name)]
    return sorted(found, key=attrgetter("name"))


def iter_keys(layout: Layout) -> Iterator[Digest]:
    """Give the keys that have a manifest file, sorted, whether or not it is intact."""
    return (key for file in spread(layout, layout.entries_dir) if (key := key_in(file.name)) is not None)


def signature_files(layout: Layout, key: Digest) -> tuple[Path, ...]:
    files = children(layout.signature_file(key, "").parent)
    return tuple(file for file in files if layout.key_of_signature(file) == key)


def iter_foreign(layout: Layout) -> Iterator[Path]:
    """Give the files, folders and links that the layout does not know, sorted; of a foreign folder only the folder."""
    for path in children(layout.root):
        if path == layout.vault_file or path.name in SYSTEM_NAMES:
            continue
        if path not in layout.folders or not _is_real_folder(path):
            yield path
            continue
        for child in children(path):
            if not layout.owns(child) or (layout.is_shard(child) and not _is_real_folder(child)):
                yield child
            elif layout.is_shard(child):
                yield from (file for file in children(child) if not layout.owns(file))


def key_in(name: str) -> Digest | None:
    return digest_or_none(name.removesuffix(MANIFEST_SUFFIX)) if name.endswith(MANIFEST_SUFFIX) else None


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


def _is_real_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()
