"""``PipelineCache``: give a pipeline the graphs of the vault, and freeze those that are missing."""

from __future__ import annotations

import logging
import os
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import copy_context
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import nn

from pipevault.cache.builders import Builders
from pipevault.cache.call import CallShape
from pipevault.cache.call_shapes import AskedShape, AskedSize, CallRange, call_shapes
from pipevault.cache.identity import module_dtype, part_factors
from pipevault.cache.keys import build_key, execution_device
from pipevault.cache.onediff_backends import onediff_backend
from pipevault.cache.outcome import Clock, Explanation, Outcome, PartOutcome, Progress, Step, combine
from pipevault.cache.plan import lists_part, make_plan, open_graphs, plan_outcomes
from pipevault.cache.regions import choose_regions
from pipevault.cache.rehearsal import rehearse
from pipevault.cache.search import Miss, open_vault
from pipevault.cache.shelf import Store, VaultShelf
from pipevault.compat.versions import require_inductor, warn_untried
from pipevault.determinism.levels import SWITCHES, needs, parse_level
from pipevault.determinism.levels import level as at_level
from pipevault.determinism.turns import TURNS
from pipevault.digest import Digest, digest_json
from pipevault.errors import (
    BadCallError,
    LockTimeoutError,
    MissError,
    SettingsError,
    SignatureError,
    UnfrozenCallError,
    VaultError,
)
from pipevault.fingerprint.model import architecture
from pipevault.graphs import parts as graph_parts
from pipevault.graphs.inductor import BuildOptions
from pipevault.graphs.part import obstacle
from pipevault.graphs.state import FREEZING, PartOptions, PartState
from pipevault.key import Key
from pipevault.runtime.leases import HeldLeases
from pipevault.runtime.onediff_pipeline import OnediffState
from pipevault.runtime.pipeline import LoadedState, attach_state, loaded_state, release_class, unload
from pipevault.runtime.turn import resources
from pipevault.settings import Settings, Tier
from pipevault.store.manifest import Manifest
from pipevault.store.stats import mean_compile_s
from pipevault.store.tiers import Found, Tiers
from pipevault.store.vault import Vault

Pipeline = TypeVar("Pipeline")

logger = logging.getLogger("pipevault")


class PipelineCache:
    """A vault and how to use it. Arguments left out follow :class:`pipevault.settings.Settings`.

    ``build_config`` overrides fields of ``torch._inductor.config`` for compiling; it is part of the key.
    ``progress`` is called with a :class:`~pipevault.cache.outcome.Step` whenever one begins or ends.
    """

    def __init__(
        self,
        dir: str | Path | None = None,
        *,
        mode: str | None = None,
        backend: str | None = None,
        weights: str | None = None,
        on_unfrozen: str | None = None,
        lock_timeout_s: float | None = None,
        on_lock_timeout: str | None = None,
        turn_timeout_s: float | None = None,
        level: str | None = None,
        tiers: Sequence[str | Path | Tier | Mapping[str, Any]] | None = None,
        tier_timeout_s: float | None = None,
        max_size: int | str | None = None,
        signature: str | None = None,
        trusted_keys: Sequence[str | Path] | None = None,
        trusted_users: Sequence[str | int] | None = None,
        trusted_groups: Sequence[str | int] | None = None,
        allow_group_write: bool | None = None,
        shared: str | None = None,
        regions: str | None = None,
        jobs: int | None = None,
        compile_profile: str | None = None,
        build_config: Mapping[str, bool | int | float | str] | None = None,
        progress: Progress | None = None,
    ) -> None:
        self.settings = Settings.resolve(
            dir=dir,
            mode=mode,
            backend=backend,
            weights=weights,
            on_unfrozen=on_unfrozen,
            lock_timeout_s=lock_timeout_s,
            on_lock_timeout=on_lock_timeout,
            turn_timeout_s=turn_timeout_s,
            level=level,
            tiers=tiers,
            tier_timeout_s=tier_timeout_s,
            max_size=max_size,
            signature=signature,
            trusted_keys=trusted_keys,
            trusted_users=trusted_users,
            trusted_groups=trusted_groups,
            allow_group_write=allow_group_write,
            shared=shared,
            regions=regions,
            jobs=jobs,
            compile_profile=compile_profile,
        )
        profile, weights = self.settings.compile_profile, self.settings.weights
        self.build = BuildOptions.of_profile(profile, weights, build_config or {})
        self._progress = progress
        self._backend = onediff_backend(self.settings.backend, self.build)
        if self.settings.mode != "off":
            require_inductor() if self._backend is None else self._backend.require()
        self._vault: Vault | None = None
        self._tiers = Tiers(self.settings, self._own_vault)

    @property
    def vault(self) -> Vault:
        """The vault of ``settings.dir``, made if need be. Raises :class:`~pipevault.errors.VaultError`."""
        if (vault := self._own_vault(self.settings.mode == "compile")) is not None:
            return vault
        return Vault.of(self.settings)

    def _own_vault(self, create: bool) -> Vault | None:
        if self._vault is not None and not os.path.exists(self._vault.layout.vault_file):
            self._vault = None  # the folder was deleted; what is published there must be a vault again
        if self._vault is None:
            self._vault = open_vault(self.settings, create=create)
        return self._vault

    def find_entry(self, key: Digest) -> Manifest | None:
        """Return the manifest of ``key`` in the first tier that has a usable one."""
        found = self._tiers.lookup(key)
        return None if found is None else found.manifest

    def load(
        self,
        pipe: Pipeline,
        *,
        height: AskedSize = None,
        width: AskedSize = None,
        num_frames: AskedSize = None,
        batch_size: AskedSize = None,
        guidance: bool | None = None,
        call: Mapping[str, Any] | Callable[[Any], Any] | None = None,
        dynamic: bool = False,
        shapes: Sequence[Mapping[str, Any]] | None = None,
        parts: Sequence[str] | Literal["auto"] | None = None,
    ) -> Pipeline:
        """Give ``pipe`` the frozen graphs of the vault, and return it.

        Without a shape, all graphs that fit its parts are attached, and each is opened when first used; where there is
        none at all, those of the pipeline's default call are frozen. With one, or
        with ``shapes``, a list of mappings with the arguments before it, the graphs for such calls are made sure to
        exist. A size that is a pair, such as ``height=(512, 1024)``, asks for graphs that serve the whole range;
        ``dynamic`` makes ranges of the single sizes, from half to twice, and of up to four samples. Where a part cannot
        have such a graph, ``problems`` of the outcome say why, and single sizes are frozen as they come. A second load
        adds to the first. ``parts`` names the parts to freeze; by default all. With ``auto``, those stay eager that
        gain less than 3 %, by their times when their graphs were checked; the outcome says so. What happened:
        :func:`pipevault.outcome`. If it fails, the pipeline is what it was.

        Raises :class:`~pipevault.errors.MissError` in mode ``require``, :class:`~pipevault.errors.CannotFreezeError`
        and its subclasses, :class:`~pipevault.errors.BadCallError`, :class:`~pipevault.errors.VaultError`.
        """
        asked = call_shapes(
            shapes,
            height=height,
            width=width,
            num_frames=num_frames,
            batch_size=batch_size,
            guidance=guidance,
            call=call,
            dynamic=dynamic or None,
        )
        wanted = {**resources(pipe), SWITCHES: needs(parse_level(self.settings.level))}
        with TURNS.take(wanted, what=f"loading {type(pipe).__name__}", timeout_s=self.settings.turn_timeout_s):
            return self._load(pipe, asked, None if parts == "auto" else parts, worthwhile=parts == "auto")

    def _load(
        self, pipe: Pipeline, asked: Sequence[AskedShape], parts: Sequence[str] | None, *, worthwhile: bool
    ) -> Pipeline:
        """:meth:`load`, in the turn of the pipeline."""
        if self.settings.mode == "off":
            unload(pipe)
            attach_state(pipe, LoadedState(Outcome("off", reason="mode is off"), weakref.ref(pipe)))
            return pipe
        if self._backend is not None:
            from pipevault.manager.onediff_load import load_onediff

            load_onediff(self, self._backend, pipe, asked, parts)
            return pipe
        if isinstance(loaded_state(pipe), OnediffState):
            unload(pipe)
        warn_untried()
        wanted = [shape.resolve(pipe, self._per_sample) for shape in asked]
        names = tuple(graph_parts.find_parts(pipe, parts))
        with _unchanged_on_error(pipe), at_level(self.settings.level):
            previous = loaded_state(pipe)
            release_class(pipe)
            session = _Session(self, pipe, names, previous, worthwhile=worthwhile)
            try:
                outcomes = tuple(session.ensure(shape) for shape in wanted) or (session.attached(parts),)
                result = combine(outcomes)
                session.finish(result, asked, parts)
            except BaseException:  # whatever it was goes on; a pipeline that was not loaded holds no lease
                session.release()
                raise
        return pipe

    def key(self, pipe: Any, *, parts: Sequence[str] | Literal["auto"] | None = None, **shape: Any) -> Key:
        """Return the key of the plan for a call. ``shape`` takes the arguments of :meth:`load`."""
        names = tuple(graph_parts.find_parts(pipe, None if parts == "auto" else parts))
        resolved = AskedShape(**shape).resolve(pipe, self._per_sample)
        modules = {name: graph_parts.get_part(pipe, name) for name in names}
        chosen = choose_regions(pipe, names, self.settings.regions) if self._backend is None else {}
        regions = {name: str(its) for name, its in chosen.items()}
        with at_level(self.settings.level):
            return build_key(
                pipe,
                modules,
                resolved,
                backend=self.settings.backend,
                build=self.build,
                regions=regions,
                worthwhile=parts == "auto" and self._backend is None,
            )

    def part_key(self, pipe: Any, part: str) -> Key:
        """Return the factors of the identity of a part, as the key of a graph without a signature."""
        module = graph_parts.get_part(pipe, part)
        if not isinstance(module, nn.Module):
            raise SettingsError(f"{type(pipe).__name__} has no part {part!r}.")
        device = execution_device(pipe, {part: module})
        with at_level(self.settings.level):
            return Key(part_factors(module, device, backend=self.settings.backend, build=self.build))

    def explain(self, pipe: Any, *, parts: Sequence[str] | Literal["auto"] | None = None, **shape: Any) -> Explanation:
        """Return what :meth:`load` would do with these arguments, without doing it."""
        key = self.key(pipe, parts=parts, **shape)
        store = Store(self._tiers, self.settings, lambda: self.vault)
        search = store.search(key.digest, mend=False)
        found = next(search.entries(), None)
        if found is None:
            miss = search.miss(key)
            problems = tuple(store.problems)
            return Explanation(key, "miss", miss.reason, miss.nearest, miss.differences, problems=problems)
        needs = found.manifest.needs
        graphs = {graph: next(store.search(graph, mend=False).entries(), None) for graph in needs}
        problems, parts_found = tuple(store.problems), plan_outcomes(found.manifest)
        if missing := [graph.short for graph, place in graphs.items() if place is None]:
            reason = f"the plan {key.digest.short} needs graphs that are gone: {', '.join(missing)}"
            return Explanation(key, "miss", reason, parts=parts_found, problems=problems)
        tiers = [found.tier, *(place.tier for place in graphs.values() if place is not None)]
        farthest = max(tiers, key=self._tiers.order.index).dir
        where = "the vault" if len(self._tiers.order) == 1 else f"tier {farthest}"
        what = f"the plan {key.digest.short} and its {len(graphs)} graphs are" if graphs else f"{key.digest.short} is"
        reason = f"{what} in {where}"
        return Explanation(key, "hit", reason, parts=parts_found, tier=str(farthest), problems=problems)

    def _per_sample(self, shape: CallShape) -> CallShape:
        """At level ``invariant`` each sample runs on its own, so graphs for one sample serve every batch."""
        per_sample = parse_level(self.settings.level).name == "invariant"
        return replace(shape, batch_size=1) if per_sample else shape


class _Session:
    """One load of one pipeline in progress."""

    def __init__(
        self,
        cache: PipelineCache,
        pipe: Any,
        names: Sequence[str],
        previous: LoadedState | None,
        *,
        worthwhile: bool,
    ) -> None:
        self.cache = cache
        self.worthwhile = worthwhile
        self.pipe = pipe
        self.settings = cache.settings
        self.previous = previous
        self.clock = Clock(cache._progress)
        self.leases = previous.leases if previous else HeldLeases()
        self.store = Store(cache._tiers, cache.settings, lambda: cache.vault, self.leases._leases)
        self.held = len(self.store.leases)
        self.shelves: dict[VaultShelf, Store] = {}
        clock = self.clock  # a part must not hold its session, which holds the pipeline
        self.store.wait = lambda detail: clock.report(Step("", "wait", None, detail))
        self.loaded: list[weakref.ref[LoadedState]] = []
        self.architectures: dict[str, Mapping[str, Any]] = {}
        self.known: dict[str, Mapping[str, Any]] = {}
        self.identities: dict[str, VaultShelf] = {}
        with self.clock.step("fingerprint"):
            self.regions = choose_regions(pipe, names, self.settings.regions)
            whole = [name for name in names if name not in self.regions]
            blocks = {path: name for name, its in self.regions.items() for path in its.blocks}
            frozen = [*whole, *blocks]
            obstacles = {name: what for name in frozen if (what := obstacle(graph_parts.get_part(pipe, name)))}
            self.obstacles = {blocks.get(name, name): what for name, what in obstacles.items()}
            self.obstacles |= self._give_up_otherwise(whole)
            blocks = {path: name for path, name in blocks.items() if name not in self.obstacles}
            self.states = self._attach([*(name for name in whole if name not in self.obstacles), *blocks], blocks)
        earlier = previous.names if previous else ()
        self.names = tuple(dict.fromkeys([*earlier, *(name for name in names if name not in self.regions), *blocks]))

    def _attach(self, names: Sequence[str], blocks: Mapping[str, str]) -> dict[str, PartState]:
        self.known = {path: its for regions in self.regions.values() for path, its in regions.architectures.items()}
        device = execution_device(self.pipe, {name: graph_parts.get_part(self.pipe, name) for name in names})
        states = graph_parts.attach(self.pipe, names, self._options(), blocks=blocks)
        for name, state in states.items():
            if name in blocks:
                state.regions = str(self.regions[blocks[name]])
            shelf = state.attach(device).shelf
            if isinstance(shelf, VaultShelf):
                self.architectures[name] = dict(shelf.factors["architecture"])
                self._take_over(shelf)
        self.known.clear()
        return states

    def _give_up_otherwise(self, whole: Sequence[str]) -> dict[str, str]:
        """Unfreeze what an earlier load froze whole and this one freezes by blocks, and the other way round.

        Return what stands in the way, by part: another pipeline holds them.
        """
        held = {}
        for name, state in graph_parts.frozen_parts(self.pipe).items():
            if name not in self.regions and (state.part == name or state.part not in whole):
                continue
            if any(other is not self.previous and other.owner() is not None for other in state.holders):
                held[state.part] = (
                    "another pipeline that shares it has it frozen by other regions: unload that one first"
                )
            else:
                graph_parts.detach(self.pipe, [name])
        return held

    @property
    def modules(self) -> dict[str, nn.Module]:
        """The parts that are frozen, whole or by blocks."""
        return {name: graph_parts.get_part(self.pipe, name) for name in graph_parts.by_part(self.states)}

    def _leave_eager(self, part: str) -> None:
        for name in [name for name, state in self.states.items() if state.part == part]:
            graph_parts.detach(self.pipe, [name])
            del self.states[name]

    def _take_over(self, shelf: VaultShelf) -> None:
        """A part keeps the shelf of an earlier load; what is opened from now on is told of and held by this one."""
        self.shelves.setdefault(shelf, shelf.store)
        self.store.origins |= shelf.store.origins
        shelf.store = self.store

    def _options(self) -> PartOptions:
        settings, store, build, clock = self.settings, self.store, self.cache.build, self.clock
        level = settings.level
        inductor_settings = copy_context()

        known, shelves = self.known, self.identities

        def factors_at_level(name: str, module: nn.Module, device: torch.device) -> dict[str, Any]:
            with at_level(level):
                return part_factors(module, device, backend=settings.backend, build=build, known=known.get(name))

        def shelf(name: str, module: nn.Module, device: torch.device) -> VaultShelf:
            factors = inductor_settings.copy().run(factors_at_level, name, module, device)
            made = VaultShelf(store, name, factors, device)
            return shelves.setdefault(made.identity, made)

        def report(part: str, action: str, seconds: float | None, detail: str) -> None:
            clock.report(Step(part, action, seconds, detail))
            if seconds is not None:
                label = f"{action} {part}"
                clock.seconds[label] = clock.seconds.get(label, 0.0) + seconds

        loaded = self.loaded

        def guard_part(name: str) -> None:
            """Look at a part that is called outside of a generation, unless its pipeline is gone."""
            for state in (reference() for reference in loaded):
                if state is not None and (pipe := state.owner()) is not None:
                    state.check_part(pipe, name)

        background = None
        if settings.unfrozen_policy == "background":
            from pipevault.cache.background import BackgroundFreezer

            background = BackgroundFreezer(settings, build)
        tiers = [str(tier.dir) for tier in self.cache._tiers.order]
        return PartOptions(
            policy=settings.unfrozen_policy,
            context=repr((tiers, level, build.to_json(), settings.backend)),
            settings=inductor_settings,
            build=build,
            shelf=shelf,
            guard=guard_part,
            verify=_verify,
            background=background,
            report=report,
            timed=clock.timed,
            freeze_hint=(
                "Freeze such calls too, with PipelineCache.load(pipe, shapes=[...]) in mode 'compile' or with "
                "`pipevault prewarm`"
            ),
        )

    def attached(self, wanted: Sequence[str] | None) -> Outcome:
        """What a load without a shape found. Where there is no graph at all yet, the pipeline's default call is frozen,
        if it can be made up.
        """
        with self.clock.step("lookup"):
            for state in self.states.values():
                state.table.read_shelf()
        is_bare = not any(state.table.slots for state in self.states.values())
        if is_bare and self.states and wanted is None and self.settings.unfrozen_policy == "compile":
            try:
                return self.ensure(AskedShape().resolve(self.pipe, self.cache._per_sample))
            except BadCallError as error:
                logger.info("calls of %s are frozen as they come: %s", type(self.pipe).__name__, error)
        by_part = graph_parts.by_part(self.states)
        parts = {name: _attached_part(members) for name, members in by_part.items()} | self._obstructed()
        graphs = list({Digest(slot.kept.key): None for state in self.states.values() for slot in state.graphs})
        if not graphs:
            tiers = self.cache._tiers
            tiers.is_writable(tiers.own_tier)  # raises what makes it unusable
        if not graphs and self.settings.mode == "require":
            key = self.cache.key(self.pipe, parts=tuple(self.modules))
            raise self._missed(key, self.store.search(key.digest).miss(key), CallShape())
        reason = "" if graphs else "there are no graphs for this pipeline yet; calls are frozen as they come"
        if not graphs and self.settings.unfrozen_policy != "compile":
            reason = "there are no graphs for this pipeline yet"
        return Outcome(
            "hit" if graphs else "miss",
            reason=reason,
            parts=parts,
            seconds=self.clock.seconds,
            stored=True,
            tier=self.store.tier_of(graphs),
            problems=tuple(self.store.problems),
        )

    def ensure(self, shape: CallShape | CallRange) -> Outcome:
        """Make sure that the graphs for calls of ``shape`` exist."""
        with self.clock.step("fingerprint"):
            key = build_key(
                self.pipe,
                self.modules,
                shape,
                backend=self.settings.backend,
                build=self.cache.build,
                known=self.architectures,
                regions={name: str(its) for name, its in self.regions.items() if name not in self.obstacles},
                worthwhile=self.worthwhile,
            )
        self.store.unsigned = None
        hit, miss = self._from_plan(key)
        if hit is not None:
            return hit
        assert miss is not None
        compiled_s = self._compiled_s()
        try:
            made = self._without_plan(key, miss, shape)
        except BaseException:  # whatever it was goes on
            self.store.count("miss", key.digest, reason=miss.word)
            raise
        if self._compiled_s() > compiled_s:
            self.store.count("miss", key.digest, reason=miss.word)
        return made

    def _without_plan(self, key: Key, miss: Miss, shape: CallShape | CallRange) -> Outcome:
        if self.settings.mode == "require":
            return self._rehearsed_only(key, miss, shape)
        what = type(self.pipe).__name__
        self.store.require_writable(what)
        if self.cache._progress is None:
            logger.warning("freezing %s: %s", what, miss.reason)
        with ExitStack() as stack:
            try:
                lock = self.cache.vault.lock(
                    key.digest, timeout_s=self.settings.lock_timeout_s, on_wait=self.store.wait
                )
                stack.enter_context(lock)
            except LockTimeoutError as error:
                if self.settings.on_lock_timeout != "compile":
                    raise
                logger.warning("%s Freezing it here too, as on_lock_timeout is 'compile'.", error)
            stack.enter_context(FREEZING)  # after the wait for another process, so that other threads go on freezing
            hit, _ = self._from_plan(key)
            return hit if hit is not None else self._rehearse_and_publish(key, miss, shape)

    def _compiled_s(self) -> float:
        return sum(seconds for name, seconds in self.clock.seconds.items() if name.startswith("compile "))

    def _from_plan(self, key: Key) -> tuple[Outcome | None, Miss | None]:
        search = self.store.search(key.digest)
        with self.clock.step("lookup"):
            found = self.store.open_found(search)
        if found is None:
            return None, search.miss(key)
        with self.clock.step("load"):
            missing = open_graphs(found.manifest, self.states, self.store)
        if missing:
            return None, Miss(missing, word="damaged")
        for name in tuple(self.modules):
            if lists_part(found.manifest, name):
                self._leave_eager(name)
        parts = plan_outcomes(found.manifest) | self._obstructed()
        self.store.count("hit", found.key)
        reason = "; ".join(f"{name}: {part.reason}" for name, part in parts.items() if part.status == "eager")
        outcome = Outcome(
            "partial" if reason else "hit",
            key=found.key,
            reason=reason,
            parts=parts,
            seconds=self.clock.seconds,
            stored=True,
            manifest=found.manifest.manifest_digest,
            tier=self.store.tier_of([found.key, *found.manifest.needs]),
            problems=tuple(self.store.problems),
        )
        return outcome, None

    def _rehearsed_only(self, key: Key, miss: Miss, shape: CallShape | CallRange) -> Outcome:
        """Without a plan, whether all graphs are there shows only when the pipeline runs."""
        for state in self.states.values():
            state.table.read_shelf()
        if not any(state.graphs for state in self.states.values()):
            raise self._missed(key, miss, shape)
        try:
            rehearsal = rehearse(self.pipe, self.states, shape, policy="error", clock=self.clock, compare=False)
        except UnfrozenCallError as error:
            more = "" if miss.reason in str(error) else f" {error}"
            raise self._missed(key, miss, shape, more) from error
        graphs = sorted({Digest(graph) for graphs in rehearsal.graphs.values() for graph in graphs})
        if any(self.store.renew(graph) for graph in graphs):  # open, and gone from every tier since
            raise self._missed(key, miss, shape)
        parts = {**rehearsal.parts, **self._obstructed()}
        reason = "; ".join(f"{name}: {part.reason}" for name, part in parts.items() if part.status == "eager")
        status = "partial" if reason else "hit"
        return Outcome(
            status,
            reason=reason,
            parts=parts,
            seconds=self.clock.seconds,
            stored=True,
            tier=self.store.tier_of(graphs),
            problems=tuple(self.store.problems),
        )

    def _rehearse_and_publish(self, key: Key, miss: Miss, shape: CallShape | CallRange) -> Outcome:
        started_s, compiled_s = time.perf_counter(), self._compiled_s()
        mean_s = mean_compile_s(self.cache.vault.layout)
        with Builders(self.settings.build_processes, self.settings.level, mean_s) as builders:
            rehearsal = rehearse(
                self.pipe,
                self.states,
                shape,
                policy="compile",
                clock=self.clock,
                compare=True,
                builders=builders,
                worthwhile=self.worthwhile,
            )
        for name in rehearsal.eager:
            self._leave_eager(name)
        for text in rehearsal.problems:
            self.store.tell(text)
        plan = make_plan(key, rehearsal, time.perf_counter() - started_s)
        problem, manifest = "", None
        try:
            with self.clock.step("publish"):
                published = self._publish(plan)
                manifest = published.manifest.manifest_digest
            self.store.keep(self.cache._tiers.hold(published, is_use=False))
        except VaultError as error:
            problem = f"not stored: {error}"
        if miss.word == "damaged":
            self.store.count("rebuilt", key.digest)
        parts = {**rehearsal.parts, **self._obstructed()}
        eager = "; ".join(f"{name}: {part.reason}" for name, part in parts.items() if part.status == "eager")
        is_new = self._compiled_s() > compiled_s
        status = "partial" if eager else "miss" if is_new else "hit"
        return Outcome(
            status,
            key=key.digest,
            reason="; ".join(text for text in (miss.reason, problem, eager) if text),
            parts=parts,
            seconds=self.clock.seconds,
            stored=not problem and not any("not stored" in text for text in self.store.problems),
            manifest=manifest,
            tier="" if is_new else self.store.tier_of(plan.needs),
            problems=tuple(self.store.problems),
        )

    def _publish(self, plan: Manifest) -> Found:
        """What stands in the vault: a plan that is whole stays, unless it needs other graphs than the call does."""
        tiers = self.cache._tiers
        published = tiers.publish(plan, {})
        if published.manifest.needs == plan.needs:
            return published
        tiers.quarantine(published.vault, published.tier, published.path, "The call does not need its graphs any more.")
        return tiers.publish(plan, {})

    def _obstructed(self) -> dict[str, PartOutcome]:
        return {name: PartOutcome("eager", what) for name, what in self.obstacles.items()}

    def _missed(self, key: Key, miss: Miss, shape: CallShape | CallRange, more: str = "") -> SignatureError | MissError:
        """Why nothing is loaded: something lacks a signature, else :class:`MissError`."""
        return self.store.unsigned or MissError(self._message(key, miss, shape) + more, key.digest.hex, miss.reason)

    def _message(self, key: Key, miss: Miss, shape: CallShape | CallRange) -> str:
        from pipevault.cache.advice import freeze_command

        settings = self.settings
        command = freeze_command(self.pipe, shape, weights=settings.weights, level=settings.level, dir=settings.dir)
        order = self.cache._tiers.order
        folders = ", ".join(str(tier.dir) for tier in order)
        where = f"The vault {folders} holds" if len(order) == 1 else f"The tiers {folders} hold"
        reason = miss.reason.rstrip(".")
        problems = [problem.rstrip(".") for problem in self.store.problems]
        others = [text for text in problems if text not in reason and text.partition(": ")[2] not in reason]
        also = f" Also: {'; '.join(others)}." if others else ""
        return (
            f"{where} no usable graphs for {type(self.pipe).__name__} (key {key.digest.short}): {reason}.{also} "
            f"To freeze it, {command}; or use mode 'compile'."
        )

    def finish(self, result: Outcome, asked: Sequence[AskedShape], parts: Sequence[str] | None) -> None:
        """Make the pipeline a loaded one."""
        previous = self.previous
        digests = {name: found["digest"] for name, found in self.architectures.items() if name in self.states}
        frozen = graph_parts.frozen_parts(self.pipe)
        before = {name: digest for name, digest in (previous.digests if previous else {}).items() if name in frozen}
        described = self._described(asked, parts)
        if previous is not None and previous.load.get("shapes"):
            described["shapes"] = [*previous.load["shapes"], *described["shapes"]]
        default = next((size for shape in asked if (size := shape.size)), {})
        state = LoadedState(
            outcome=result,
            owner=weakref.ref(self.pipe),
            names=self.names,
            digests={**before, **digests},
            level=self.settings.level,
            load=described,
            leases=self.leases,
            default_size=(previous.default_size if previous else None) or default,
            turn_timeout_s=self.settings.turn_timeout_s,
        )
        attach_state(self.pipe, state)
        self.loaded.append(weakref.ref(state))

    def release(self) -> None:
        for shelf, store in self.shelves.items():
            shelf.store = store
        for lease in self.store.leases[self.held :]:
            lease.release()
        del self.store.leases[self.held :]

    def _described(self, shapes: Sequence[AskedShape], parts: Sequence[str] | None) -> dict[str, Any]:
        """What a record must tell so that the same load can be done again."""
        modules = graph_parts.find_parts(self.pipe)
        return {
            "shapes": [shape.to_json() for shape in shapes],
            "parts": None if parts is None else list(parts),
            "backend": self.settings.backend,
            "weights": self.settings.weights,
            "regions": self.settings.regions,
            "build": digest_json(dict(self.cache.build.config)).hex,
            "device": str(execution_device(self.pipe, modules)),
            "dtype": {name: module_dtype(module) for name, module in modules.items()},
        }


def _attached_part(members: Sequence[PartState]) -> PartOutcome:
    refused = list(dict.fromkeys(slot.refusal for state in members for slot in state.table if slot.refusal))
    graphs = len({slot.kept.key for state in members for slot in state.graphs})
    regions = members[0].regions
    if refused and not graphs:
        return PartOutcome("eager", "; ".join(refused), 0, regions)
    return PartOutcome("frozen" if graphs else "not called", "", graphs, regions)


def _verify(shelf: Any, module: nn.Module) -> str:
    """Why the graphs of a part whose sub-modules changed cannot follow, or nothing."""
    if not isinstance(shelf, VaultShelf):
        return ""
    same = architecture(module)["digest"] == shelf.factors["architecture"]["digest"]
    return "" if same else "its sub-modules are not those that were frozen"


@contextmanager
def _unchanged_on_error(pipe: Any) -> Any:
    """Leave the pipeline exactly as it was if a load fails: its parts, its class, what was loaded before."""
    state = loaded_state(pipe)
    frozen = graph_parts.frozen_parts(pipe)
    places = {name: part.place() for name, part in frozen.items()}
    modules = {name: graph_parts.get_part(pipe, name) for name in frozen}
    try:
        yield
    except BaseException:  # whatever it was goes on
        for name in tuple(graph_parts.frozen_parts(pipe)):
            if name not in frozen:
                graph_parts.detach(pipe, [name])
        for name, part in frozen.items():
            if (now := graph_parts.get_part(pipe, name)) is not modules[name]:
                graph_parts.replace_part(pipe, now, modules[name])
            part.put_back(places[name])
        if state is not None:
            attach_state(pipe, state)
        raise
