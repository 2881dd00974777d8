"""Checking everything in a vault, and moving what is bad to quarantine.

Bad is what a load would refuse: a manifest or an artifact that is not what was published or that others may write, a
pin or a signature that cannot be used. The rest is notable and does no harm: artifacts that no entry names, foreign
files, pins and signatures whose entry is gone, staging folders of dead processes.

Nothing is locked, and other processes may work in the vault meanwhile: what looks bad is looked at once more before it
is moved.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pipevault.digest import Digest
from pipevault.files.byte_progress import Progress, ignore_progress
from pipevault.store.check.findings import (
    Finding,
    Use,
    artifact_findings,
    check_manifest,
    file_size_bytes,
    merged,
    notable_findings,
    signature_findings,
    size_findings,
    unsigned_findings,
    vault_findings,
)
from pipevault.store.layout import digest_or_none, signer_of
from pipevault.store.marker import ensure_vault
from pipevault.store.places import iter_keys, spread
from pipevault.store.trust.signing_keys import PublicKey
from pipevault.store.vault import Vault


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
        """True if all that is bad was put out of the way."""
        return all(finding.mended for finding in self.bad)

    @property
    def broken_keys(self) -> tuple[Digest, ...]:
        """The entries that could not be used, sorted."""
        return tuple(sorted({key for finding in self.bad for key in finding.keys}))


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
    :class:`NotAVaultError`, :class:`DamagedVaultError`, :class:`NewerVaultError`: the marker. :class:`VaultError`: a
    folder cannot be listed.
    :class:`VaultNotWritableError`: ``fix`` in a vault that cannot be written.
    """
    if fix:
        vault.require_writable("Run without --fix.")
    layout = vault.layout
    ensure_vault(layout, create=False)
    # The artifacts first: one whose manifest is published meanwhile must count as named.
    names = (digest_or_none(file.name) for file in spread(layout, layout.artifacts_dir))
    uses: dict[Digest, tuple[Use, ...]] = {digest: () for digest in names if digest is not None}
    keys = list(iter_keys(layout))
    signatures: dict[Digest, list[Path]] = defaultdict(list)
    for path in (Path(file.path) for file in spread(layout, layout.signatures_dir)):
        if (key := layout.key_of_signature(path)) is not None:
            signatures[key].append(path)
    findings, later = list[Finding](), list[Finding]()
    # One manifest is held at a time: a vault may have more than fit in memory.
    for key in keys:
        manifest, found = check_manifest(vault, key)
        findings += found
        if manifest is None:
            continue
        for digest, size_bytes in manifest.artifact_sizes.items():
            uses[digest] = (*uses.get(digest, ()), (key, size_bytes))
        later += signature_findings(layout, manifest, map(signer_of, signatures.get(key, ())), trusted)
        if policy == "require":
            later += unsigned_findings(layout, manifest, trusted)
    artifacts, read_bytes = 0, 0
    total_bytes = sum(file_size_bytes(layout.artifact_file(digest)) or 0 for digest in uses)
    progress(0, total_bytes)
    for digest in sorted(uses):
        path = layout.artifact_file(digest)
        artifacts += os.path.lexists(path)
        read_bytes += file_size_bytes(path) or 0
        findings += _of_artifact(vault, digest, uses[digest])
        progress(read_bytes, max(total_bytes, read_bytes))
    findings += vault_findings(vault, keys)
    findings += notable_findings(layout, (digest for digest in sorted(uses) if not uses[digest]), signatures)
    findings = merged([*findings, *later])
    if fix:
        findings = [_mended(vault, finding, trusted) if finding.movable else finding for finding in findings]
    return VerifyReport(len(keys), artifacts, read_bytes, tuple(findings))


def _of_artifact(vault: Vault, digest: Digest, uses: Sequence[Use]) -> Iterator[Finding]:
    found = list(artifact_findings(vault, digest, uses))
    if found and not os.path.lexists(vault.layout.artifact_file(digest)):
        # It may have been removed with its entries since they were read.
        return _artifact_now(vault, digest, [key for key, _ in uses])
    return iter(found)


def _artifact_now(vault: Vault, digest: Digest, keys: Iterable[Digest]) -> Iterator[Finding]:
    uses = _still_used(vault, digest, keys)
    if uses or os.path.lexists(vault.layout.artifact_file(digest)):
        yield from artifact_findings(vault, digest, uses)


def _still_used(vault: Vault, digest: Digest, keys: Iterable[Digest]) -> list[Use]:
    """Those of ``keys`` whose entries, as they are now, name the artifact, and the sizes that they say."""
    sizes = ((key, manifest.artifact_sizes) for key in keys if (manifest := check_manifest(vault, key)[0]))
    return [(key, size_bytes[digest]) for key, size_bytes in sizes if digest in size_bytes]


def _mended(vault: Vault, finding: Finding, trusted: Sequence[PublicKey]) -> Finding:
    """Move what is bad, unless that is over; manifests go before the artifact that they name."""
    now = next((now for now in _look_again(vault, finding, trusted) if now.movable and now.path == finding.path), None)
    if now is None:
        return replace(finding, mended=True)
    going = [finding.path]
    if finding.kind == "artifact":
        used = _still_used(vault, Digest(finding.path.name), finding.keys)
        going = [*(vault.layout.manifest_file(key) for key, _ in used), finding.path]
    moved = [path for place in going if (path := vault.quarantine(place, now.reason)) is not None]
    return replace(finding, quarantined=tuple(moved), mended=not any(map(os.path.lexists, going)))


def _look_again(vault: Vault, finding: Finding, trusted: Sequence[PublicKey]) -> Iterator[Finding]:
    layout, path = vault.layout, finding.path
    if (digest := layout.digest_of_artifact(path)) is not None:
        yield from _artifact_now(vault, digest, finding.keys)
    elif (key := layout.key_of_manifest(path)) is not None:
        manifest, found = check_manifest(vault, key)
        yield from found
        for digest, size_bytes in manifest.artifact_sizes.items() if manifest else ():
            yield from size_findings(layout, digest, [(key, size_bytes)])
    elif (key := layout.key_of_signature(path)) is not None:
        manifest, _ = check_manifest(vault, key)
        if manifest is not None:
            yield from signature_findings(layout, manifest, [signer_of(path)], trusted)
