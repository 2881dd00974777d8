"""Looking entries up in the tiers for one load, and saying why nothing was found."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipevault.cache.access import Access
from pipevault.cache.outcome import Clock, Outcome, PartOutcome, Step
from pipevault.digest import Digest
from pipevault.errors import (
    CompilerMissingError,
    CorruptEntryError,
    LockTimeoutError,
    SignatureError,
    VaultError,
    VaultNotWritableError,
    WrongMachineError,
)
from pipevault.fingerprint.toolchain import find_cxx_compiler
from pipevault.graphs.frozen import GraphDocument
from pipevault.key import Difference, Key, nearest
from pipevault.store.layout import Layout
from pipevault.store.manifest import Manifest
from pipevault.store.stats.event_log import count
from pipevault.store.tiers import Refused, TierHit, Tiers
from pipevault.store.tiers import open_vault as open_vault
from pipevault.store.vault import Vault

if TYPE_CHECKING:
    from pipevault.store.locks.leases import Lease

_LISTED_DIFFERENCES = 4
_COMPARED_PLANS = 64
"""The number of a pipeline's plans, the newest, that are read to say why there is none."""
SLOW = " did not answer "
"""The words in the message of a slow tier between its name and how long it takes, which differs."""

logger = logging.getLogger("pipevault")


class Store:
    """The things that the shelves of one load share. ``origins`` has the folder of the tier where each key was found,
    ``unsigned`` why an entry may not be used.
    """

    def __init__(self, access: Access, leases: list[Lease] | None = None) -> None:
        self.access = access
        self.tiers = access.tiers
        self.settings = access.settings
        self.clock = Clock(access.progress)
        self.leases = leases if leases is not None else []
        self.problems: list[str] = []
        self.origins: dict[Digest, Path] = {}
        self.unsigned: SignatureError | None = None

    def tell(self, problem: str) -> None:
        """Report ``problem`` once: for how long a slow tier is left out changes with every question."""
        told = {other.partition(SLOW)[0] for other in self.problems}
        if problem.partition(SLOW)[0] not in told:
            self.problems.append(problem)
            logger.warning("%s", problem)

    def outcome(self, status: str, parts: Mapping[str, PartOutcome], *, stored: bool = True, **rest: Any) -> Outcome:
        """Return the outcome of the load, with what was measured and reported so far."""
        problems = tuple(self.problems)
        return Outcome(status, parts=parts, seconds=self.clock.seconds, stored=stored, problems=problems, **rest)

    def count(self, event: str, key: Digest | None = None, **numbers: Any) -> None:
        """Count in the vault of ``settings.dir``, which need not be there yet."""
        count(Layout(Path(os.path.realpath(self.settings.dir))), event, key=key, **numbers)

    def count_hit(self, found: TierHit) -> None:
        """Count a hit, and the seconds that compiling took whoever did it."""
        self.count("hit", found.key)
        compile_s = found.manifest.info.get("compile_s")
        if isinstance(compile_s, (int, float)):
            self.count("saved", found.key, seconds=compile_s)

    def require_writable(self, what: str) -> None:
        """Raise what stands in the way of freezing ``what`` into the own vault."""
        vault = self.access.vault
        if not vault.writable:
            raise VaultNotWritableError(
                f"{vault.root} has no graph for {what} and cannot be written. Change its permissions, give another "
                "folder, or use on_unfrozen='eager'.",
                vault.root,
            )
        if self.tiers.policy(self.tiers.own_tier) == "require":
            raise SignatureError(
                f"{self.settings.dir} has no graph for {what}, and one that is frozen now would lack the signature "
                "that is required there. Freeze it with signature 'off', then sign it: `pipevault sign`.",
                self.settings.dir,
            )
        if find_cxx_compiler() is None:
            raise CompilerMissingError(
                "No C++ compiler was found. Install g++ or set CXX; or load what another machine of the same type "
                "froze with mode='require'."
            )

    @contextmanager
    def locked(self, key: Digest, doing: str = "Freezing") -> Iterator[None]:
        """Hold the lock of ``key`` in the own vault; go on without it where ``on_lock_timeout`` says so."""

        def on_wait(detail: str) -> None:
            self.clock.report(Step("", "wait", None, detail))

        with ExitStack() as stack:
            try:
                lock = self.access.vault.lock(key, timeout_s=self.settings.lock_timeout_s, on_wait=on_wait)
                stack.enter_context(lock)
            except LockTimeoutError as error:
                if self.settings.on_lock_timeout != "compile":
                    raise
                logger.warning("%s %s it here too, as on_lock_timeout is 'compile'.", error, doing)
            yield

    def search(self, key: Digest, *, set_aside: bool = True, known: TierHit | None = None) -> Search:
        """Return a search. In mode ``compile`` it sets damaged files aside, unless ``set_aside`` is false."""
        return Search(self, key, set_aside=set_aside and self.settings.mode == "compile", known=known)

    def open_found(self, search: Search, check: Callable[[TierHit], None] = lambda found: None) -> TierHit | None:
        """The first place from which the entry can be used: leased, its files verified. ``None`` if there is none."""
        for found in search.places():
            try:
                lease = self.tiers.hold(found)
                try:
                    check(found)
                except BaseException:  # whatever it was goes on; what was not loaded is not in use
                    lease.release()
                    raise
            except (VaultError, WrongMachineError) as error:
                search.refuse(found, error)
                continue
            self.keep(lease)
            self.origins[search.key] = found.origin.dir
            if found.tier != found.origin:
                self.limit_size(found)
            return found
        return None

    def renew(self, key: Digest) -> str:
        """Hold a graph that is open already, or will be opened later, like one that is opened now: found, leased and
        copied nearer. What is wrong with it, or nothing.
        """
        search = self.search(key)
        return "" if self.open_found(search) is not None else "; ".join(search.reasons) or "it is gone"

    def keep(self, lease: Lease) -> None:
        """Let a lease end with the pipeline, unless it has one for the same entry."""
        where = lease.path and lease.path.parent
        known = any(one.held and one.key == lease.key and one.path and one.path.parent == where for one in self.leases)
        if known or not lease.held:
            lease.release()
        else:
            self.leases.append(lease)

    def tier_of(self, keys: Iterable[Digest]) -> str:
        """The folder of the farthest tier where one of ``keys`` was found; empty if none was."""
        order = [tier.dir for tier in self.tiers.order]
        return str(max((self.origins[key] for key in keys if key in self.origins), key=order.index, default=""))

    def limit_size(self, found: TierHit) -> None:
        """Keep ``max_size`` where ``found`` was written just now."""
        try:
            problems = self.tiers.limit_size(found)
        except VaultError as error:
            problems = (f"max_size could not be kept: {error}",)
        for problem in problems:
            self.tell(problem)


@dataclass(frozen=True)
class Miss:
    """The reason why no entry can be used. ``word``: ``absent``, ``damaged``, ``machine``, or the factors' group."""

    reason: str
    nearest: Digest | None = None
    differences: tuple[Difference, ...] = ()
    word: str = "absent"


class Search:
    """One search for the entry of ``key``. What is ``known`` is not read again if it stands there unchanged."""

    def __init__(self, store: Store, key: Digest, *, set_aside: bool, known: TierHit | None = None) -> None:
        self._store = store
        self._tiers = store.tiers
        self.key = key
        self._sets_aside = set_aside
        self._known = known
        self._own_error: VaultError | None = None
        self._refusals: list[str] = []
        self._word = "absent"

    def entries(self) -> Iterator[TierHit]:
        """Yield entries with parts that can be read, nearest tier first. Nothing is copied."""
        for candidate in self._tiers.candidates(self.key, self._known):
            if isinstance(candidate, Refused):
                self.refuse(candidate, candidate.error)
                continue
            if candidate.warning:
                self._store.tell(candidate.warning)
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
                self._store.tell(f"tier {found.tier.dir}: an entry could not be copied to a nearer tier: {error}")
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
        if isinstance(error, SignatureError):
            self._store.unsigned = self._store.unsigned or error
        if not is_own or len(self._tiers.order) > 1:
            self._store.tell(f"tier {place.tier.dir}: {error}")

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
            if self._tiers.quarantine(vault, place.tier, path, str(error)) is not None:
                self._store.count("quarantined", self.key)
        except VaultError as failure:
            self._store.tell(f"tier {place.tier.dir}: {failure}")


def check_parts(vault: Vault, manifest: Manifest) -> None:
    """Raise :class:`CorruptEntryError` unless a graph or a plan can be read and the files of a graph are listed."""
    path, is_graph = vault.layout.manifest_file(manifest.key.digest), manifest.key.kind == "graph"
    needed = {key.hex for key in manifest.needs}
    named: set[str] = set()
    what = f"it has {len(manifest.parts)} parts instead of one" if is_graph and len(manifest.parts) != 1 else ""
    try:
        for name, part in manifest.parts.items():
            if not isinstance(part["status"], str) or not isinstance(part["reason"], str):
                what = what or f"{name} has no status and reason"
            elif is_graph:
                graphs = [GraphDocument.from_json(graph) for graph in part["graphs"]]
                named |= {digest for graph in graphs for digest in graph.files.values()}
            elif not set(part["graphs"]) <= needed:
                what = what or f"{name} lists graphs that the plan does not need"
    except (AttributeError, KeyError, TypeError, ValueError, IndexError) as error:
        what = what or f"{type(error).__name__}: {error}"
    if what:
        raise CorruptEntryError(f"{path} lists parts that cannot be read: {what}. Freeze the pipeline again.", path)
    if missing := named - {ref.digest.hex for ref in manifest.artifacts}:
        raise CorruptEntryError(f"{path} does not list {len(missing)} files of its graphs. Freeze it again.", path)


def explain_miss(tiers: Tiers, key: Key) -> Miss:
    """Compare ``key`` with the newest plans of the same pipeline, or of one with weights of another dtype.
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
    toolchains = [plan.factors.get("toolchain") for plan in plans]
    old = sum(isinstance(one, Mapping) and one.get(name) == difference.theirs for one in toolchains)
    number = "1 entry is" if old == 1 else f"{old} entries are"
    return f"{name} {difference.theirs} → {difference.ours}; {number} of the old one"


def _clause(difference: Difference) -> str:
    group, _, part = difference.factor.partition(".")
    if group != "dtype":
        return str(difference)
    return f"dtype of {part or 'the pipeline'}: {difference.theirs} in the vault, {difference.ours} here"
