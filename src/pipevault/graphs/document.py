"""The document that ``save_pipe`` writes for a part and ``load_pipe`` reads, beside content-addressed files.

    cached_pipe/
      unet                      this document
      artifacts/<sha256>        libraries and lifted constants

::

    {"pipevault_part": 3,
     "graphs": [{"signature": {...}, "build": "<sha256>", "library": "<sha256>", "constants": "<sha256>" or null,
                 "beside": {},
                 "inputs": [[0, [64, 8, 1]]], "results": [["tensor"]], "result_tree": "...", "ties": [...],
                 "layout": "<sha256>", "origins": [["freqs", ["rope", "freqs"], "<sha256>"]],
                 "machine": {"AOTI_CPU_ISA": ...}, "checks": {...}}]}

In a vault each graph has a manifest of its own, and the files are the vault's artifacts.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipevault.digest import canonical_json
from pipevault.errors import CorruptEntryError
from pipevault.graphs.frozen import GraphDocument
from pipevault.reading import read_file

PART_VERSION = 3
ARTIFACTS = "artifacts"


def write_part(path: Path, graphs: Sequence[GraphDocument]) -> None:
    path.write_bytes(part_bytes([graph.to_json() for graph in graphs]))


def part_bytes(graphs: Sequence[Mapping[str, Any]]) -> bytes:
    return canonical_json({"pipevault_part": PART_VERSION, "graphs": list(graphs)})


def read_part(path: Path) -> tuple[GraphDocument, ...]:
    """Raises :class:`CorruptEntryError` if ``path`` is no part document of this version."""
    try:
        document = json.loads(read_file(path))
        version = document["pipevault_part"]
        if version != PART_VERSION:
            raise CorruptEntryError(
                f"{path} has part format {version!r}, this pipevault reads {PART_VERSION}. Freeze the part again.",
                path,
            )
        return tuple(GraphDocument.from_json(graph) for graph in document["graphs"])
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
