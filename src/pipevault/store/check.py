"""Checking everything in a vault, by the same checks as those of a load, and moving what is bad to quarantine.

Bad is what a load would refuse: a manifest or an artifact that is not what was published or that others may write, a
pin or a signature that cannot be used. The rest is notable and does no harm: artifacts that no entry names, foreign
files, pins and signatures whose entry is gone, staging folders of dead processes.

Nothing is locked, and other processes may work in the vault meanwhile: what looks bad is looked at once more before it
is moved.
"""

from __future__ import annotations

import os
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pipevault.digest import Digest
from pipevault.errors import CorruptEntryError, NewerVaultError, SignatureError, UnsafeVaultError
from pipevault.files.byte_progress import Progress, ignore_progress
from pipevault.files.opened import open_verified
from pipevault.store.layout import Layout, digest_or_none, signer_of
from pipevault.store.manifest import Manifest, read_manifest
from pipevault.store.marker import ensure_vault
from pipevault.store.places import iter_foreign, iter_keys, spread
from pipevault.store.retention.leftovers import find_leftovers
from pipevault.store.retention.pins import read_pins
from pipevault.store.retention.removal import ORPHAN_MIN_AGE_S
from pipevault.store.trust.owners import check_ownership, check_root
from pipevault.store.trust.signature import check_signature, signature_states
from pipevault.store.trust.signing_keys import PublicKey
from pipevault.store.vault import Vault

Use = tuple[Digest, int]
"""The key of an entry that names an artifact, and the size in bytes that it says."""


@dataclass(frozen=True)
class Finding:
    """One thing that is not as it should be.

    ``kind``: ``folder``, ``manifest``, ``artifact``, ``newer`` (of a later pipevault), ``pin``, ``signature``,
    ``orphan``, ``foreign`` or ``staging``. ``reason`` is a sentence. ``keys``: the entries that cannot be used because
    of it. ``movable``: quarantine helps. ``quarantined``: what was moved, under its new name: the file, and the
    manifests of ``keys``.
    """

    kind: str
    path: Path
    reason: str
    bad: bool = True
    keys: tuple[Digest, ...] = ()
    movable: bool = False
    quarantined: tuple[Path, ...] = ()
    mended: bool = False


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
        return all(finding.mended for finding in self.bad)

    @property
    def broken_keys(self) -> tuple[Digest, ...]:
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
    :class:`VaultError`: the marker, or a folder that cannot be listed. :class:`VaultNotWritableError`: ``fix`` in a
    vault that cannot be written.
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
        manifest, found = _check_manifest(vault, key)
        findings += found
        if manifest is None:
            continue
        for digest, size_bytes in manifest.artifact_sizes.items():
            uses[digest] = (*uses.get(digest, ()), (key, size_bytes))
        later += _signature_findings(layout, manifest, map(signer_of, signatures.get(key, ())), trusted)
        if policy == "require":
            try:
                check_signature(layout, manifest, policy=policy, trusted=trusted)
            except SignatureError as error:
                later.append(Finding("signature", layout.manifest_file(key), str(error), keys=(key,)))
    artifacts, read_bytes = 0, 0
    total_bytes = sum(_file_size_bytes(layout.artifact_file(digest)) or 0 for digest in uses)
    progress(0, total_bytes)
    for digest in sorted(uses):
        path = layout.artifact_file(digest)
        artifacts += os.path.lexists(path)
        read_bytes += _file_size_bytes(path) or 0
        found = list(artifact_findings(vault, digest, uses[digest]))
        if found and not os.path.lexists(path):  # perhaps removed with its entries since they were read
            found = list(_artifact_now(vault, digest, [key for key, _ in uses[digest]]))
        findings += found
        progress(read_bytes, max(total_bytes, read_bytes))
    findings += _vault_findings(vault, keys)
    findings += _notable_findings(layout, (digest for digest in sorted(uses) if not uses[digest]), signatures)
    findings = _merged([*findings, *later])
    if fix:
        findings = [_mended(vault, finding, trusted) if finding.movable else finding for finding in findings]
    return VerifyReport(len(keys), artifacts, read_bytes, tuple(findings))


def _artifact_now(vault: Vault, digest: Digest, keys: Iterable[Digest]) -> Iterator[Finding]:
    """Check an artifact again, for those of ``keys`` whose entries name it by now."""
    sizes = ((key, manifest.artifact_sizes) for key in keys if (manifest := _check_manifest(vault, key)[0]))
    uses = [(key, size_bytes[digest]) for key, size_bytes in sizes if digest in size_bytes]
    if uses or os.path.lexists(vault.layout.artifact_file(digest)):
        yield from artifact_findings(vault, digest, uses)


def _mended(vault: Vault, finding: Finding, trusted: Sequence[PublicKey]) -> Finding:
    """Move what is bad, unless that is over; manifests go before the artifact that they name."""
    now = next((now for now in _look_again(vault, finding, trusted) if now.movable and now.path == finding.path), None)
    if now is None:
        return replace(finding, mended=True)
    going = [finding.path]
    if finding.kind == "artifact":
        going = [*map(vault.layout.manifest_file, now.keys), finding.path]
    moved = [path for place in going if (path := vault.quarantine(place, now.reason)) is not None]
    return replace(finding, quarantined=tuple(moved), mended=not any(map(os.path.lexists, going)))


def _look_again(vault: Vault, finding: Finding, trusted: Sequence[PublicKey]) -> Iterator[Finding]:
    layout, path = vault.layout, finding.path
    if (digest := layout.digest_of_artifact(path)) is not None:
        yield from _artifact_now(vault, digest, finding.keys)
    elif (key := layout.key_of_manifest(path)) is not None:
        manifest, found = _check_manifest(vault, key)
        yield from found
        for digest, size_bytes in manifest.artifact_sizes.items() if manifest else ():
            yield from _size_findings(layout, digest, [(key, size_bytes)])
    elif (key := layout.key_of_signature(path)) is not None:
        manifest, _ = _check_manifest(vault, key)
        if manifest is not None:
            yield from _signature_findings(layout, manifest, [signer_of(path)], trusted)


def _vault_findings(vault: Vault, keys: Sequence[Digest]) -> Iterator[Finding]:
    try:
        check_root(vault.root, trust=vault.trust)
    except UnsafeVaultError as error:
        yield Finding("folder", error.path, str(error), keys=tuple(keys))
    else:
        yield from _owner_findings(vault, "folder", vault.layout.vault_file, tuple(keys))


def _check_manifest(vault: Vault, key: Digest) -> tuple[Manifest | None, list[Finding]]:
    path = vault.layout.manifest_file(key)
    manifest, findings = None, []
    try:
        manifest = read_manifest(vault.layout, key)
    except CorruptEntryError as error:
        return None, [Finding("manifest", path, str(error), keys=(key,), movable=True)]
    except NewerVaultError as error:
        findings.append(Finding("newer", path, str(error), keys=(key,)))
    return manifest, [*findings, *_owner_findings(vault, "manifest", path, (key,))]


def artifact_findings(vault: Vault, digest: Digest, uses: Sequence[Use]) -> Iterator[Finding]:
    """Check an artifact, whose bytes are read once."""
    path = vault.layout.artifact_file(digest)
    keys, sizes_bytes = tuple(sorted(key for key, _ in uses)), {size_bytes for _, size_bytes in uses}
    try:
        # Of two sizes the digest tells which is true.
        size_bytes = sizes_bytes.pop() if len(sizes_bytes) == 1 else None
        open_verified(path, digest, size_bytes, what=f"Artifact {digest.short}").close()
    except CorruptEntryError as error:
        yield Finding("artifact", path, str(error), keys=keys, movable=True)
        return
    yield from _size_findings(vault.layout, digest, uses)
    yield from _owner_findings(vault, "artifact", path, keys)


def _size_findings(layout: Layout, digest: Digest, uses: Sequence[Use]) -> Iterator[Finding]:
    found_bytes = _file_size_bytes(layout.artifact_file(digest))
    for key, size_bytes in uses:
        if found_bytes not in (None, size_bytes):
            path = layout.manifest_file(key)
            reason = f"{path} says that artifact {digest.short} has {size_bytes} bytes; it has {found_bytes}."
            yield Finding("manifest", path, reason, keys=(key,), movable=True)


def _signature_findings(
    layout: Layout, manifest: Manifest, key_ids: Iterable[str], trusted: Sequence[PublicKey]
) -> Iterator[Finding]:
    """Find the signatures that prove nothing; those by keys that are not trusted are read, not verified."""
    for state in signature_states(layout, manifest, trusted, key_ids):
        if state.state == "bad":
            kind = "newer" if state.newer else "signature"
            yield Finding(kind, state.path, f"{state.path}: {state.reason}.", movable=not state.newer)


def _notable_findings(
    layout: Layout, unnamed: Iterable[Digest], signatures: Mapping[Digest, Sequence[Path]]
) -> Iterator[Finding]:
    """Find what stands next to the entries, ``unnamed`` artifacts among it. Only a pin can be bad."""
    for path in map(layout.artifact_file, unnamed):
        try:
            age_s = time.time() - os.lstat(path).st_mtime
        except FileNotFoundError:
            continue
        what = "it is young, so an entry that names it may be about to be published"
        if age_s >= ORPHAN_MIN_AGE_S:
            what = "remove it: pipevault prune"
        yield Finding("orphan", path, f"{path}: no entry that can be read names it; {what}.", bad=False)
    for pin in read_pins(layout):
        if pin.key is None:  # not moved: a pin that is gone keeps nothing, and only its maker knows what it was for
            yield Finding("pin", layout.pin_file(pin.name), pin.problem)
        elif pin.problem:
            what = f"The pin {pin.name} is for {pin.key.short}, which has no entry"
            advice = f"freeze it again, or pipevault unpin {pin.name}"
            yield Finding("pin", layout.pin_file(pin.name), f"{what}: {advice}", bad=False)
    for key, paths in signatures.items():
        if not os.path.lexists(layout.manifest_file(key)):
            for path in paths:
                yield Finding("signature", path, f"{path} is for an entry that is gone.", bad=False)
    for path in iter_foreign(layout):
        yield Finding("foreign", path, f"{path} is not part of a vault and is never read.", bad=False)
    for item in find_leftovers(layout):
        if item.path.is_relative_to(layout.tmp_dir):
            yield Finding("staging", item.path, f"{item.path}: {item.reason}. Remove it: pipevault prune", bad=False)


def _merged(findings: Iterable[Finding]) -> list[Finding]:
    """Return one finding for each file: the first of a kind, with the keys of all; no orphan is bad, too."""
    first: dict[tuple[str, Path], Finding] = {}
    keys: dict[tuple[str, Path], set[Digest]] = {}
    for finding in findings:
        place = (finding.kind, finding.path)
        if finding.kind != "orphan" or ("artifact", finding.path) not in first:
            first.setdefault(place, finding)
            keys.setdefault(place, set()).update(finding.keys)
    return [replace(finding, keys=tuple(sorted(keys[place]))) for place, finding in first.items()]


def _file_size_bytes(path: Path) -> int | None:
    try:
        return os.stat(path).st_size
    except OSError:
        return None


def _owner_findings(vault: Vault, kind: str, path: Path, keys: tuple[Digest, ...]) -> Iterator[Finding]:
    """Check ``path`` and the folders from it up to the vault's. Nothing is movable: the file may be whole, and who is
    trusted is a matter of settings.
    """
    try:
        check_ownership(path, root=vault.root, trust=vault.trust)
    except FileNotFoundError:
        return
    except UnsafeVaultError as error:
        yield Finding(kind if error.path == path else "folder", error.path, str(error), keys=keys)
    except OSError as error:
        yield Finding(kind, path, f"{path} cannot be looked at: {error.strerror}.", keys=keys)
