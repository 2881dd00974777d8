"""Publishing the entries of a bundle. See :mod:`pipevault.store.bundle`.

The whole file is verified, and what the vault lacks of it is written to a staging folder, under names of our own. Only
then each entry is published as any other is, its signatures before it, and after the entries that it needs.
"""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pipevault.digest import Digest
from pipevault.errors import BundleError, CorruptEntryError, NewerBundleError, NewerVaultError, VaultFullError
from pipevault.store.atomic import make_folder, vault_errors, write_file
from pipevault.store.bundle_file import BundleFile, Progress, ignore_progress, open_bundle
from pipevault.store.bundle_index import Member
from pipevault.store.manifest import Manifest
from pipevault.store.needs import needed_first
from pipevault.store.vault import Vault

_LATER_FORMAT = "a later format"

ArtifactSizes = Mapping[Digest, int]


@dataclass(frozen=True)
class _Entry:
    """What a manifest names: its artifacts, and the entries that it needs."""

    artifacts: ArtifactSizes
    needs: tuple[Digest, ...]


def bundle_keys(path: Path) -> tuple[Digest, ...]:
    """The keys of the entries that the bundle says it holds, sorted; only its index is verified.

    :class:`BundleError`, :class:`NewerBundleError`.
    """
    with open_bundle(path) as bundle:
        return bundle.index.keys


def import_bundle(vault: Vault, path: Path, *, progress: Progress = ignore_progress) -> list[Digest]:
    """Publish the entries of the bundle ``path`` that the vault does not hold whole; their keys, sorted.

    Nothing becomes visible before the whole bundle was verified. An entry that stands in the vault stays as it is; if
    it is the one of the bundle, signatures that it lacks are added.
    :class:`BundleError`: damaged, unsafe, or none; nothing was imported. :class:`NewerBundleError`.
    :class:`UnsafeVaultError`: others may write in the vault. :class:`VaultFullError`,
    :class:`VaultNotWritableError`: each entry is whole or absent; the import can be repeated.
    """
    with open_bundle(path) as bundle, vault.staging() as folder, vault_errors(folder, "read or written"):
        entries = _read_entries(bundle)
        _check_complete(bundle, entries)
        standing = {key: _standing(vault, key) for key in entries}
        missing = {key: entry.artifacts for key, entry in entries.items() if standing[key] is None}
        needed = Counter(digest for artifacts in missing.values() for digest in artifacts)
        _check_space(folder, bundle, needed, missing)
        bundle.extract(lambda member: _target(folder, member, needed), progress)
        signatures = _staged_signatures(bundle, folder)
        imported = []
        for key in needed_first({key: entry.needs for key, entry in entries.items()}):
            staged_manifest = folder / f"{key}.json"
            manifest = Manifest.from_bytes(staged_manifest.read_bytes(), staged_manifest)
            if standing[key] not in (None, manifest.manifest_digest.hex):
                continue
            with _signatures(vault, signatures.get(key, ()), folder) as placed:
                if key in missing:
                    files = {digest: folder / digest.hex for digest in missing[key]}
                    found = vault.publish(manifest, files)
                    if found.manifest_digest == manifest.manifest_digest:
                        imported.append(key)
                    else:  # another process was first, with an entry that these signatures are not for
                        _remove(placed)
            for digest in missing.get(key, ()):
                needed[digest] -= 1
                if not needed[digest]:  # the vault has its own copy by now
                    (folder / digest.hex).unlink()
    return sorted(imported)


def _read_entries(bundle: BundleFile) -> dict[Digest, _Entry]:
    """What each entry names; its manifest is verified."""
    entries: dict[Digest, _Entry] = {}
    for member in bundle.index.members:
        if (key := member.key) is None:
            continue
        try:
            manifest = Manifest.from_bytes(bundle.read(member), bundle.path / member.name)
        except NewerVaultError as error:
            raise NewerBundleError(f"{error} Nothing was imported.", bundle.path) from error
        except CorruptEntryError as error:
            raise BundleError(f"{error} Nothing was imported; get the bundle again.", bundle.path) from error
        if manifest.key.digest != key:
            raise _unsound(bundle, f"{member.name} is the manifest of {manifest.key.digest.short}")
        entries[key] = _Entry(manifest.artifact_sizes, manifest.needs)
    return entries


def _check_complete(bundle: BundleFile, entries: Mapping[Digest, _Entry]) -> None:
    """Nothing is missing, and nothing is there that no entry needs."""
    held = {member.artifact: member.size_bytes for member in bundle.index.members if member.artifact is not None}
    for key, entry in entries.items():
        if lacking := [needed for needed in entry.needs if needed not in entries]:
            raise _unsound(bundle, f"it lacks entry {lacking[0].short}, which entry {key.short} needs")
        for digest, size_bytes in entry.artifacts.items():
            if held.get(digest) != size_bytes:
                raise _unsound(bundle, f"it lacks artifact {digest.short} of entry {key.short}, or has another size")
    named = {digest for entry in entries.values() for digest in entry.artifacts}
    if extra := held.keys() - named:
        raise _unsound(bundle, f"none of its entries names the artifact {min(extra).short}")
    for member in bundle.index.members:
        if member.signed_key is not None and member.signed_key not in entries:
            raise _unsound(bundle, f"{member.name} signs no entry of it")


def _unsound(bundle: BundleFile, reason: str) -> BundleError:
    return BundleError(
        f"The bundle {bundle.path} cannot be used: {reason}. Nothing was imported; export it again.", bundle.path
    )


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


def _check_space(
    folder: Path, bundle: BundleFile, needed: Mapping[Digest, int], missing: Mapping[Digest, ArtifactSizes]
) -> None:
    """Room for what is staged, and for the copy of the largest entry that is published from there."""
    members = bundle.index.members
    staged_bytes = sum(member.size_bytes for member in members if not member.artifact or member.artifact in needed)
    wanted_bytes = staged_bytes + max((sum(artifacts.values()) for artifacts in missing.values()), default=0)
    free_bytes = shutil.disk_usage(folder).free
    if wanted_bytes > free_bytes:
        raise VaultFullError(
            f"The import needs {wanted_bytes} bytes on the file system of {folder.parent}, which has {free_bytes} "
            "left. Nothing was imported; free space, or give another vault.",
            folder.parent,
        )


def _target(folder: Path, member: Member, needed: Mapping[Digest, int]) -> Path | None:
    """Where ``member`` is staged: its file name, which the index was checked to be one of the vault's."""
    return None if member.artifact is not None and member.artifact not in needed else folder / Path(member.name).name


def _staged_signatures(bundle: BundleFile, folder: Path) -> dict[Digest, list[tuple[str, Path]]]:
    """For each key, the name in the vault and the staged file of each signature."""
    found: dict[Digest, list[tuple[str, Path]]] = {}
    for member in bundle.index.members:
        if member.signed_key is not None:
            found.setdefault(member.signed_key, []).append((member.name, folder / Path(member.name).name))
    return found


@contextmanager
def _signatures(vault: Vault, signatures: Sequence[tuple[str, Path]], folder: Path) -> Iterator[list[Path]]:
    """Publish the signatures that the vault lacks; if the block fails, they go again."""
    placed: list[Path] = []
    try:
        for name, staged in signatures:
            path = vault.root / name
            if os.path.lexists(path):
                continue
            make_folder(path.parent)
            placed.append(path)  # before: it may be there although writing it failed
            write_file(path, staged.read_bytes(), staging=folder)
        yield placed
    except BaseException:  # whatever it was goes on; a signature for an entry that is not there must not stay
        _remove(placed)
        raise


def _remove(paths: list[Path]) -> None:
    for path in paths:
        path.unlink(missing_ok=True)
    paths.clear()
