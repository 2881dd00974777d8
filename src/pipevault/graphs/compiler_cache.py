"""Compilations that come before that of a graph: of the trial program that shows which vector instructions there are,
and of headers. Both are kept in this user's cache folder; neither changes a byte of a graph.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from pipevault.compat.pytorch import can_precompile_headers, headers_precompiled_in, one_vector_isa_probed
from pipevault.digest import digest_json
from pipevault.errors import NoHomeError, UnsafeVaultError
from pipevault.files.flock import HeldLock, NotLocked, try_lock
from pipevault.files.scratch import is_fit_for_code
from pipevault.settings.ownership import ONLY_THIS_USER, check_status, check_way
from pipevault.settings.user_folders import user_folder

HEADERS_PAY_FROM = 6
"""The number of graphs in one load whose compilation precompiled headers shorten by more than they take."""
_UNUSED_DAYS = 30


def compiler_folder() -> Path | None:
    """Return the folder for what is kept for this version of torch; ``None`` where code cannot be run from it, or where
    others could change it.
    """
    try:
        folder = user_folder("cache") / "compiler" / torch.__version__
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.utime(folder)
        check_status(folder, folder.lstat(), ONLY_THIS_USER)
        check_way(Path(os.path.realpath(folder)))
    except (NoHomeError, OSError, UnsafeVaultError):
        return None
    return folder if is_fit_for_code(folder) else None


def trials_folder() -> Path | None:
    """Return the folder for trial programs, or ``None``."""
    folder = compiler_folder()
    return folder and folder / "trials"


def probe_vector_isa() -> None:
    """Have Inductor choose the vector instructions now, which it remembers."""
    from torch._inductor.cpu_vec_isa import pick_vec_isa

    with one_vector_isa_probed(trials_folder()):
        pick_vec_isa()


class Headers:
    """Precompiled headers for one set of options, which take 300 MB. They are used once they are complete."""

    def __init__(self, options: Mapping[str, object]) -> None:
        kept = compiler_folder() if can_precompile_headers() else None
        self._folder = kept and kept / "headers" / digest_json(dict(options)).hex[:32]

    @contextmanager
    def used(self, *, make: bool) -> Iterator[bool]:
        """Yield whether the compiler is to use them. With ``make`` what is compiled inside makes them where they are
        missing, unless another process is at it.
        """
        folder = self._folder
        if folder is None or not (make or self._complete(folder).exists()):
            yield False
            return
        lock = None
        if not self._complete(folder).exists():
            lock = self._lock(folder)
            if lock is None:
                yield False
                return
            shutil.rmtree(folder, ignore_errors=True)  # of a process that was killed at it
            _remove_unused(folder.parents[2])
        try:
            with headers_precompiled_in(folder):
                yield True
            if lock is not None and folder.exists():
                self._complete(folder).touch()
        finally:
            if lock is not None:
                lock.release()

    @staticmethod
    def _lock(folder: Path) -> HeldLock | None:
        try:
            folder.parent.mkdir(exist_ok=True)
            lock = try_lock(folder.with_suffix(".lock"))
        except OSError:
            return None
        return None if isinstance(lock, NotLocked) else lock

    def remove(self) -> None:
        """Remove them: with them the compiler failed."""
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    @staticmethod
    def _complete(folder: Path) -> Path:
        return folder / "complete"


def _remove_unused(versions: Path) -> None:
    """Remove what versions of torch left that were not used for a month."""
    with suppress(OSError):
        for folder in versions.iterdir():
            if time.time() - folder.stat().st_mtime > _UNUSED_DAYS * 86400:
                shutil.rmtree(folder, ignore_errors=True)
