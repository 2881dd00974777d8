"""Bundles: entries with everything they need in one file, to carry them to another vault.

A bundle is a vault inside a zip file: ``vault.json``, then the artifacts, manifests and signatures under the names that
they have in a vault, sorted. Nothing is compressed: what a compressor writes depends on its version, and equal entries
make equal files; compress the file as a whole where it is sent. :mod:`~pipevault.store.bundle.zip_file` is the file.

Whoever imports one verifies the whole file while what the vault lacks of it is written to a staging folder, which is
then a vault like any other: its entries are copied as those of a tier are, each after the entries that it needs.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TypeAlias

from pipevault.digest import Digest
from pipevault.errors import (
    BundleError,
    CannotSaveError,
    CorruptEntryError,
    NewerBundleError,
    NewerVaultError,
    PipevaultError,
    UnknownKeyError,
    VaultFullError,
)
from pipevault.files.atomic import replace_durably, share_like_folder, vault_errors
from pipevault.files.byte_progress import Progress, ignore_progress
from pipevault.files.claims import claim_folder, remove_abandoned
from pipevault.reading import chunks, open_regular, read_file
from pipevault.settings import Settings
from pipevault.store.bundle.zip_file import (
    MANIFEST_LIMIT_BYTES,
    MARKER,
    MARKER_NAME,
    MEMBER_LIMIT,
    SIGNATURE_LIMIT_BYTES,
    BundleFile,
    Member,
    new_member,
    open_bundle,
)
from pipevault.store.layout import Layout
from pipevault.store.manifest import ArtifactRef, Manifest, read_manifest
from pipevault.store.marker import ensure_vault
from pipevault.store.needs import needed_first
from pipevault.store.places import signature_files
from pipevault.store.trust.owners import check_chain, check_ownership
from pipevault.store.trust.signature import copy_signatures
from pipevault.store.vault import Vault

_PART_NAME = re.compile(r"\..+\.\d+\.[0-9a-f]{16}\.part")
_LATER_FORMAT = "a later format"

_Source: TypeAlias = ArtifactRef | Manifest | Path
"""An artifact, a manifest, or the path of a signature."""


@dataclass(frozen=True)
class ExportReport:
    """The content of a bundle, and its own size."""

    keys: tuple[Digest, ...]
    artifacts: int
    signatures: int
    size_bytes: int


@dataclass(frozen=True)
class _Named:
    artifacts: Mapping[Digest, int]
    needs: tuple[Digest, ...]


def export_bundle(
    vault: Vault,
    keys: Iterable[Digest],
    path: Path,
    *,
    overwrite: bool = False,
    progress: Progress = ignore_progress,
) -> ExportReport:
    """Write the entries ``keys`` and those that they need, with artifacts and signatures, to the bundle ``path``, which
    appears in one step. Equal entries make equal bytes.

    :class:`UnknownKeyError`: no key was given, or the vault lacks an entry. :class:`CorruptEntryError`,
    :class:`NewerVaultError`, :class:`UnsafeVaultError`: an entry cannot be exported. :class:`CannotSaveError`: ``path``
    exists and ``overwrite`` is not set, lies in the vault, or cannot be written. :class:`BundleError`: too many files.
    """
    wanted = tuple(sorted(set(keys)))
    if not wanted:
        raise UnknownKeyError(f"No entry of {vault.root} was chosen, so there is nothing to export.", "")
    _check_output(vault, path, overwrite)
    manifests = _with_needed(vault, wanted)
    sources = _sources(vault, manifests)
    with _new_file(path, overwrite) as temporary, temporary.open("xb") as file:
        _write(file, vault, sources, progress)
        size_bytes = file.tell()
    artifacts = sum(isinstance(source, ArtifactRef) for source in sources.values())
    signatures = len(sources) - artifacts - len(manifests)
    return ExportReport(tuple(sorted(manifests)), artifacts, signatures, size_bytes)


def bundle_keys(path: Path) -> tuple[Digest, ...]:
    """Return the keys that the bundle says it holds, sorted; no content is verified. :class:`BundleError`."""
    with open_bundle(path) as bundle:
        return bundle.keys


def import_to(settings: Settings, path: Path, *, progress: Progress = ignore_progress) -> tuple[Vault, list[Digest]]:
    """Import into the vault of ``settings.dir``, which is made, if there is none, once the whole bundle was verified.
    Return the vault and what :func:`import_bundle` does.
    """
    is_new = not os.path.lexists(settings.dir)
    vault = Vault.of(settings, create=True, mark=False)
    try:
        return vault, import_bundle(vault, path, progress=progress)
    finally:
        if not vault.layout.vault_file.exists():
            for folder in (vault.layout.tmp_dir, *([vault.root] if is_new else [])):
                with suppress(OSError):  # not empty: another process makes a vault of it
                    folder.rmdir()


def import_bundle(vault: Vault, path: Path, *, progress: Progress = ignore_progress) -> list[Digest]:
    """Publish the entries of the bundle ``path`` that the vault does not hold whole; return their keys, sorted.

    Nothing becomes visible before the whole bundle was verified. An entry that stands in the vault stays as it is; if
    it is the one of the bundle, signatures that it lacks are added.
    :class:`BundleError`: damaged, unsafe, or none; nothing was imported. :class:`NewerBundleError`.
    :class:`UnsafeVaultError`: others may write in the vault. :class:`VaultFullError`,
    :class:`VaultNotWritableError`: each entry is whole or absent; the import can be repeated.
    """
    with open_bundle(path) as bundle, vault.staging() as folder, vault_errors(folder, "read or written"):
        check_chain(folder, vault.root, vault.trust)
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
        ensure_vault(vault.layout, create=True)
        imported = []
        for key in needed_first({key: entry.needs for key, entry in entries.items()}):
            manifest = _manifest(bundle, staged, key)
            if standing[key] == manifest.manifest_digest.hex:
                list(copy_signatures(staged, vault.layout, key))
            if key not in missing:
                continue
            places = {digest: staged.artifact_file(digest) for digest in manifest.artifact_sizes}
            files = {digest: file for digest, file in places.items() if file.exists()}
            if vault.publish_copy(staged, manifest, files).manifest_digest == manifest.manifest_digest:
                imported.append(key)
            uses.subtract(files.keys())
            for digest in files:
                if not uses[digest]:  # the vault has its own copy by now
                    files[digest].unlink()
    return sorted(imported)


def _check_output(vault: Vault, path: Path, overwrite: bool) -> None:
    folder = path.parent
    if not folder.is_dir():
        raise CannotSaveError(f"{path} cannot be written: its folder {folder} does not exist. Make it first.", path)
    if Path(os.path.realpath(folder)).is_relative_to(vault.root):
        raise CannotSaveError(f"{path} lies in the vault, which holds no bundles. Give another place.", path)
    if os.path.lexists(path):
        if path.is_symlink() or not path.is_file():
            raise CannotSaveError(f"{path} exists and is not a regular file. Give another path.", path)
        if not overwrite:
            raise CannotSaveError(f"{path} exists already. Give another path, or --overwrite.", path)


def _with_needed(vault: Vault, keys: Sequence[Digest]) -> dict[Digest, Manifest]:
    found: dict[Digest, Manifest] = {}
    waiting: list[tuple[str, Sequence[Digest]]] = [("", keys)]
    for plan, wanted in waiting:
        new = {key: vault.lookup(key) for key in wanted if key not in found}
        if missing := [key for key, manifest in new.items() if manifest is None]:
            text = f"No entry of {vault.root} has the key {missing[0].short}."
            if plan:
                text = (
                    f"{plan} needs what {vault.root} does not hold: {', '.join(key.short for key in missing)}. Freeze "
                    f"the pipeline again, or remove what needs it: pipevault rm {plan}"
                )
            raise UnknownKeyError(text, missing[0].hex)
        found |= {key: manifest for key, manifest in new.items() if manifest is not None}
        waiting += [(key.short, manifest.needs) for key, manifest in new.items() if manifest is not None]
    return found


def _sources(vault: Vault, manifests: Mapping[Digest, Manifest]) -> dict[str, _Source]:
    """The files of the entries by the name of each member, sorted; their bytes are checked when they are copied."""
    layout, found = vault.layout, dict[str, _Source]()
    for key, manifest in manifests.items():
        found[_name(layout.manifest_file(key), vault)] = manifest
        found |= {_name(path, vault): path for path in signature_files(layout, key)}
        for ref in manifest.artifacts:
            path = layout.artifact_file(ref.digest)
            other = found.setdefault(_name(path, vault), ref)
            if isinstance(other, ArtifactRef) and other.size_bytes != ref.size_bytes:
                raise CorruptEntryError(
                    f"Two of the entries disagree about the size of {path}. Run `pipevault verify`.", path
                )
    if len(found) > MEMBER_LIMIT:
        raise BundleError(f"{len(found)} files are too many for one bundle. Export fewer entries.", vault.root)
    return dict(sorted(found.items()))


def _write(file: IO[bytes], vault: Vault, sources: Mapping[str, _Source], progress: Progress) -> None:
    total_bytes = sum(source.size_bytes for source in sources.values() if isinstance(source, ArtifactRef))
    done_bytes = 0
    progress(0, total_bytes)
    with zipfile.ZipFile(file, "w") as bundle:
        with new_member(bundle, MARKER_NAME, len(MARKER)) as member:
            member.write(MARKER)
        for name, source in sources.items():
            if not isinstance(source, ArtifactRef):
                data = _document(vault, source)
                with new_member(bundle, name, len(data)) as member:
                    member.write(data)
                continue
            with vault.open_artifact(source) as opened, new_member(bundle, name, source.size_bytes) as member:
                for chunk in _chunks(opened.path):
                    member.write(chunk)
                    done_bytes += len(chunk)
                    progress(done_bytes, total_bytes)


def _document(vault: Vault, source: Manifest | Path) -> bytes:
    if isinstance(source, Manifest):
        data, path, limit_bytes = source.to_bytes(), vault.layout.manifest_file(source.key.digest), MANIFEST_LIMIT_BYTES
    else:
        path, limit_bytes = source, SIGNATURE_LIMIT_BYTES
        with vault_errors(path, "read"):
            check_ownership(path, root=vault.root, trust=vault.trust)
            data = read_file(path)
    if len(data) > limit_bytes:
        raise BundleError(f"{path} has {len(data)} bytes, more than a bundle takes ({limit_bytes}).", path)
    return data


def _chunks(source: Path) -> Iterator[bytes]:
    with vault_errors(source, "read"), open_regular(source) as reader:
        yield from chunks(reader)


def _name(path: Path, vault: Vault) -> str:
    return path.relative_to(vault.root).as_posix()


@contextmanager
def _new_file(path: Path, overwrite: bool) -> Iterator[Path]:
    """A name for a file that is moved to ``path`` at the end, in a folder that goes whatever happens; after a kill,
    with the next export to this place.
    """
    claim = None
    try:
        for name in os.listdir(path.parent):
            if _PART_NAME.fullmatch(name):
                remove_abandoned(path.with_name(name))
        while claim is None:
            claim = claim_folder(path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(8)}.part"))
        yield claim.path / path.name
        if not overwrite and os.path.lexists(path):
            raise CannotSaveError(f"{path} was made by somebody else meanwhile. Give another path.", path)
        share_like_folder(claim.path / path.name, path.parent)
        replace_durably(claim.path / path.name, path)
    except PipevaultError:  # some of them are OSErrors too
        raise
    except OSError as error:
        raise CannotSaveError(f"{path} cannot be written: {error.strerror or error}.", path) from error
    finally:
        if claim is not None:
            claim.release()


def _holds(vault: Vault, member: Member) -> bool:
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
    """The manifest digest of the entry in the vault, if it is whole or of a later format."""
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
