"""Writing entries, and what they need, to a bundle. See :mod:`pipevault.store.bundle`."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from pipevault.digest import Digest, digest_bytes, digest_file
from pipevault.errors import (
    BundleError,
    CannotSaveError,
    CorruptEntryError,
    PipevaultError,
    UnknownKeyError,
    VaultError,
)
from pipevault.store.atomic import publish_file, vault_errors
from pipevault.store.bundle_file import Progress, ignore_progress, write_bundle
from pipevault.store.bundle_index import (
    INDEX_LIMIT_BYTES,
    MANIFEST_LIMIT_BYTES,
    SIGNATURE_LIMIT_BYTES,
    BundleIndex,
    Member,
)
from pipevault.store.manifest import Manifest
from pipevault.store.signature import signature_files
from pipevault.store.trust import check_ownership
from pipevault.store.vault import Vault


@dataclass(frozen=True)
class ExportReport:
    """What a bundle holds, and its own size."""

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

    That is one step. Equal entries make equal bytes. :class:`UnknownKeyError`: no key was given, no entry has one, or
    the vault lacks what an entry needs.
    :class:`CorruptEntryError`, :class:`NewerVaultError`, :class:`UnsafeVaultError`: an entry cannot be exported.
    :class:`CannotSaveError`: ``path`` exists and ``overwrite`` is not set, lies in the vault, or cannot be written.
    :class:`BundleError`: too many files for one bundle.
    """
    wanted = tuple(sorted(set(keys)))
    if not wanted:
        raise UnknownKeyError(f"No entry of {vault.root} was chosen, so there is nothing to export.", "")
    _check_output(vault, path, overwrite)
    manifests = _with_needed(vault, wanted)
    index = _index(_members(vault, manifests), vault.root)
    with _new_file(path, overwrite) as temporary, temporary.open("xb") as file:
        size_bytes = write_bundle(file, index, vault.root, progress)
    return ExportReport(
        keys=tuple(sorted(manifests)),
        artifacts=sum(member.artifact is not None for member in index.members),
        signatures=sum(member.signed_key is not None for member in index.members),
        size_bytes=size_bytes,
    )


def _check_output(vault: Vault, path: Path, overwrite: bool) -> None:
    folder = path.parent
    if not folder.is_dir():
        raise CannotSaveError(f"{path} cannot be written: there is no folder {folder}. Make it first.", path)
    if Path(os.path.realpath(folder)).is_relative_to(vault.root):
        raise CannotSaveError(f"{path} lies in the vault, which holds no bundles. Give another place.", path)
    if os.path.lexists(path):
        if path.is_symlink() or not path.is_file():
            raise CannotSaveError(f"{path} exists and is no regular file. Give another path.", path)
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


def _members(vault: Vault, manifests: Mapping[Digest, Manifest]) -> Iterator[Member]:
    """Each file that the entries need; the bytes of artifacts are looked at when they are copied."""
    layout = vault.layout
    for key, manifest in manifests.items():
        data = manifest.to_bytes()
        path = layout.manifest_file(key)
        yield Member(_name(path, vault), _within(len(data), MANIFEST_LIMIT_BYTES, path), digest_bytes(data))
        for ref in manifest.artifacts:
            yield Member(_name(vault.owned_path(ref), vault), ref.size_bytes, ref.digest)
        for path in signature_files(layout, key):
            with vault_errors(path, "read"):
                check_ownership(path, root=vault.root, trust=vault.trust)
                size_bytes = _within(path.stat().st_size, SIGNATURE_LIMIT_BYTES, path)
                yield Member(_name(path, vault), size_bytes, digest_file(path))


def _name(path: Path, vault: Vault) -> str:
    return path.relative_to(vault.root).as_posix()


def _within(size_bytes: int, limit_bytes: int, path: Path) -> int:
    if size_bytes > limit_bytes:
        raise BundleError(f"{path} has {size_bytes} bytes, more than a bundle takes ({limit_bytes}).", path)
    return size_bytes


def _index(members: Iterable[Member], root: Path) -> BundleIndex:
    different = sorted(set(members), key=lambda member: member.name)
    for member, following in pairwise(different):
        if member.name == following.name:
            path = root / member.name
            raise CorruptEntryError(
                f"Two of the entries disagree about the size of {path}. Run `pipevault verify`.", path
            )
    index = BundleIndex(tuple(different))
    if len(index.to_bytes()) > INDEX_LIMIT_BYTES:
        raise BundleError(f"{len(index.members)} files are too many for one bundle. Export fewer entries.", root)
    return index


@contextmanager
def _new_file(path: Path, overwrite: bool) -> Iterator[Path]:
    """A unique name beside ``path`` for a file that is moved there at the end; what goes wrong removes it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(8)}.tmp")
    try:
        yield temporary
        if not overwrite and os.path.lexists(path):
            raise CannotSaveError(f"{path} was made by somebody else meanwhile. Give another path.", path)
        _publish(temporary, path)
    except PipevaultError:  # some of them are OSErrors too
        raise
    except OSError as error:
        raise CannotSaveError(f"{path} cannot be written: {error.strerror or error}.", path) from error
    finally:
        temporary.unlink(missing_ok=True)


def _publish(temporary: Path, path: Path) -> None:
    try:
        publish_file(temporary, path)
    except VaultError as error:
        cause = error.__cause__
        reason = cause.strerror if isinstance(cause, OSError) else str(error)
        raise CannotSaveError(f"{path} cannot be written: {reason}.", path) from error
