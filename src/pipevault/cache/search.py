"""Looking an entry up in the tiers, and saying why nothing was found."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass

from pipevault.digest import Digest
from pipevault.errors import CorruptEntryError, SignatureError, VaultError, WrongMachineError
from pipevault.graphs.document import malformed_parts
from pipevault.graphs.frozen import GraphDocument
from pipevault.key import Difference, Key, nearest
from pipevault.store.manifest import Manifest
from pipevault.store.tiers import Found, Refused, Tiers, open_vault
from pipevault.store.vault import Vault

__all__ = ["Miss", "Search", "check_parts", "explain_miss", "open_vault"]

_LISTED_DIFFERENCES = 4

logger = logging.getLogger("pipevault")


@dataclass(frozen=True)
class Miss:
    """Why there is no usable entry; ``nearest`` and ``differences`` if a tier has one that comes close.

    ``word`` is the reason for statistics: ``absent``, ``damaged``, ``machine``, or the group of factors that differs.
    """

    reason: str
    nearest: Digest | None = None
    differences: tuple[Difference, ...] = ()
    word: str = "absent"


class Search:
    """One search for the entry of ``key``. With ``mend``, damaged files are set aside where that is possible."""

    def __init__(self, tiers: Tiers, key: Digest, *, mend: bool) -> None:
        self._tiers = tiers
        self.key = key
        self._mend = mend
        self._own_error: VaultError | None = None
        self._refusals: list[str] = []
        self._word = "absent"
        self.problems: list[str] = []
        self.unsigned: SignatureError | None = None
        """Why an entry of another tier than the own may not be used."""
        self.quarantined = 0

    def entries(self) -> Iterator[Found]:
        """Entries with parts that can be read, nearest tier first. Nothing is copied."""
        for candidate in self._tiers.candidates(self.key):
            if isinstance(candidate, Refused):
                self.refuse(candidate, candidate.error)
                continue
            if candidate.warning:
                self.tell(candidate.warning)
            try:
                check_parts(candidate.vault, candidate.manifest)
            except CorruptEntryError as error:
                self.refuse(candidate, error)
                continue
            yield candidate

    def places(self) -> Iterator[Found]:
        """The same, each first where it was copied to, if it was, and then where it was found."""
        for found in self.entries():
            copied = found
            try:
                copied = self._tiers.copy_nearer(found)
            except CorruptEntryError as error:
                self.refuse(found, error)
                continue
            except VaultError as error:
                self.tell(f"tier {found.tier.dir}: an entry could not be copied to a nearer tier: {error}")
            yield copied
            if copied.tier != found.tier:
                yield found

    def refuse(self, place: Found | Refused, error: VaultError | WrongMachineError) -> None:
        """What was found at ``place`` cannot be used."""
        if isinstance(error, WrongMachineError):
            self._refusals.append(str(error))
            self._word = "machine"
            return
        is_own = place.tier == self._tiers.own_tier
        if isinstance(error, CorruptEntryError):
            self._refusals.append(str(error))
            self._word = "damaged"
            if self._mend and place.vault is not None:
                self._set_aside(place, place.vault, error)
        elif is_own:
            self._own_error = self._own_error or error
        elif isinstance(error, SignatureError):
            self.unsigned = self.unsigned or error
        if not is_own or len(self._tiers.order) > 1:
            self.tell(f"tier {place.tier.dir}: {error}")

    def tell(self, problem: str) -> None:
        if problem not in self.problems:
            self.problems.append(problem)
            logger.warning("%s", problem)

    @property
    def reasons(self) -> tuple[str, ...]:
        """Why what was found cannot be used."""
        return tuple(dict.fromkeys([*self._refusals, *([str(self._own_error)] if self._own_error else [])]))

    def miss(self, key: Key) -> Miss:
        """Why there is no usable plan with ``key``. Raises what made the vault of ``Settings.dir`` unusable."""
        if self._own_error is not None:
            raise self._own_error
        if self._refusals:
            return Miss("; ".join(dict.fromkeys(self._refusals)), word=self._word)
        return explain_miss(self._tiers, key)

    def _set_aside(self, place: Found | Refused, vault: Vault, error: CorruptEntryError) -> None:
        """A document that onediffx could not read stands in the manifest."""
        inside = error.path.is_relative_to(vault.root)
        path = error.path if inside else vault.layout.manifest_file(self.key)
        try:
            self.quarantined += self._tiers.quarantine(vault, place.tier, path, str(error)) is not None
        except VaultError as failure:
            self.tell(f"tier {place.tier.dir}: {failure}")


def check_parts(vault: Vault, manifest: Manifest) -> None:
    """Raises :class:`CorruptEntryError` unless a graph or a plan can be read and the files of a graph are listed."""
    path = vault.layout.manifest_file(manifest.key.digest)
    is_graph = manifest.key.kind == "graph"
    if what := malformed_parts(manifest.parts) if is_graph else _malformed_plan(manifest):
        raise CorruptEntryError(f"{path} lists parts that cannot be read: {what}. Freeze the pipeline again.", path)
    if not is_graph:
        return
    listed = {ref.digest.hex for ref in manifest.artifacts}
    graphs = [GraphDocument.from_json(graph) for part in manifest.parts.values() for graph in part["graphs"]]
    named = {digest for graph in graphs for digest in graph.files.values()}
    if missing := named - listed:
        raise CorruptEntryError(f"{path} does not list {len(missing)} files of its graphs. Freeze it again.", path)


def _malformed_plan(manifest: Manifest) -> str:
    needed = {key.hex for key in manifest.needs}
    try:
        for name, part in manifest.parts.items():
            if not isinstance(part["status"], str) or not isinstance(part["reason"], str):
                return f"{name} has no status and reason"
            if not set(part["graphs"]) <= needed:
                return f"{name} lists graphs that the plan does not need"
    except (AttributeError, KeyError, TypeError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def explain_miss(tiers: Tiers, key: Key) -> Miss:
    """Raises nothing for a tier that cannot be read: the search has told of it."""
    closest = nearest(key, [entry.key for entry in tiers.manifests() if entry.key.kind == key.kind])
    if closest is None:
        if len(tiers.order) > 1:
            return Miss("no tier has entries")
        root = tiers.settings.dir
        return Miss("the vault has no entries" if tiers.own() else f"there is no vault at {root}")
    other, differences = closest
    listed = "; ".join(str(difference) for difference in differences[:_LISTED_DIFFERENCES])
    more = len(differences) - _LISTED_DIFFERENCES
    reason = f"no plan has this key; the nearest, {other.digest.short}, differs in {listed}"
    word = differences[0].factor.partition(".")[0] if differences else "absent"
    return Miss(f"{reason}; and {more} more" if more > 0 else reason, other.digest, differences, word)
