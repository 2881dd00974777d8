"""Findings, and those about what lies beside the entries. See :mod:`pipevault.store.check.verify`."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from sys import intern

from pipevault.digest import Digest
from pipevault.errors import PinError, VaultError
from pipevault.files.atomic import vault_errors
from pipevault.store.layout import Layout
from pipevault.store.read import iter_foreign
from pipevault.store.retention.leftovers import find_leftovers
from pipevault.store.retention.pins import pin_names, read_pin
from pipevault.store.retention.removal import ORPHAN_MIN_AGE_S


@dataclass(frozen=True)
class Finding:
    """One thing that is not as it should be.

    ``kind``: ``folder``, ``manifest``, ``artifact``, ``newer`` (of a later pipevault), ``pin``, ``signature``,
    ``orphan``, ``foreign`` or ``staging``. ``reason`` is a sentence.
    """

    kind: str
    path: Path
    reason: str
    bad: bool
    keys: tuple[Digest, ...] = ()
    """The entries that cannot be used because of it."""
    movable: bool = False
    """Whether quarantine mends it."""
    quarantined: tuple[Path, ...] = ()
    """What was moved, under its new name: the file, and the manifests of ``keys``."""
    mended: bool = False


def orphans(layout: Layout, digests: Iterable[Digest]) -> Iterator[Finding]:
    for path in map(layout.artifact_file, digests):
        try:
            age_s = time.time() - os.lstat(path).st_mtime
        except FileNotFoundError:
            continue
        if age_s < ORPHAN_MIN_AGE_S:
            what = "it is young, so an entry that names it may be about to be published"
        else:
            what = "remove it: pipevault prune"
        yield Finding("orphan", path, f"{path}: no entry that can be read names it; {what}.", bad=False)


def pin_findings(layout: Layout) -> Iterator[Finding]:
    for name in pin_names(layout):
        path = layout.pin_file(name)
        try:
            key = read_pin(layout, name)
        except (PinError, VaultError) as error:
            # Not moved: a pin that is gone keeps nothing, and nobody but its maker knows what it was for.
            yield Finding("pin", path, str(error), bad=True)
            continue
        if key is not None and not os.path.lexists(layout.manifest_file(key)):
            reason = (
                f"The pin {name} is for {key.short}, which has no entry: freeze it again, or pipevault unpin {name}"
            )
            yield Finding("pin", path, reason, bad=False)


def lost_signature(layout: Layout, key: Digest, key_id: str) -> Iterator[Finding]:
    """The signature by a public key, if its entry is gone."""
    if not os.path.lexists(layout.manifest_file(key)):
        path = layout.signature_file(key, key_id)
        yield Finding("signature", path, f"{path} is for an entry that is gone.", bad=False)


def foreign(layout: Layout) -> Iterator[Finding]:
    for path in iter_foreign(layout):
        yield Finding("foreign", path, f"{path} is no part of a vault and is never read.", bad=False)


def staging(layout: Layout) -> Iterator[Finding]:
    for item in find_leftovers(layout):
        if item.path.is_relative_to(layout.tmp_dir):
            yield Finding("staging", item.path, f"{item.path}: {item.reason}. Remove it: pipevault prune", bad=False)


def artifact_places(layout: Layout) -> Iterator[Digest]:
    """The digest of whatever stands at an artifact's place, sorted."""
    return (digest for path in _in_shards(layout, layout.artifacts_dir) if (digest := layout.digest_of_artifact(path)))


def signature_places(layout: Layout) -> dict[Digest, list[str]]:
    """For each key, sorted, the ids of the public keys of whatever stands at a signature's place."""
    found: dict[Digest, list[str]] = {}
    for path in _in_shards(layout, layout.signatures_dir):
        if (key := layout.key_of_signature(path)) is not None:
            found.setdefault(key, []).append(intern(path.name.split(".")[1]))
    return found


def _in_shards(layout: Layout, folder: Path) -> Iterator[Path]:
    with vault_errors(folder, "listed"):
        for shard in sorted(folder.iterdir()) if folder.is_dir() else ():
            if layout.is_shard(shard) and shard.is_dir() and not shard.is_symlink():
                yield from sorted(shard.iterdir())
