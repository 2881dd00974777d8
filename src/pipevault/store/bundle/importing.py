"""Publishing the entries of a bundle. See :mod:`pipevault.store.bundle`.

The whole file is verified while what the vault lacks of it is written to a staging folder, which is then a vault like
any other: its entries are copied as those of a tier are, each after the entries that it needs.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pipevault.digest import Digest
from pipevault.errors import BundleError, CorruptEntryError, NewerBundleError, NewerVaultError, VaultFullError
from pipevault.files.atomic import vault_errors
from pipevault.files.byte_progress import Progress, ignore_progress
from pipevault.store.bundle.zip_file import BundleFile, Member, open_bundle
from pipevault.store.layout import Layout
from pipevault.store.manifest import ArtifactRef, Manifest
from pipevault.store.needs import needed_first
from pipevault.store.read import read_manifest
from pipevault.store.trust.owners import check_folder
from pipevault.store.trust.signature import copy_signatures
from pipevault.store.vault import Vault

_LATER_FORMAT = "a later format"


@dataclass(frozen=True)
class _Named:
    """The part of a manifest that is kept: sizes in bytes by artifact, and the entries that it needs."""

    artifacts: Mapping[Digest, int]
    needs: tuple[Digest, ...]


def bundle_keys(path: Path) -> tuple[Digest, ...]:
    """Return the keys of the entries that the bundle says it holds, sorted; no content is verified.

    :class:`BundleError`, :class:`NewerBundleError`.
    """
    with open_bundle(path) as bundle:
        return bundle.keys


def import_bundle(vault: Vault, path: Path, *, progress: Progress = ignore_progress) -> list[Digest]:
    """Publish the entries of the bundle ``path`` that the vault does not hold whole; return their keys, sorted.

    Nothing becomes visible before the whole bundle was verified. An entry that stands in the vault stays as it is; if
    it is the one of the bundle, signatures that it lacks are added.
    :class:`BundleError`: damaged, unsafe, or none; nothing was imported. :class:`NewerBundleError`.
    :class:`UnsafeVaultError`: others may write in the vault. :class:`VaultFullError`,
    :class:`VaultNotWritableError`: each entry is whole or absent; the import can be repeated.
    """
    with open_bundle(path) as bundle, vault.staging() as folder, vault_errors(folder, "read or written"):
        check_folder(folder, root=vault.root, trust=vault.trust)
        lacking = {member for member in bundle.members if not _holds(vault, member)}
        _check_space(folder, sum(member.size_bytes for member in lacking))
        bundle.extract(folder, lambda member: member in lacking, progress)
        staged = Layout(folder)
        manifests = (_manifest(bundle, staged, key) for key in bundle.keys)
        entries = {one.key.digest: _Named(one.artifact_sizes, one.needs) for one in manifests}
        _check_complete(bundle, entries)
        standing = {key: _standing(vault, key) for key in entries}
        missing = {key: entry for key, entry in entries.items() if standing[key] is None}
        _check_space(folder, max((sum(entry.artifacts.values()) for entry in missing.values()), default=0))
        uses = Counter(digest for entry in missing.values() for digest in entry.artifacts)
        imported = []
        for key in needed_first({key: entry.needs for key, entry in entries.items()}):
            manifest = _manifest(bundle, staged, key)
            if standing[key] == manifest.manifest_digest.hex:
                list(copy_signatures(staged, vault.layout, key))
            if key not in missing:
                continue
            files = {digest: staged.artifact_file(digest) for digest in manifest.artifact_sizes}
            files = {digest: file for digest, file in files.items() if file.exists()}
            if vault.publish_copy(staged, manifest, files).manifest_digest == manifest.manifest_digest:
                imported.append(key)
            uses.subtract(files.keys())
            for digest in files:
                if not uses[digest]:  # the vault has its own copy by now
                    files[digest].unlink()
    return sorted(imported)


def _holds(vault: Vault, member: Member) -> bool:
    """Tell whether the member is an artifact whose bytes the vault has."""
    if member.artifact is None:
        return False
    try:
        vault.verified_path(ArtifactRef(member.artifact, member.size_bytes, member.name))
    except CorruptEntryError:
        return False
    return True


def _manifest(bundle: BundleFile, staged: Layout, key: Digest) -> Manifest:
    try:
        manifest = read_manifest(staged, key)
    except (CorruptEntryError, NewerVaultError) as error:
        # With the place in the bundle, not that where it was staged.
        text = f"{str(error).replace(str(staged.root), str(bundle.path))} Nothing was imported"
        if isinstance(error, NewerVaultError):
            raise NewerBundleError(f"{text}.", bundle.path) from error
        raise BundleError(f"{text}; get the bundle again.", bundle.path) from error
    if manifest is None:
        raise bundle.bad(f"the manifest of {key.short} was removed from {staged.root} while it was imported")
    return manifest


def _check_complete(bundle: BundleFile, entries: Mapping[Digest, _Named]) -> None:
    """Nothing is missing, and nothing is there that no entry needs."""
    held = {member.artifact: member.size_bytes for member in bundle.members if member.artifact is not None}
    for key, entry in entries.items():
        if lacking := [needed for needed in entry.needs if needed not in entries]:
            raise bundle.bad(f"it lacks entry {lacking[0].short}, which entry {key.short} needs")
        for digest, size_bytes in entry.artifacts.items():
            if held.get(digest) != size_bytes:
                raise bundle.bad(f"it lacks artifact {digest.short} of entry {key.short}, or has another size")
    if extra := held.keys() - {digest for entry in entries.values() for digest in entry.artifacts}:
        raise bundle.bad(f"none of its entries names the artifact {min(extra).short}")
    for member in bundle.members:
        if member.signed_key is not None and member.signed_key not in entries:
            raise bundle.bad(f"{member.name} signs no entry of it")


def _standing(vault: Vault, key: Digest) -> str | None:
    """The manifest digest of the entry that stands in the vault, if it is whole or of a later format."""
    try:
        manifest = vault.lookup(key)
        for ref in manifest.artifacts if manifest else ():
            vault.verified_path(ref)
    except CorruptEntryError:
        return None
    except NewerVaultError:
        return _LATER_FORMAT
    return manifest.manifest_digest.hex if manifest else None


def _check_space(folder: Path, wanted_bytes: int) -> None:
    free_bytes = shutil.disk_usage(folder).free
    if wanted_bytes > free_bytes:
        raise VaultFullError(
            f"The import needs {wanted_bytes} bytes on the file system of {folder.parent}, which has {free_bytes} "
            "left. Nothing was imported; free space, or give another vault.",
            folder.parent,
        )
