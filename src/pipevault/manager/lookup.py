"""Looking a key up in the vault, and saying why nothing was found."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pipevault.digest import Digest
from pipevault.errors import CorruptEntryError
from pipevault.graphs.document import malformed_parts
from pipevault.key import Difference, Key, nearest
from pipevault.store.manifest import Manifest
from pipevault.store.vault import Vault

_LISTED_DIFFERENCES = 4


@dataclass(frozen=True)
class Miss:
    """Why there is no usable entry; ``nearest`` and ``differences`` if the vault has one that comes close."""

    reason: str
    nearest: Digest | None = None
    differences: tuple[Difference, ...] = ()
    damage: CorruptEntryError | None = None


def open_vault(root: Path, *, create: bool) -> Vault | None:
    """The vault at ``root``, or ``None`` if there is none and none should be made."""
    if not create and not (root.exists() and any(root.iterdir())):
        return None
    return Vault.open(root, create=create)


def look_up(vault: Vault | None, root: Path, key: Key) -> Manifest | Miss:
    """The entry of ``key`` with parts that can be read, or the reason of a miss."""
    if vault is None:
        return Miss(f"there is no vault at {root}")
    try:
        manifest = vault.lookup(key.digest)
        if manifest is None:
            return explain_miss(vault, key)
        check_parts(vault, manifest)
    except CorruptEntryError as error:
        return Miss(str(error), damage=error)
    return manifest


def check_parts(vault: Vault, manifest: Manifest) -> None:
    """Raises :class:`CorruptEntryError` unless every graph can be read and its files are listed."""
    path = vault.layout.manifest_file(manifest.key.digest)
    if what := malformed_parts(manifest.parts):
        raise CorruptEntryError(f"{path} lists parts that cannot be read: {what}. Freeze the pipeline again.", path)
    listed = {ref.digest.hex for ref in manifest.artifacts}
    graphs = [graph for part in manifest.parts.values() for graph in part["graphs"]]
    named = {digest for graph in graphs for digest in (graph["package"], graph["constants"]) if digest}
    if missing := named - listed:
        raise CorruptEntryError(f"{path} does not list {len(missing)} files of its graphs. Freeze it again.", path)


def explain_miss(vault: Vault, key: Key) -> Miss:
    closest = nearest(key, [entry.key for entry in vault.manifests() if isinstance(entry, Manifest)])
    if closest is None:
        return Miss("the vault has no entries")
    other, differences = closest
    listed = "; ".join(str(difference) for difference in differences[:_LISTED_DIFFERENCES])
    more = len(differences) - _LISTED_DIFFERENCES
    reason = f"no entry has this key; the nearest, {other.digest.short}, differs in {listed}"
    return Miss(f"{reason}; and {more} more" if more > 0 else reason, other.digest, differences)
