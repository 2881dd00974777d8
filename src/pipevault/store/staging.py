"""A folder in ``tmp/`` that belongs to one process for a while."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipevault.store.atomic import make_folder, vault_errors
from pipevault.store.layout import Layout
from pipevault.store.liveness import ProcessIdentity


@contextmanager
def staging_folder(layout: Layout) -> Iterator[Path]:
    """A new folder with a unique name that tells whose it is, private to this user, removed with its content at exit.

    Raises like :func:`pipevault.store.atomic.make_folder`.
    """
    owner = ProcessIdentity.current()
    folder = layout.staging_dir(host=owner.host, pid=owner.pid, random_hex=secrets.token_hex(8), mark=owner.mark)
    make_folder(layout.tmp_dir)
    with vault_errors(folder, "created"):
        os.mkdir(folder, 0o700)
    try:
        yield folder
    finally:
        # What cannot be removed is harmless: nothing reads another process's staging folder.
        shutil.rmtree(folder, ignore_errors=True)
