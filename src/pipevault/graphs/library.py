"""The native code of graphs: each library is mapped once in a process, whatever number of graphs is bound to it.

g++ marks some symbols as unique, and the loader then keeps every copy of a library mapped for the life of the process.
So a library is named by its digest, opened at its first use, and held: its descriptor stays open, because the loader
knows the library by the path of that descriptor, and code that has its weights compiled in reads them from there.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import threading
from collections.abc import Mapping
from pathlib import Path

from pipevault.errors import UnloadableGraphError
from pipevault.files.opened import OpenedFile
from pipevault.files.scratch import kept_scratch_folder

LIBRARY_NAME = "graph.so"
CONSTANTS_NAME = "constants.safetensors"
EXTERN_NAME = "graph.json"
"""The file that torch's runner looks up next to a library: the calls of operators that have no C interface."""


class GraphFiles(dict[str, OpenedFile]):
    """The files of one graph by name, held open with verified bytes until the end of the block: the library, its
    constants, and what its code looks up in its folder, which is rare (see ``inductor.build_graph``).
    """

    def __enter__(self) -> GraphFiles:
        return self

    def __exit__(self, *raised: object) -> None:
        for file in self.values():
            file.close()


_LOCK = threading.Lock()
_MAPPED: dict[str, str] = {}
_HELD: list[object] = []
"""Objects that must stay open as long as the process: the files of the mapped libraries, and the loader's handles."""


def map_library(digest: str, files: GraphFiles) -> str:
    """Map the library with ``digest``, unless it is; return the path by which the loader knows it.

    Raises :class:`~pipevault.errors.UnloadableGraphError`.
    """
    with _LOCK:
        if digest not in _MAPPED:
            code = {name: file for name, file in files.items() if name != CONSTANTS_NAME}
            _MAPPED[digest] = _map(files[LIBRARY_NAME]) if len(code) == 1 else _map_with_others(code)
        return _MAPPED[digest]


def mapped_libraries() -> tuple[str, ...]:
    """The paths of the libraries that this process has mapped."""
    with _LOCK:
        return tuple(_MAPPED.values())


def _map(file: OpenedFile) -> str:
    """In place; from memory, where the file system lets no code be mapped; else from a folder of this user's own."""
    problems = []
    for take in (OpenedFile.duplicate, OpenedFile.copied):
        held = None
        try:
            held = take(file)
            name = _unique_name(held.path)
            handle = ctypes.CDLL(name)
        except OSError as error:
            problems.append(str(error))
            if held is not None:
                held.close()
            continue
        _HELD.extend((held, handle))
        return name
    try:
        return _map_copy({LIBRARY_NAME: file})
    except OSError as error:
        problems.append(str(error))
    raise UnloadableGraphError(
        f"The code of {file.origin} cannot be mapped: {'; '.join(dict.fromkeys(problems))}. Where its file system is "
        "mounted with noexec, code is mapped from memory or from the temporary folder: allow one of the three.",
        file.origin,
    )


def _unique_name(path: Path) -> str:
    """A spelling of ``path`` that no library of this process has had: the loader takes two of one name for the same,
    and a program that closes descriptors which are not its own, as daemons do, has their numbers given out again.
    """
    spelling = "".join("./" if bit == "1" else "/" for bit in f"{len(_HELD):b}")
    return f"{path.parent}/{spelling}{path.name}"


def _map_with_others(files: Mapping[str, OpenedFile]) -> str:
    try:
        return _map_copy(files)
    except OSError as error:
        origin = files[LIBRARY_NAME].origin
        others = ", ".join(name for name in files if name != LIBRARY_NAME)
        raise UnloadableGraphError(
            f"The code of {origin} needs {others} in its folder, and cannot be mapped from a copy: {error}. Set TMPDIR "
            "to a folder that code may be mapped from.",
            origin,
        ) from error


def _map_copy(files: Mapping[str, OpenedFile]) -> str:
    folder = kept_scratch_folder()
    for name, file in files.items():
        shutil.copyfile(file.path, folder / name)
        os.chmod(folder / name, 0o500)
    _HELD.append(ctypes.CDLL(str(folder / LIBRARY_NAME)))
    return str(folder / LIBRARY_NAME)


def _start_again() -> None:
    """In a forked child: another thread of the parent may have held the lock."""
    global _LOCK
    _LOCK = threading.Lock()


os.register_at_fork(after_in_child=_start_again)
