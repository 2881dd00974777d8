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

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from pipevault.digest import canonical_json
from pipevault.errors import CorruptEntryError
from pipevault.files.documents import Format, Problem
from pipevault.graphs.frozen import GraphDocument
from pipevault.reading import read_file

PART_VERSION = 3
ARTIFACTS = "artifacts"


class _Part(msgspec.Struct):
    pipevault_part: int
    graphs: list[dict[str, Any]]


def _unreadable(problem: Problem) -> CorruptEntryError:
    return CorruptEntryError(f"The part document {problem} Freeze the part again.", problem.path)


_FORMAT = Format(_Part, "pipevault_part", PART_VERSION, damaged=_unreadable, canonical=False)


def write_part(path: Path, graphs: Sequence[GraphDocument]) -> None:
    path.write_bytes(part_bytes([graph.to_json() for graph in graphs]))


def part_bytes(graphs: Sequence[Mapping[str, Any]]) -> bytes:
    return canonical_json({"pipevault_part": PART_VERSION, "graphs": list(graphs)})


def read_part(path: Path) -> tuple[GraphDocument, ...]:
    """Raises :class:`CorruptEntryError` if ``path`` is no part document of this version."""
    try:
        graphs = _FORMAT.parse(read_file(path), path).graphs
    except OSError as error:
        raise CorruptEntryError(f"{path} cannot be read: {error}. Freeze the part again.", path) from error
    return tuple(_graph(graph, path, f"graphs[{index}]") for index, graph in enumerate(graphs))


def _graph(document: Mapping[str, Any], path: Path, field: str) -> GraphDocument:
    try:
        return GraphDocument.from_json(document)
    except (ValueError, RecursionError) as error:
        raise _FORMAT.bad(path, field, error) from error
    except (KeyError, TypeError) as error:
        raise _FORMAT.bad(path, field, f"{type(error).__name__}: {error}") from error


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
