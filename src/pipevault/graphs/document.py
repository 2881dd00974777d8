"""The document that ``save_pipe`` writes for a part and ``load_pipe`` reads, beside content-addressed files.

    cached_pipe/
      unet                      this document
      pipevault.json            {"parts": ["unet", ...]}: what must be there when one of them is loaded
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

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipevault.digest import canonical_json
from pipevault.errors import CorruptEntryError
from pipevault.graphs.frozen import GraphDocument
from pipevault.reading import read_file

PART_VERSION = 4
ARTIFACTS = "artifacts"
SAVED_PARTS = "pipevault.json"


@dataclass(frozen=True)
class PartDocument:
    """The content of a part's document."""

    graphs: tuple[GraphDocument, ...]
    identity: Mapping[str, Any] | None


def write_part(path: Path, graphs: Sequence[GraphDocument], identity: Mapping[str, Any] | None) -> None:
    """Write the document of a part, and its name to the list of those that were saved beside it."""
    document = {
        "pipevault_part": PART_VERSION,
        "graphs": [graph.to_json() for graph in graphs],
        "identity": None if identity is None else dict(identity),
    }
    path.write_bytes(canonical_json(document))
    names = {*_saved_parts(path.parent), path.name}
    (path.parent / SAVED_PARTS).write_bytes(canonical_json({"parts": sorted(names)}))


def _saved_parts(folder: Path) -> list[str]:
    listing = folder / SAVED_PARTS
    try:
        return [name for name in json.loads(read_file(listing))["parts"] if isinstance(name, str)]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CorruptEntryError(f"{listing} cannot be read: {error}. Save the pipeline again.", listing) from error


def read_part(path: Path) -> PartDocument:
    """Read a part's document. ``load_pipe`` skips a part whose document is gone, so one that is left tells of it.

    Raises :class:`CorruptEntryError` if ``path`` is no part document of this version, or another part that was saved
    beside it is missing.
    """
    if missing := [name for name in _saved_parts(path.parent) if not (path.parent / name).is_file()]:
        raise CorruptEntryError(
            f"{path.parent} lacks {', '.join(missing)}, which was saved there. Save the pipeline again.",
            path.parent / missing[0],
        )
    try:
        document = json.loads(read_file(path))
        version = document["pipevault_part"]
        if version != PART_VERSION:
            raise CorruptEntryError(
                f"{path} has part format {version!r}, this pipevault reads {PART_VERSION}. Freeze the part again.",
                path,
            )
        graphs = tuple(GraphDocument.from_json(graph) for graph in document["graphs"])
        identity = document["identity"]
        return PartDocument(graphs, None if identity is None else dict(identity))
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        if isinstance(error, CorruptEntryError):
            raise
        raise CorruptEntryError(
            f"{path} is no part document: {type(error).__name__}: {error}. Freeze the part again.", path
        ) from error


def malformed_parts(parts: Mapping[str, Any]) -> str:
    """What is wrong with the ``parts`` of a manifest, which the store keeps without looking; empty if nothing is."""
    try:
        if len(parts) != 1:
            return f"it has {len(parts)} parts instead of one"
        for name, part in parts.items():
            if not isinstance(part["status"], str) or not isinstance(part["reason"], str):
                return f"{name} has no status and reason"
            for graph in part["graphs"]:
                GraphDocument.from_json(graph)
    except (AttributeError, KeyError, TypeError, ValueError, IndexError) as error:
        return f"{type(error).__name__}: {error}"
    return ""
