"""The vault: the on-disk store of frozen entries, as one object. The format is specified in ``cache_layout.md``."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from pipevault.digest import Digest
from pipevault.errors import (
    CorruptEntryError,
    NewerVaultError,
    UnknownKeyError,
    UnsafeVaultError,
    VaultError,
    VaultNotWritableError,
)
from pipevault.files.opened import OpenedFile, Question, open_verified
from pipevault.reading import open_regular, read_open, stamp_of
from pipevault.settings import Settings
from pipevault.settings.ownership import ONLY_THIS_USER, Trust, check_status
from pipevault.settings.user_folders import expand_user
from pipevault.store.layout import Layout
from pipevault.store.locks.leases import Lease, take_lease
from pipevault.store.locks.lock import key_lock
from pipevault.store.manifest import ArtifactRef, BrokenManifest, Manifest, parse_manifest, read_manifest
from pipevault.store.marker import ensure_vault, is_writable
from pipevault.store.places import children, iter_keys, the_key
from pipevault.store.publish import check_artifact, publish_entry, quarantine_file, staging_folder
from pipevault.store.retention.leftovers import tidy
from pipevault.store.retention.usage import record_use
from pipevault.store.trust.owners import check_ownership, check_root, is_changeable, trust_of
from pipevault.store.trust.signature import copy_signatures, sign_entry
from pipevault.store.trust.signing_keys import PrivateKey

if TYPE_CHECKING:  # what a load does not need is imported where it is used
    from pipevault.store.retention.removal import Removal

__all__ = ["BrokenManifest", "Vault"]


@dataclass(frozen=True)
class ReadEntry:
    """A manifest, and the ``stamp`` of its file. ``unowned``: why it counts only if a trusted key signed it."""

    manifest: Manifest
    unowned: UnsafeVaultError | None
    stamp: str


@dataclass(frozen=True)
class Vault:
    """A vault folder. Holds no open file, so threads may share it and other processes get it pickled."""

    root: Path
    """Absolute, links followed."""
    writable: bool
    """True if the folder could be written when it was opened."""
    trust: Trust = ONLY_THIS_USER
    """The users and groups whose files are trusted besides this user's and root's."""

    @classmethod
    def open(
        cls,
        root: Path,
        *,
        create: bool = True,
        trust: Trust = ONLY_THIS_USER,
        shared: bool = False,
        mark: bool = True,
    ) -> Vault:
        """Open the vault at ``root``; with ``create``, an absent or empty folder becomes one.

        ``shared``: members of the folder's group work in it together. A new vault is made so that they can, and they
        trust one another; whoever is not a member trusts no one for it. A vault that cannot be written opens all the
        same. Unless ``mark``, a new vault is only a folder, for :func:`~pipevault.store.marker.ensure_vault` to mark;
        this raises like that.
        """
        layout = Layout(Path(os.path.realpath(expand_user(root))))
        ensure_vault(layout, create=create, shared=shared, mark=mark)
        if shared and (group := layout.root.stat().st_gid) in (os.getegid(), *os.getgroups()):
            trust = replace(trust, groups=trust.groups | {group})
        return cls(layout.root, is_writable(layout), trust)

    @classmethod
    def of(cls, settings: Settings, *, create: bool = False, mark: bool = True) -> Vault:
        """Open the vault of ``settings.dir``. Raises like :meth:`open`."""
        trust, shared = trust_of(settings), settings.is_shared
        return cls.open(settings.dir, create=create, trust=trust, shared=shared, mark=mark)

    @property
    def layout(self) -> Layout:
        return Layout(self.root)

    def lookup(self, key: Digest) -> Manifest | None:
        """Return the manifest of ``key``, or ``None`` if no entry has it; its artifacts are not looked at.

        :class:`CorruptEntryError`: unreadable, edited, or another key's. :class:`NewerVaultError`.
        :class:`UnsafeVaultError`: others may write it, the vault or a folder above it.
        """
        read = self.read_entry(key)
        if read is not None and read.unowned is not None:
            raise read.unowned
        return None if read is None else read.manifest

    def read_entry(self, key: Digest) -> ReadEntry | None:
        """Return the manifest of ``key``, if there is one, whoever owns it. Raises like :meth:`lookup` otherwise."""
        path = self.layout.manifest_file(key)
        unowned: UnsafeVaultError | None = None
        with _unreadable(path):
            try:
                with open_regular(path) as file:
                    status = os.fstat(file.fileno())
                    try:
                        check_root(self.root, trust=self.trust)
                        check_ownership(path, root=self.root, trust=self.trust)
                        check_status(path, status, self.trust)  # what stands at the path may be another by now
                    except UnsafeVaultError as error:
                        unowned = error
                    return ReadEntry(parse_manifest(read_open(file, path), path, key), unowned, stamp_of(status))
            except FileNotFoundError:
                with suppress(FileNotFoundError):  # nor is there a vault any more
                    check_root(self.root, trust=self.trust)  # it is met before anything is frozen into it
                return None

    def stands(self, key: Digest, stamp: str) -> bool:
        """Return whether the manifest of ``key`` is still the file that had ``stamp`` when it was read."""
        try:
            return stamp_of(os.stat(self.layout.manifest_file(key))) == stamp
        except OSError:
            return False

    def owned_path(self, ref: ArtifactRef) -> Path:
        """Return the path of ``ref``'s bytes; owner and permissions were checked just now. :class:`CorruptEntryError`:
        it is missing or cannot be looked at. :class:`UnsafeVaultError`.
        """
        path = self.layout.artifact_file(ref.digest)
        with _unreadable(path):
            try:
                check_ownership(path, root=self.root, trust=self.trust)
            except FileNotFoundError as error:
                raise CorruptEntryError(f"Artifact {ref.name} is missing: {path}.", path) from error
        return path

    def verified_path(self, ref: ArtifactRef) -> Path:
        """Do the same; size and digest were checked too."""
        self.owned_path(ref)
        return check_artifact(self.layout, ref)

    def open_artifact(self, ref: ArtifactRef, *, signed: bool = False) -> OpenedFile:
        """Open ``ref``'s bytes for as long as the caller holds them: owner, permissions, size and digest are those of
        the very file that is held, or of a copy where others could write to it meanwhile. Raises like
        :meth:`verified_path`. ``signed``: a trusted key signed the entry, so that only size and digest count.
        """
        path = self.layout.artifact_file(ref.digest) if signed else self.owned_path(ref)
        # The folders of a signed entry are not looked at, so what is used is a copy.
        changeable: Question = (lambda descriptor, status: True) if signed else is_changeable
        return open_verified(path, ref.digest, ref.size_bytes, what=f"Artifact {ref.name}", is_changeable=changeable)

    def staging(self) -> AbstractContextManager[Path]:
        self.require_writable()
        return staging_folder(self.layout)

    def publish(self, manifest: Manifest, files: Mapping[Digest, Path]) -> Manifest:
        """Make the entry visible: copy ``files`` (by artifact digest) and write the manifest last.

        Load the manifest that is returned, the one that now stands in the vault: another process may have been first.
        Every artifact must be in ``files`` or intact in the vault. What is whole or intact is kept as it is; what is
        damaged goes to quarantine and is replaced. :class:`CorruptEntryError`: a file is not what the manifest says, or
        an artifact is nowhere. :class:`NewerVaultError`: the entry there has a later format, and stays.
        :class:`VaultFullError`, :class:`VaultNotWritableError`: the entry is absent or whole.
        """
        self.require_writable()
        standing = publish_entry(self.layout, manifest, files)
        if standing.manifest_digest == manifest.manifest_digest:
            return standing
        return self.lookup(manifest.key.digest) or standing  # somebody else's: it must be owned like any other

    def publish_copy(self, source: Layout, manifest: Manifest, files: Mapping[Digest, Path]) -> Manifest:
        """Publish an entry of another vault, or of a bundle, with what signs it. Answers like :meth:`publish`. The
        signatures go first, so that no reader meets the copy without them, and go again if the copy does not come to
        stand there.
        """
        placed: list[Path] = []
        standing = None
        try:
            for path in copy_signatures(source, self.layout, manifest.key.digest):
                placed.append(path)
            standing = self.publish(manifest, files)
        finally:
            if standing is None or standing.manifest_digest != manifest.manifest_digest:
                for path in placed:
                    path.unlink(missing_ok=True)
        return standing

    def sign(self, manifest: Manifest, key: PrivateKey) -> bool:
        """Verify the entry's artifacts and sign it; ``False`` if a good signature by ``key`` stands there."""
        self.require_writable()
        for ref in manifest.artifacts:
            self.verified_path(ref)
        return sign_entry(self.layout, manifest, key)

    def lock(
        self, key: Digest, *, timeout_s: float, on_wait: Callable[[str], None] | None = None
    ) -> AbstractContextManager[None]:
        tidy(self.layout)
        return key_lock(self.layout, key, timeout_s=timeout_s, on_wait=on_wait)

    def quarantine(self, path: Path, reason: str) -> Path | None:
        """See :func:`~pipevault.store.publish.quarantine_file`; ``None`` in a vault that cannot be written, too."""
        return quarantine_file(self.layout, path, reason) if self.writable else None

    def manifests(self) -> Iterator[Manifest | BrokenManifest]:
        """Give all entries, sorted by key, also those that cannot be used; one that vanishes meanwhile is left out."""
        for key in iter_keys(self.layout):
            try:
                manifest = read_manifest(self.layout, key)
            except (CorruptEntryError, NewerVaultError) as error:
                yield BrokenManifest(self.layout.manifest_file(key), str(error), key)
            else:
                if manifest is not None:
                    yield manifest

    def shelf(self, shelf: Digest) -> list[Digest]:
        """Return the keys on a shelf (:attr:`pipevault.key.Key.shelf`), sorted. Only names are listed: whoever takes an
        entry from here compares its factors.
        """
        folder = self.layout.shelf_dir(shelf)
        files = children(folder) if folder.is_dir() else []
        return [key for file in files if (key := self.layout.key_of_manifest(file)) is not None]

    def find(self, prefix: str) -> Manifest:
        """Return the entry whose key begins with ``prefix``. Raises like :func:`~pipevault.store.places.the_key`,
        :meth:`lookup`.
        """
        key = the_key(prefix, iter_keys(self.layout), f"entry of {self.root}")
        manifest = read_manifest(self.layout, key)
        if manifest is None:
            raise UnknownKeyError(f"The entry of {key.short} was removed from {self.root} just now.", prefix)
        return manifest

    def plan_removal(self, keys: Sequence[Digest], *, with_needed: bool = False, shown: bool = True) -> Removal:
        from pipevault.store.retention.removal import plan_entries_removal

        return plan_entries_removal(self.layout, keys, with_needed=with_needed, shown=shown)

    def remove(self, plan: Removal, *, ignore_leases: bool = False) -> Removal:
        self.require_writable()
        from pipevault.store.retention.removal import remove_entries

        return remove_entries(self.layout, plan, ignore_leases=ignore_leases)

    def record_use(self, key: Digest) -> None:
        record_use(self.layout, key, writable=self.writable)

    def lease(self, key: Digest) -> Lease:
        if self.writable:
            tidy(self.layout)
        return take_lease(self.layout, key, writable=self.writable)

    def pin(self, key: Digest, name: str, *, move: bool = False) -> Digest | None:
        self.require_writable()
        from pipevault.store.retention.pins import pin

        return pin(self.layout, key, name, move=move)

    def unpin(self, name: str) -> Digest | None:
        self.require_writable()
        from pipevault.store.retention.pins import unpin

        return unpin(self.layout, name)

    def require_writable(self, advice: str = "Fix its permissions, or give another folder.") -> None:
        if not self.writable:
            raise VaultNotWritableError(f"The vault {self.root} is read-only for this user. {advice}", self.root)


@contextmanager
def _unreadable(path: Path) -> Iterator[None]:
    try:
        yield
    except VaultError:  # some are OSErrors too
        raise
    except OSError as error:
        raise CorruptEntryError(f"{path} cannot be read: {error.strerror}.", path) from error
