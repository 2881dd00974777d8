"""Checking everything in a vault, and moving what is bad to quarantine.

Bad is what a load would refuse: a manifest or an artifact that is not what was published or that others may write, a
pin or a signature that cannot be used. The rest is notable and does no harm: artifacts that no entry names, foreign
files, pins and signatures whose entry is gone, staging folders of dead processes.

Nothing is locked, and other processes may work in the vault meanwhile: what looks bad is looked at once more before it
is moved.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pipevault.digest import Digest
from pipevault.errors import VaultNotWritableError
from pipevault.store.manifest import Manifest
from pipevault.store.marker import ensure_vault
from pipevault.store.read import iter_keys
from pipevault.store.signing_keys import PublicKey
from pipevault.store.vault import Vault
from pipevault.store.verify_checks import (
    artifact_fault,
    artifact_places,
    check_manifest,
    file_size_bytes,
    names_artifact,
    vault_fault,
)
from pipevault.store.verify_findings import (
    Finding,
    foreign,
    orphans,
    owner_findings,
    pin_findings,
    signature_findings,
    staging,
    unsigned,
)
from pipevault.store.verify_mend import mend

Progress = Callable[[int, int], None]
"""Called with the bytes read so far and the bytes in all."""


@dataclass(frozen=True)
class VerifyReport:
    """``entries``: manifests that were found; ``artifacts``: files that were read, ``read_bytes`` in all."""

    entries: int
    artifacts: int
    read_bytes: int
    findings: tuple[Finding, ...]

    @property
    def bad(self) -> tuple[Finding, ...]:
        return tuple(finding for finding in self.findings if finding.bad)

    @property
    def notable(self) -> tuple[Finding, ...]:
        return tuple(finding for finding in self.findings if not finding.bad)

    @property
    def sound(self) -> bool:
        """Whether nothing is wrong, or all of it was mended."""
        return all(finding.mended for finding in self.bad)

    @property
    def broken_keys(self) -> tuple[Digest, ...]:
        """The entries that could not be used when they were looked at, sorted."""
        return tuple(sorted({key for finding in self.bad for key in finding.keys}))


def ignore_progress(done_bytes: int, total_bytes: int) -> None:
    """Tells nobody."""
    del done_bytes, total_bytes


def verify(
    vault: Vault,
    *,
    fix: bool = False,
    progress: Progress = ignore_progress,
    trusted: Sequence[PublicKey] = (),
    policy: str = "off",
) -> VerifyReport:
    """Check everything; each artifact is read once. With ``fix``, what is bad goes to quarantine and nothing else.

    Entries that a bad artifact makes useless go with it, so that the next load misses and freezes them again. Folders
    that others may write, pins that cannot be read and what a later pipevault wrote are left to people. With ``policy``
    ``require``, an entry without a good signature by one of ``trusted`` is bad, and stays for somebody to sign.
    :class:`NotAVaultError`, :class:`NewerVaultError`: the marker. :class:`VaultError`: a folder cannot be listed.
    :class:`VaultNotWritableError`: ``fix`` in a vault that cannot be written.
    """
    if fix and not vault.writable:
        raise VaultNotWritableError(
            f"The vault {vault.root} is read-only for this user: run without --fix.", vault.root
        )
    layout = vault.layout
    ensure_vault(layout, create=False)
    # The artifacts first: one whose manifest is published meanwhile must count as named.
    artifacts = set(artifact_places(layout))
    keys = list(iter_keys(layout))
    manifests, findings = _manifests(vault, keys)
    uses = _uses(manifests)
    reader = _Reader(vault, artifacts | uses.keys(), progress)
    for digest in reader.digests:
        findings += reader.check(digest, uses.get(digest, {}))
    if (fault := vault_fault(vault)) is not None:
        findings.append(Finding("folder", fault.path, fault.reason, bad=True, keys=tuple(keys)))
    findings += orphans(layout, sorted(artifacts - uses.keys()))
    findings += pin_findings(layout)
    findings += signature_findings(layout, manifests, trusted)
    if policy == "require":
        findings += unsigned(layout, manifests, trusted)
    findings += foreign(layout)
    findings += staging(layout)
    findings = _merged(findings)
    if fix:
        findings = [mend(vault, finding, trusted) if finding.movable else finding for finding in findings]
    return VerifyReport(len(keys), reader.artifacts, reader.read_bytes, tuple(findings))


def _manifests(vault: Vault, keys: Iterable[Digest]) -> tuple[dict[Digest, Manifest], list[Finding]]:
    """Every manifest whose bytes are sound, sorted by key, and what is wrong with the others or with an owner."""
    manifests: dict[Digest, Manifest] = {}
    findings = []
    for key in keys:
        path = vault.layout.manifest_file(key)
        found = check_manifest(vault, key)
        if isinstance(found, Manifest):
            manifests[key] = found
        elif found is not None and found.newer:
            findings.append(Finding("newer", path, found.reason, bad=True, keys=(key,)))
        elif found is not None:
            findings.append(Finding("manifest", path, found.reason, bad=True, keys=(key,), movable=True))
            continue
        findings += owner_findings(vault, "manifest", path, (key,))
    return manifests, findings


def _uses(manifests: Mapping[Digest, Manifest]) -> dict[Digest, dict[Digest, int]]:
    """For each artifact that is named, the keys of its entries and the size in bytes that each says."""
    uses: dict[Digest, dict[Digest, int]] = {}
    for key, manifest in manifests.items():
        for digest, size_bytes in manifest.artifact_sizes.items():
            uses.setdefault(digest, {})[key] = size_bytes
    return uses


class _Reader:
    """Reads each artifact once and counts the bytes."""

    def __init__(self, vault: Vault, digests: Iterable[Digest], progress: Progress) -> None:
        self.digests = sorted(digests)
        self.artifacts = 0
        self.read_bytes = 0
        self._vault = vault
        self._progress = progress
        sizes_bytes = (file_size_bytes(vault.layout.artifact_file(digest)) for digest in self.digests)
        self._total_bytes = sum(size_bytes or 0 for size_bytes in sizes_bytes)
        progress(0, self._total_bytes)

    def check(self, digest: Digest, use: Mapping[Digest, int]) -> Iterator[Finding]:
        """What is wrong with the artifact; ``use``: the keys of the entries that name it, and the sizes they say."""
        layout = self._vault.layout
        path = layout.artifact_file(digest)
        fault = artifact_fault(layout, digest, set(use.values()), self._count)
        size_bytes = file_size_bytes(path)
        keys = tuple(sorted(use))
        if os.path.lexists(path):
            self.artifacts += 1
        else:  # it may have been removed with its entries since they were read
            keys = tuple(key for key in keys if names_artifact(self._vault, key, digest))
            if not keys:
                return
        if fault is not None:
            yield Finding("artifact", path, fault.reason, bad=True, keys=keys, movable=True)
            return
        for key in keys:
            if use[key] != size_bytes:
                manifest = layout.manifest_file(key)
                reason = f"{manifest} says that artifact {digest.short} has {use[key]} bytes; it has {size_bytes}."
                yield Finding("manifest", manifest, reason, bad=True, keys=(key,), movable=True)
        yield from owner_findings(self._vault, "artifact", path, keys)

    def _count(self, size_bytes: int) -> None:
        self.read_bytes += size_bytes
        self._progress(self.read_bytes, max(self._total_bytes, self.read_bytes))


def _merged(findings: Iterable[Finding]) -> list[Finding]:
    """One finding for each file: the first of a kind, with the keys of all; nothing is both bad and an orphan."""
    merged: dict[tuple[str, Path], Finding] = {}
    for finding in findings:
        place = (finding.kind, finding.path)
        if place in merged:
            keys = tuple(sorted({*merged[place].keys, *finding.keys}))
            merged[place] = replace(merged[place], keys=keys)
        elif finding.kind != "orphan" or ("artifact", finding.path) not in merged:
            merged[place] = finding
    return list(merged.values())
