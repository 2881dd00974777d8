"""Looking an entry up in the tiers, and saying why nothing was found."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipevault.digest import Digest
from pipevault.errors import CorruptEntryError, SignatureError, VaultError, WrongMachineError
from pipevault.graphs.document import malformed_parts
from pipevault.graphs.frozen import GraphDocument
from pipevault.key import Difference, Key, nearest
from pipevault.store.manifest import Manifest
from pipevault.store.tiers.tiers import Refused, TierHit, Tiers, open_vault
from pipevault.store.vault import Vault

__all__ = ["Miss", "Search", "check_parts", "explain_miss", "open_vault"]

_LISTED_DIFFERENCES = 4
_COMPARED_PLANS = 64
"""The number of a pipeline's plans, the newest, that are read to say why there is none."""

logger = logging.getLogger("pipevault")


@dataclass(frozen=True)
class Miss:
    """The reason why no entry can be used; ``nearest`` and ``differences`` if a tier has one that comes close.

    ``word`` is the reason for statistics: ``absent``, ``damaged``, ``machine``, or the group of factors that differs.
    """

    reason: str
    nearest: Digest | None = None
    differences: tuple[Difference, ...] = ()
    word: str = "absent"


class Search:
    """One search for the entry of ``key``. With ``set_aside``, damaged files are set aside where that is possible.

    ``known``, which an earlier search found, is not read again if it still stands there unchanged.
    """

    def __init__(self, tiers: Tiers, key: Digest, *, set_aside: bool, known: TierHit | None = None) -> None:
        self._tiers = tiers
        self.key = key
        self._sets_aside = set_aside
        self._known = known
        self._own_error: VaultError | None = None
        self._refusals: list[str] = []
        self._word = "absent"
        self.problems: list[str] = []
        self.unsigned: SignatureError | None = None
        """Why an entry of another tier than the own may not be used."""
        self.quarantined = 0

    def entries(self) -> Iterator[TierHit]:
        """Yield entries with parts that can be read, nearest tier first. Nothing is copied."""
        for candidate in self._tiers.candidates(self.key, self._known):
            if isinstance(candidate, Refused):
                self.refuse(candidate, candidate.error)
                continue
            if candidate.warning:
                self.tell(candidate.warning)
            try:
                if not self.knows(candidate):
                    check_parts(candidate.vault, candidate.manifest)
            except CorruptEntryError as error:
                self.refuse(candidate, error)
                continue
            yield candidate

    def knows(self, found: TierHit) -> bool:
        """Return whether ``found`` has the very manifest that an earlier search gave."""
        return self._known is not None and found.manifest is self._known.manifest

    def places(self) -> Iterator[TierHit]:
        """Yield what the tiers hold, each first where it was copied to, if it was, and then where it was found."""
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

    def refuse(self, place: TierHit | Refused, error: VaultError | WrongMachineError) -> None:
        """Note that what was found at ``place`` cannot be used."""
        if isinstance(error, WrongMachineError):
            self._refusals.append(str(error))
            self._word = "machine"
            return
        is_own = place.tier == self._tiers.own_tier
        if isinstance(error, CorruptEntryError):
            self._refusals.append(str(error))
            self._word = "damaged"
            if self._sets_aside and place.vault is not None:
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
        """The reasons why what was found cannot be used."""
        return tuple(dict.fromkeys([*self._refusals, *([str(self._own_error)] if self._own_error else [])]))

    def miss(self, key: Key) -> Miss:
        """Return why no plan with ``key`` can be used. Raises what made the vault of ``Settings.dir`` unusable."""
        if self._own_error is not None:
            raise self._own_error
        if self._refusals:
            return Miss("; ".join(dict.fromkeys(self._refusals)), word=self._word)
        return explain_miss(self._tiers, key)

    def _set_aside(self, place: TierHit | Refused, vault: Vault, error: CorruptEntryError) -> None:
        """A document that onediffx could not read stands in the manifest."""
        inside = error.path.is_relative_to(vault.root)
        path = error.path if inside else vault.layout.manifest_file(self.key)
        try:
            self.quarantined += self._tiers.quarantine(vault, place.tier, path, str(error)) is not None
        except VaultError as failure:
            self.tell(f"tier {place.tier.dir}: {failure}")


def check_parts(vault: Vault, manifest: Manifest) -> None:
    """Raise :class:`CorruptEntryError` unless a graph or a plan can be read and the files of a graph are listed."""
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
    """Compare ``key`` with the newest plans of the same pipeline, or of one with weights of another dtype.

    At most :data:`_COMPARED_PLANS` entries of a tier are read on the pipeline's shelf, and as many elsewhere.

    Raises nothing for a tier that cannot be read: the search has reported it.
    """
    plans = [entry.key for entry in tiers.newest(_COMPARED_PLANS, key.shelf) if entry.key.kind == key.kind]
    if not plans:  # weights of another dtype are another architecture, whose plans lie elsewhere
        plans = [entry.key for entry in tiers.newest(_COMPARED_PLANS) if _model(entry.key) == _model(key)]
    closest = nearest(key, plans)
    if closest is None:
        if len(tiers.order) > 1:
            return Miss("no tier has an entry for this model yet")
        return Miss("no entry for this model yet" if tiers.own() else f"found no vault at {tiers.settings.dir}")
    other, differences = closest
    cast = tuple(f"architecture.{d.factor.removeprefix('dtype.')}." for d in differences if d.factor[:6] == "dtype.")
    differences = tuple(difference for difference in differences if not difference.factor.startswith(cast))
    # A new toolchain comes first: what else differs may follow from it.
    ordered = tuple(sorted(differences, key=lambda difference: not difference.factor.startswith("toolchain.")))
    upgrades = [_upgrade(difference, plans) for difference in ordered if difference.factor.startswith("toolchain.")]
    rest = ordered[len(upgrades) :]
    clauses = [_clause(difference) for difference in rest[:_LISTED_DIFFERENCES]]
    if more := len(rest) - len(clauses):
        clauses.append(f"and {more} more")
    nearest_plan = f"no plan has this key; the nearest, {other.digest.short}, differs"
    also = " also" if upgrades else ""
    reason = f"{nearest_plan}{also} in {'; '.join(clauses)}" if clauses else f"the nearest plan is {other.digest.short}"
    word = ordered[0].factor.partition(".")[0] if ordered else "absent"
    return Miss("; ".join([*upgrades, reason]), other.digest, ordered, word)


def _model(key: Key) -> object:
    """Return what plans of one model share whatever the dtype of its weights."""
    pipeline, parts = key.factors.get("pipeline"), key.factors.get("architecture")
    if key.kind != "plan" or not isinstance(pipeline, Mapping) or not isinstance(parts, Mapping):
        return key.digest
    sizes = {name: part.get("parameters") if isinstance(part, Mapping) else part for name, part in parts.items()}
    return pipeline.get("class"), sizes


def _upgrade(difference: Difference, plans: Sequence[Key]) -> str:
    """``torch 2.13.0 → 2.15.0; 15 entries are of the old one``."""
    name = difference.factor.removeprefix("toolchain.")
    old = sum(_toolchain(plan).get(name) == difference.theirs for plan in plans)
    number = "1 entry is" if old == 1 else f"{old} entries are"
    return f"{name} {difference.theirs} → {difference.ours}; {number} of the old one"


def _toolchain(plan: Key) -> Mapping[str, Any]:
    toolchain = plan.factors.get("toolchain")
    return toolchain if isinstance(toolchain, Mapping) else {}


def _clause(difference: Difference) -> str:
    group, _, part = difference.factor.partition(".")
    if group != "dtype":
        return str(difference)
    return f"dtype of {part or 'the pipeline'}: {difference.theirs} in the vault, {difference.ours} here"
