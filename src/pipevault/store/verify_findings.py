"""What is wrong in a vault, as findings. See :mod:`pipevault.store.verify`."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipevault.digest import Digest
from pipevault.errors import PinError, SignatureError
from pipevault.store.layout import Layout
from pipevault.store.leftovers import find_leftovers
from pipevault.store.manifest import Manifest
from pipevault.store.pins import pin_names, read_pin
from pipevault.store.read import iter_foreign
from pipevault.store.removal import ORPHAN_MIN_AGE_S
from pipevault.store.signature import check_signature
from pipevault.store.signing_keys import PublicKey
from pipevault.store.vault import Vault
from pipevault.store.verify_checks import ownership_fault, signature_faults, signature_places


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


def owner_findings(vault: Vault, kind: str, path: Path, keys: tuple[Digest, ...]) -> Iterator[Finding]:
    fault = ownership_fault(vault, path)
    if fault is not None and fault.path == path:
        yield Finding(kind, path, fault.reason, bad=True, keys=keys, movable=True)
    elif fault is not None:
        yield Finding("folder", fault.path, fault.reason, bad=True, keys=keys)


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
        except PinError as error:
            # Not moved: a pin that is gone keeps nothing, and nobody but its maker knows what it was for.
            yield Finding("pin", path, str(error), bad=True)
            continue
        if key is not None and not os.path.lexists(layout.manifest_file(key)):
            reason = (
                f"The pin {name} is for {key.short}, which has no entry: freeze it again, or pipevault unpin {name}"
            )
            yield Finding("pin", path, reason, bad=False)


def signature_findings(
    layout: Layout, manifests: Mapping[Digest, Manifest], trusted: Sequence[PublicKey]
) -> Iterator[Finding]:
    signed = set()
    for path, key in signature_places(layout):
        signed.add(key)
        if key not in manifests and not os.path.lexists(layout.manifest_file(key)):
            yield Finding("signature", path, f"{path} is for an entry that is gone.", bad=False)
    for key in sorted(signed & manifests.keys()):
        for fault in signature_faults(layout, manifests[key], trusted):
            if fault.newer:
                yield Finding("newer", fault.path, fault.reason, bad=True)
            else:
                yield Finding("signature", fault.path, fault.reason, bad=True, movable=True)


def foreign(layout: Layout) -> Iterator[Finding]:
    for path in iter_foreign(layout):
        yield Finding("foreign", path, f"{path} is no part of a vault and is never read.", bad=False)


def staging(layout: Layout) -> Iterator[Finding]:
    for item in find_leftovers(layout):
        if item.path.is_relative_to(layout.tmp_dir):
            yield Finding("staging", item.path, f"{item.path}: {item.reason}. Remove it: pipevault prune", bad=False)


def unsigned(layout: Layout, manifests: Mapping[Digest, Manifest], trusted: Sequence[PublicKey]) -> Iterator[Finding]:
    """The entries that no load accepts where signatures are required."""
    for key, manifest in manifests.items():
        try:
            check_signature(layout, manifest, policy="require", trusted=trusted)
        except SignatureError as error:
            yield Finding("signature", layout.manifest_file(key), str(error), bad=True, keys=(key,))
