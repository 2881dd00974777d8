"""From frozen parts to an entry of the vault, and from other entries to graphs that need no second compilation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pipevault.digest import Digest
from pipevault.errors import CorruptEntryError, UnsafeVaultError
from pipevault.fingerprint.machine import machine_record
from pipevault.fingerprint.toolchain import toolchain_record
from pipevault.graphs.document import malformed_parts
from pipevault.graphs.frozen import GraphDocument
from pipevault.graphs.inductor import GRAPH_FORMAT
from pipevault.graphs.state import ReusableGraph
from pipevault.key import Key
from pipevault.manager.freeze import Frozen
from pipevault.store.manifest import ArtifactRef, Manifest, now_utc
from pipevault.store.vault import Vault


def make_manifest(key: Key, frozen: Frozen, folder: Path) -> tuple[Manifest, dict[Digest, Path]]:
    """The manifest of what :func:`~pipevault.manager.freeze.freeze_pipeline` saved to ``folder``, and its files."""
    artifacts: list[ArtifactRef] = []
    files: dict[Digest, Path] = {}
    for name, part in frozen.parts.items():
        for number, graph in enumerate(part["graphs"]):
            for kind, suffix in (("package", "pt2"), ("constants", "constants.safetensors")):
                if not graph[kind]:
                    continue
                digest = Digest(graph[kind])
                if digest not in files:
                    path = folder / "artifacts" / digest.hex
                    artifacts.append(ArtifactRef(digest, path.stat().st_size, f"{name}/{number}.{suffix}"))
                    files[digest] = path
    info = {
        "check": {"distance": frozen.check.distance, "tolerance": frozen.check.tolerance},
        "machine": machine_record(),
        "toolchain": toolchain_record(graph_format=GRAPH_FORMAT),
    }
    return Manifest(key, dict(frozen.parts), tuple(artifacts), info, now_utc()), files


def reusable_graphs(vault: Vault) -> Callable[[str], ReusableGraph | None]:
    """Finds graphs of other entries that were built under the same build digest, such as a text encoder's."""
    known: dict[str, tuple[Manifest, Mapping[str, Any]]] = {}
    for entry in vault.manifests():
        if isinstance(entry, Manifest) and not malformed_parts(entry.parts):
            for part in entry.parts.values():
                for graph in part["graphs"]:
                    known.setdefault(graph["build"], (entry, graph))

    def find(build: str) -> ReusableGraph | None:
        if build not in known:
            return None
        entry, graph = known[build]
        refs = {ref.digest.hex: ref for ref in entry.artifacts}
        try:
            package = vault.verified_path(refs[graph["package"]])
            constants = vault.verified_path(refs[graph["constants"]]) if graph["constants"] else None
        except (CorruptEntryError, UnsafeVaultError):
            return None  # it is compiled anew; publishing replaces what is damaged
        return GraphDocument.from_json(graph), package, constants

    return find
