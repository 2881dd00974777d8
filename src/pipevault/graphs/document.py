"""The document that ``save_pipe`` writes for a part and ``load_pipe`` reads, with content-addressed files.

    cached_pipe/
      unet                      this document
      pipevault.json            {"pipevault_saved": 1, "parts": ["unet", ...]}: what must be there when one is loaded
      artifacts/<sha256>        libraries and lifted constants

::

    {"pipevault_part": 3,
     "graphs": [{"signature": {...}, "build": "<sha256>", "library": "<sha256>", "constants": "<sha256>" or null,
                 "beside": {},
                 "inputs": [[0, [64, 8, 1]]], "results": [["tensor"]], "result_tree": "...", "ties": [...],
                 "layout": "<sha256>", "origins": [["freqs", ["rope", "freqs"], "<sha256>"]],
                 "machine": {"AOTI_CPU_ISA": ...}, "checks": {...}}],
     "identity": {"architecture": {...}, "machine": {...}, "toolchain": {...}, ...} or null}

``identity`` has the factors of the part that was frozen, ``null`` if a vault knows them.
In a vault each graph has a manifest of its own, and the files are the vault's artifacts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from pipevault.digest import canonical_json
from pipevault.errors import CorruptEntryError
from pipevault.files.atomic import replacing
from pipevault.files.documents import Format, Problem
from pipevault.graphs.frozen import GraphDocument
from pipevault.reading import read_file

PART_VERSION = 4
ARTIFACTS = "artifacts"
SAVED_PARTS = "pipevault.json"
SAVED_VERSION = 1


class _Part(msgspec.Struct):
    pipevault_part: int
    graphs: list[dict[str, Any]]
    identity: dict[str, Any] | None


class _Saved(msgspec.Struct):
    pipevault_saved: int
    parts: list[str]


def _unreadable(problem: Problem) -> CorruptEntryError:
    return CorruptEntryError(f"The part document {problem} Freeze the part again.", problem.path)


def _unlisted(problem: Problem) -> CorruptEntryError:
    return CorruptEntryError(f"The list of parts {problem} Save the pipeline again.", problem.path)


_FORMAT = Format(_Part, "pipevault_part", PART_VERSION, damaged=_unreadable, canonical=False)
_SAVED_FORMAT = Format(_Saved, "pipevault_saved", SAVED_VERSION, damaged=_unlisted, canonical=False)


def write_part(path: Path, graphs: Sequence[GraphDocument], identity: Mapping[str, Any] | None) -> None:
    """Write the document of a part, and its name to the list of those that were saved with it."""
    part = _Part(PART_VERSION, [graph.to_json() for graph in graphs], None if identity is None else dict(identity))
    saved = _Saved(SAVED_VERSION, sorted({*_saved_parts(path.parent), path.name}))
    for file, document in ((path, part), (path.parent / SAVED_PARTS, saved)):
        with replacing(file) as temporary:
            temporary.write_bytes(canonical_json(msgspec.structs.asdict(document)))


def _saved_parts(folder: Path) -> list[str]:
    listing = folder / SAVED_PARTS
    try:
        return _SAVED_FORMAT.parse(read_file(listing), listing).parts
    except FileNotFoundError:
        return []
    except OSError as error:
        raise CorruptEntryError(f"{listing} cannot be read: {error}. Save the pipeline again.", listing) from error


def read_part(path: Path) -> tuple[list[GraphDocument], Mapping[str, Any] | None]:
    """Return the graphs and the identity in a part's document. ``load_pipe`` skips a part whose document is gone, so
    one that is left names it.

    Raises :class:`CorruptEntryError` if ``path`` is not a part document of this version, or another part that was
    saved with it is missing.
    """
    if missing := [name for name in _saved_parts(path.parent) if not (path.parent / name).is_file()]:
        raise CorruptEntryError(
            f"{path.parent} lacks {', '.join(missing)}, which was saved there. Save the pipeline again.",
            path.parent / missing[0],
        )
    try:
        part = _FORMAT.parse(read_file(path), path)
    except OSError as error:
        raise CorruptEntryError(f"{path} cannot be read: {error}. Freeze the part again.", path) from error
    return [_graph(graph, path, f"graphs[{index}]") for index, graph in enumerate(part.graphs)], part.identity


def _graph(document: Mapping[str, Any], path: Path, field: str) -> GraphDocument:
    try:
        return GraphDocument.from_json(document)
    except (ValueError, RecursionError) as error:
        raise _FORMAT.bad(path, field, error) from error
    except (KeyError, TypeError) as error:
        raise _FORMAT.bad(path, field, f"{type(error).__name__}: {error}") from error
