"""Files on their way into a vault: a folder in ``tmp/`` that belongs to one process for a while."""

from __future__ import annotations

import os
import secrets
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipevault.files.atomic import make_folder, share_like_folder, vault_errors, write_file
from pipevault.files.claims import claim_folder
from pipevault.store.layout import Layout


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
    """Return a new unique name of this process's in ``tmp/``."""
    return layout.staging_dir(host=socket.gethostname(), pid=os.getpid(), random_hex=secrets.token_hex(8))


def write_document(layout: Layout, path: Path, data: bytes) -> None:
    """Create or replace a small file of the vault in one step; its folder is made if need be.

    Raises like :func:`pipevault.files.atomic.write_file`.
    """
    make_folder(path.parent)
    with staging_folder(layout) as folder:
        write_file(path, data, staging=folder)
