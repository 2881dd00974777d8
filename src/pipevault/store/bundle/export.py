"""Writing entries, and what they need, to a bundle. See :mod:`pipevault.store.bundle`."""

from __future__ import annotations

import os
import re
import secrets
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TypeAlias

from pipevault.digest import Digest
from pipevault.errors import BundleError, CannotSaveError, CorruptEntryError, PipevaultError, UnknownKeyError
from pipevault.files.atomic import replace_durably, share_like_folder, vault_errors
from pipevault.files.byte_progress import Progress, ignore_progress
from pipevault.files.claims import claim_folder, remove_abandoned
from pipevault.reading import chunks, open_regular, read_file
from pipevault.store.bundle.zip_file import (
    MANIFEST_LIMIT_BYTES,
    MARKER,
    MARKER_NAME,
    MEMBER_LIMIT,
    SIGNATURE_LIMIT_BYTES,
    new_member,
)
from pipevault.store.manifest import ArtifactRef, Manifest
from pipevault.store.places import signature_files
from pipevault.store.trust.owners import check_ownership
from pipevault.store.vault import Vault

_PART_NAME = re.compile(r"\..+\.\d+\.[0-9a-f]{16}\.part")

_Source: TypeAlias = ArtifactRef | Manifest | Path
"""An artifact, a manifest, or the path of a signature."""


@dataclass(frozen=True)
class ExportReport:
    """The content of a bundle, and its own size."""

    keys: tuple[Digest, ...]
    artifacts: int
    signatures: int
    size_bytes: int


def export_bundle(
    vault: Vault,
    keys: Iterable[Digest],
    path: Path,
    *,
    overwrite: bool = False,
    progress: Progress = ignore_progress,
) -> ExportReport:
    """Write the entries ``keys`` and those that they need, with artifacts and signatures, to the bundle ``path``.

    The bundle appears in one step. Equal entries make equal bytes. :class:`UnknownKeyError`: no key was given, no entry
    has one, or the vault lacks what an entry needs.
    :class:`CorruptEntryError`, :class:`NewerVaultError`, :class:`UnsafeVaultError`: an entry cannot be exported.
    :class:`CannotSaveError`: ``path`` exists and ``overwrite`` is not set, lies in the vault, or cannot be written.
    :class:`BundleError`: too many files for one bundle.
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


def _with_needed(vault: Vault, keys: Iterable[Digest]) -> dict[Digest, Manifest]:
    """The manifests of ``keys`` and of all entries that these need."""
    found: dict[Digest, Manifest] = {}
    waiting = list(keys)
    for key in waiting:
        manifest = vault.lookup(key)
        if manifest is None:
            raise UnknownKeyError(f"No entry of {vault.root} has the key {key.short}.", key.hex)
        found[key] = manifest
    while waiting:
        needing = found[waiting.pop()]
        new = {key: vault.lookup(key) for key in needing.needs if key not in found}
        if missing := [key for key, manifest in new.items() if manifest is None]:
            plan = needing.key.digest.short
            raise UnknownKeyError(
                f"{plan} needs what {vault.root} does not hold: {', '.join(key.short for key in missing)}. Freeze the "
                f"pipeline again, or remove what needs it: pipevault rm {plan}",
                missing[0].hex,
            )
        found |= {key: manifest for key, manifest in new.items() if manifest is not None}
        waiting += new
    return found


def _sources(vault: Vault, manifests: Mapping[Digest, Manifest]) -> dict[str, _Source]:
    """The files that the entries need, by the name of each member, sorted; their bytes are checked when copied."""
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
    """The bytes of a manifest or of the signature at a path."""
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
    """A name for a file that is moved to ``path`` at the end, in a folder next to it that goes whatever happens. If the
    process is killed, the next export to this place removes it.
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
