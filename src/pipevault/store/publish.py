"""Publishing: what goes into a vault is written in a staging folder, which one process holds, and renamed into place.

Of an entry the artifacts go first, the manifest last. Everything is written and verified before the first rename, so
that a full disk is met there.

Removing an entry and publishing another that shares an artifact may meet. So a publisher marks each artifact that it
reuses as young (its time of change), which removal leaves alone, and looks once more after the manifest is in place:
from then on every removal sees that the artifact is named. A removal also takes the folder of a shelf that it emptied,
so a publisher makes it again if it vanishes before the manifest stands in it.
"""

from __future__ import annotations

import os
import secrets
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from pathlib import Path

from pipevault.digest import Digest
from pipevault.errors import CorruptEntryError, VaultError
from pipevault.files.atomic import copy_file, make_folder, publish_file, share_like_folder, vault_errors, write_file
from pipevault.files.claims import claim_folder
from pipevault.files.opened import open_verified
from pipevault.store.layout import QUARANTINE_TIME, Layout
from pipevault.store.manifest import ArtifactRef, Manifest, read_manifest

ARTIFACT_MODE = 0o444
_SHELF_TRIES = 10


@contextmanager
def staging_folder(layout: Layout) -> Iterator[Path]:
    """Make a new folder with a unique name, private to this user, held while this process lives, removed at exit.
    Raises like :func:`pipevault.files.atomic.make_folder`.
    """
    make_folder(layout.tmp_dir)
    claim = None
    while claim is None:
        folder = own_place(layout)
        with vault_errors(folder, "created"):
            claim = claim_folder(folder)
    with vault_errors(claim.path, "shared"):
        share_like_folder(claim.path, layout.tmp_dir)  # so that the others of a group remove what a dead member left
    try:
        yield claim.path
    finally:
        # What cannot be removed is harmless: nothing reads another process's staging folder.
        claim.release()


def own_place(layout: Layout) -> Path:
    return layout.staging_dir(host=socket.gethostname(), pid=os.getpid(), random_hex=secrets.token_hex(8))


def write_document(layout: Layout, path: Path, data: bytes) -> None:
    """Create or replace a small file of the vault in one step; its folder is made if need be. Raises like
    :func:`pipevault.files.atomic.write_file`.
    """
    make_folder(path.parent)
    with staging_folder(layout) as folder:
        write_file(path, data, staging=folder)


def publish_entry(layout: Layout, manifest: Manifest, files: Mapping[Digest, Path]) -> Manifest:
    refs = {ref.digest: ref for ref in manifest.artifacts}
    if unknown := files.keys() - refs.keys():
        names = ", ".join(digest.short for digest in sorted(unknown))
        raise ValueError(f"Files were given for artifacts that the manifest does not name: {names}.")
    data = manifest.to_bytes()
    if (standing := whole_entry(layout, manifest.key.digest)) is not None:
        return standing
    with staging_folder(layout) as folder:
        staged = {digest: _stage(layout, ref, files, folder) for digest, ref in refs.items()}
        path = layout.manifest_file(manifest.key.digest)
        staged_manifest = folder / path.name
        write_file(staged_manifest, data)
        for digest, source in staged.items():
            if source is not None:
                _place(layout, refs[digest], source)
        # Another process may have published meanwhile, for the lock is advisory: the first whole entry stays.
        if os.path.lexists(path):
            if (standing := whole_entry(layout, manifest.key.digest)) is not None:
                return standing
            quarantine_file(layout, path, "The entry was not whole when it was frozen again.")
        _publish_manifest(staged_manifest, path)
        _put_back_vanished(layout, refs, files, folder, path)
    return manifest


def quarantine_file(layout: Layout, path: Path, reason: str) -> Path | None:
    """Move a bad file to ``quarantine/`` with a note of the ``reason``; return its new path. ``None`` if it could not
    be moved (the vault is read-only or full), or was gone already.
    """
    if path == layout.root or not path.is_relative_to(layout.root):
        raise ValueError(f"{path} is not a file of the vault {layout.root}.")
    time = datetime.now(timezone.utc).strftime(QUARANTINE_TIME)
    target = layout.quarantine_file(time=time, random_hex=secrets.token_hex(4), name=path.name)
    try:
        make_folder(layout.quarantine_dir)
        with vault_errors(path, "moved to quarantine"):
            path.rename(target)
    except VaultError:  # read-only, full, or another process was faster: a reader refuses the file all the same
        return None
    with suppress(VaultError):  # the bad file is out of the way, which is what counts
        text = f"{reason}\n{path.relative_to(layout.root)}\n"
        write_document(layout, layout.reason_file(target), text.encode())
    return target


def whole_entry(layout: Layout, key: Digest) -> Manifest | None:
    try:
        manifest = read_manifest(layout, key)
        for ref in manifest.artifacts if manifest else ():
            check_artifact(layout, ref)
    except CorruptEntryError:
        return None
    return manifest


def check_artifact(layout: Layout, ref: ArtifactRef) -> Path:
    """Return the path of ``ref``'s bytes, whose size and digest were compared just now; :class:`CorruptEntryError`."""
    path = layout.artifact_file(ref.digest)
    open_verified(path, ref.digest, ref.size_bytes, what=f"Artifact {ref.name}").close()
    return path


def _stage(layout: Layout, ref: ArtifactRef, files: Mapping[Digest, Path], folder: Path) -> Path | None:
    """The verified copy of ``ref``'s file in ``folder``; ``None`` if the vault holds it intact."""
    if (damage := _damage(layout, ref)) is None:
        return None
    if ref.digest not in files:
        text = f"{damage} No file was given for it, so the entry cannot be published."
        raise CorruptEntryError(text, damage.path) from damage
    source, target = files[ref.digest], folder / ref.digest.hex
    digest, size_bytes = copy_file(source, target, mode=ARTIFACT_MODE)
    if (digest, size_bytes) != (ref.digest, ref.size_bytes):
        raise CorruptEntryError(
            f"{source}, given for artifact {ref.name}, has {size_bytes} bytes and digest {digest.short}; the manifest "
            f"says {ref.size_bytes} bytes and {ref.digest.short}. It changed since it was described: freeze again.",
            source,
        )
    return target


def _place(layout: Layout, ref: ArtifactRef, source: Path) -> None:
    path = layout.artifact_file(ref.digest)
    make_folder(path.parent)
    _make_young(source)  # staging a large entry may have taken longer than removal waits
    if os.path.lexists(path):
        if (damage := _damage(layout, ref)) is None:
            return
        quarantine_file(layout, path, str(damage))
    publish_file(source, path)


def _damage(layout: Layout, ref: ArtifactRef) -> CorruptEntryError | None:
    """Mark the artifact in the vault as young; return what is wrong with it."""
    _make_young(layout.artifact_file(ref.digest))
    try:
        check_artifact(layout, ref)
    except CorruptEntryError as error:
        return error
    return None


def _publish_manifest(staged: Path, path: Path) -> None:
    for tries_left in reversed(range(_SHELF_TRIES)):
        try:
            make_folder(path.parent)
            publish_file(staged, path)
            return
        except VaultError as error:
            vanished = isinstance(error.__cause__, (FileNotFoundError, FileExistsError)) and staged.exists()
            if not vanished or not tries_left:
                raise


def _put_back_vanished(
    layout: Layout, refs: Mapping[Digest, ArtifactRef], files: Mapping[Digest, Path], folder: Path, manifest: Path
) -> None:
    """Give the entry back what a removal took while it was published, or take the entry away."""
    try:
        for digest, ref in refs.items():
            if os.path.lexists(layout.artifact_file(digest)):
                continue
            (folder / digest.hex).unlink(missing_ok=True)  # a copy that was not needed before
            if (source := _stage(layout, ref, files, folder)) is not None:
                _place(layout, ref, source)
    except (OSError, VaultError) as error:
        reason = f"An artifact was removed while the entry was published, and could not be put back: {error}"
        quarantine_file(layout, manifest, reason)
        raise


def _make_young(path: Path) -> None:
    """Set the time of change to now. Another user's file of a group's vault, or a read-only one, stays as it is."""
    with suppress(OSError):  # the look after the manifest is in place still finds an artifact that vanished
        os.utime(path)
