"""One load in progress: attach shelves, open what a plan names, or rehearse the call and publish what is missing."""

from __future__ import annotations

import logging
import shlex
import time
import weakref
from collections.abc import Iterable, Mapping, Sequence
from contextvars import copy_context
from functools import partial
from typing import Any

import torch
from torch import nn

from pipevault.cache.access import Access
from pipevault.cache.background import freeze_in_background
from pipevault.cache.builders import Builders
from pipevault.cache.keys import PartIdentity, build_key, execution_device
from pipevault.cache.loaded import HeldLeases, LoadedState, attach_state, loaded_state, part_now
from pipevault.cache.outcome import Outcome, PartOutcome, Step
from pipevault.cache.plan import make_plan, open_graphs, plan_outcomes
from pipevault.cache.regions import choose_regions
from pipevault.cache.rehearsal import rehearse, rehearse_frozen
from pipevault.cache.search import Miss, Store
from pipevault.cache.shelf import VaultShelf
from pipevault.calls.call import CallShape
from pipevault.calls.call_shapes import AskedShape, CallRange
from pipevault.determinism.levels import level as at_level
from pipevault.determinism.levels import parse_level
from pipevault.digest import Digest
from pipevault.errors import BadCallError, MissError, SignatureError, UnfrozenCallError, VaultError
from pipevault.fingerprint.model import Architecture, architecture
from pipevault.graphs import parts as graph_parts
from pipevault.graphs.part import obstacle
from pipevault.graphs.state import FREEZING, PartOptions, PartState
from pipevault.key import Key
from pipevault.pipeline import Pipeline
from pipevault.settings import Settings
from pipevault.store.manifest import Manifest
from pipevault.store.stats.summary import mean_compile_s
from pipevault.store.tiers import TierHit

logger = logging.getLogger("pipevault")


class LoadSession:
    """One load of one pipeline with this package's own backend, in progress."""

    def __init__(
        self, access: Access, pipe: Pipeline, names: Sequence[str], previous: LoadedState | None, *, worthwhile: bool
    ) -> None:
        self.access = access
        self.worthwhile = worthwhile
        self.pipe = pipe
        self.settings = access.settings
        self.previous = previous
        self.leases = previous.leases if previous else HeldLeases()
        self.store = Store(access, self.leases.leases)
        self.clock = self.store.clock
        self.held = len(self.store.leases)
        self.shelves: dict[VaultShelf, Store] = {}
        self.architectures: dict[str, Architecture] = {}
        self.made: list[weakref.ref[LoadedState]] = []
        with self.clock.step("fingerprint"):
            self.regions = choose_regions(pipe, names, self.settings.regions)
            whole = [name for name in names if name not in self.regions]
            blocks = {path: name for name, its in self.regions.items() for path in its.blocks}
            frozen = [*whole, *blocks]
            found = {name: what for name in frozen if (what := self._obstacle(graph_parts.get_part(pipe, name)))}
            obstacles = {blocks.get(name, name): what for name, what in found.items()}
            obstacles |= self._give_up_otherwise(whole)
            self.obstacles = {name: PartOutcome("eager", what) for name, what in obstacles.items()}
            blocks = {path: name for path, name in blocks.items() if name not in self.obstacles}
            self.states = self._attach([*(name for name in whole if name not in self.obstacles), *blocks], blocks)
        earlier = previous.names if previous else ()
        self.names = tuple(dict.fromkeys([*earlier, *(name for name in names if name not in self.regions), *blocks]))

    def _obstacle(self, part: nn.Module) -> str:
        is_baked = self.access.build.weights == "baked"
        if is_baked and any(weight.is_inference() for weight in (*part.parameters(), *part.buffers())):
            return "its weights were made in inference mode, which counts no changes that baked graphs must notice"
        return obstacle(part)

    def _attach(self, names: Sequence[str], blocks: Mapping[str, str]) -> dict[str, PartState]:
        known = {path: its for regions in self.regions.values() for path, its in regions.architectures.items()}
        device = execution_device(self.pipe, {name: graph_parts.get_part(self.pipe, name) for name in names})
        states = graph_parts.attach(self.pipe, names, self._options(known), blocks=blocks)
        for name, state in states.items():
            if name in blocks:
                state.regions = str(self.regions[blocks[name]])
            shelf = state.attach(device).shelf
            if isinstance(shelf, VaultShelf):
                self.architectures[name] = shelf.of.architecture
                # Use the shelf of an earlier load; what is opened from now on is reported and held by this one.
                self.shelves.setdefault(shelf, shelf.store)
                self.store.origins |= shelf.store.origins
                shelf.store = self.store
        known.clear()
        return states

    def _give_up_otherwise(self, whole: Sequence[str]) -> dict[str, str]:
        """Unfreeze what an earlier load froze whole and this one freezes by blocks, and the other way round. Return
        what stands in the way, by part: another pipeline holds them.
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

    def _options(self, known: Mapping[str, Architecture]) -> PartOptions:
        """Return the options of the parts. They must not hold the session, which holds the pipeline."""
        settings, store, build, clock = self.settings, self.store, self.access.build, self.clock
        level = settings.level
        inductor_settings = copy_context()
        shelves: dict[str, VaultShelf] = {}
        owner, made = weakref.ref(self.pipe), self.made

        def guard(name: str) -> None:
            """Look at a part that is called outside of a generation, unless its pipeline is gone."""
            pipe = owner()
            if pipe is None:
                return
            loaded = loaded_state(pipe) or (made[0]() if made else None)  # taken off a pipeline that is loaded again
            if loaded is not None:
                loaded.check(pipe, name)

        def identity_at_level(name: str, module: nn.Module, device: torch.device) -> PartIdentity:
            with at_level(level):
                return PartIdentity.of(module, device, backend=settings.backend, build=build, known=known.get(name))

        def shelf(name: str, module: nn.Module, device: torch.device) -> VaultShelf:
            identity = inductor_settings.copy().run(identity_at_level, name, module, device)
            made = VaultShelf(store, name, identity, device)
            return shelves.setdefault(made.identity, made)

        def report(part: str, action: str, seconds: float | None, detail: str) -> None:
            clock.report(Step(part, action, seconds, detail))
            if seconds is not None:
                clock.add(f"{action} {part}", seconds)

        is_background = settings.unfrozen_policy == "background"
        tiers = [str(tier.dir) for tier in self.access.tiers.order]
        return PartOptions(
            policy=settings.unfrozen_policy,
            context=repr((tiers, level, build.to_json(), settings.backend)),
            settings=inductor_settings,
            build=build,
            shelf=shelf,
            guard=guard,
            verify=_verify,
            background=partial(freeze_in_background, settings, build) if is_background else None,
            report=report,
            timed=clock.timed,
            freeze_hint=(
                "Freeze such calls too, with PipelineCache.load(pipe, shapes=[...]) in mode 'compile' or with "
                "`pipevault prewarm`"
            ),
        )

    def attached(self, wanted: Sequence[str] | None) -> Outcome:
        """Return the outcome of a load without a shape; where there are no graphs yet, freeze the default call."""
        with self.clock.step("lookup"):
            for state in self.states.values():
                state.table.read_shelf()
        is_bare = not any(state.table.slots for state in self.states.values())
        if is_bare and self.states and wanted is None and self.settings.unfrozen_policy == "compile":
            try:
                return self.ensure(AskedShape().resolve(self.pipe, self.access.per_sample))
            except BadCallError as error:
                logger.info("calls of %s are frozen as they come: %s", type(self.pipe).__name__, error)
        by_part = graph_parts.by_part(self.states)
        parts = {name: part_now(members) for name, members in by_part.items()} | self.obstacles
        graphs = list({Digest(slot.kept.key): None for state in self.states.values() for slot in state.graphs})
        if graphs:
            return self.store.outcome("hit", parts, tier=self.store.tier_of(graphs))
        tiers = self.access.tiers
        tiers.is_writable(tiers.own_tier)  # raises what makes it unusable
        if self.settings.mode == "require":
            shape = AskedShape().resolve(self.pipe, self.access.per_sample)
            key = self.access.plan_key(self.pipe, tuple(self.modules), shape)
            raise self._missed(key, self.store.search(key.digest).miss(key), CallShape())
        reason = "there are no graphs for this pipeline yet"
        if self.settings.unfrozen_policy == "compile":
            reason += "; calls are frozen as they come"
        return self.store.outcome("miss", parts, reason=reason)

    def _hit(self, parts: Mapping[str, PartOutcome], keys: Iterable[Digest], **digests: Any) -> Outcome:
        parts = {**parts, **self.obstacles}
        eager, tier = _eager_reasons(parts), self.store.tier_of(keys)
        return self.store.outcome("partial" if eager else "hit", parts, reason=eager, tier=tier, **digests)

    def ensure(self, shape: CallShape | CallRange) -> Outcome:
        """Make sure that the graphs for calls of ``shape`` exist."""
        with self.clock.step("fingerprint"):
            key = build_key(
                self.pipe,
                self.modules,
                shape,
                backend=self.settings.backend,
                build=self.access.build,
                known=self.architectures,
                regions={name: str(its) for name, its in self.regions.items() if name not in self.obstacles},
                worthwhile=self.worthwhile,
            )
        self.store.unsigned = None
        miss = self._from_plan(key)
        if isinstance(miss, Outcome):
            return miss
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
        if self.access.progress is None:
            logger.warning("freezing %s: %s", what, miss.reason)
        # One freeze at a time after the wait for another process, so that other threads go on freezing meanwhile.
        with self.store.locked(key.digest), FREEZING:
            found = self._from_plan(key)
            return found if isinstance(found, Outcome) else self._rehearse_and_publish(key, miss, shape)

    def _compiled_s(self) -> float:
        return sum(seconds for name, seconds in self.clock.seconds.items() if name.startswith("compile "))

    def _from_plan(self, key: Key) -> Outcome | Miss:
        search = self.store.search(key.digest)
        with self.clock.step("lookup"):
            found = self.store.open_found(search)
        if found is None:
            return search.miss(key)
        with self.clock.step("load"):
            missing = open_graphs(found.manifest, self.states, self.store)
        if missing:
            return Miss(missing, word="damaged")
        for name, part in found.manifest.parts.items():
            if part.get("left_eager"):
                self._leave_eager(name)
        self.store.count("hit", found.key)
        keys = [found.key, *found.manifest.needs]
        return self._hit(plan_outcomes(found.manifest), keys, key=found.key, manifest=found.manifest.manifest_digest)

    def _rehearsed_only(self, key: Key, miss: Miss, shape: CallShape | CallRange) -> Outcome:
        """Without a plan, whether all graphs are there shows only when the pipeline runs."""
        for state in self.states.values():
            state.table.read_shelf()
        if not any(state.graphs for state in self.states.values()):
            raise self._missed(key, miss, shape)
        try:
            rehearsal = rehearse_frozen(self.pipe, self.states, shape)
        except UnfrozenCallError as error:
            told = str(error).rpartition("\n")[0] or str(error)  # without its advice: the miss has its own
            more = "" if miss.reason in told else f" {told}"
            raise self._missed(key, miss, shape, more) from error
        graphs = sorted({Digest(graph) for graphs in rehearsal.graphs.values() for graph in graphs})
        if any(self.store.renew(graph) for graph in graphs):  # open, and gone from every tier since
            raise self._missed(key, miss, shape)
        return self._hit(rehearsal.parts, graphs)

    def _rehearse_and_publish(self, key: Key, miss: Miss, shape: CallShape | CallRange) -> Outcome:
        started_s, compiled_s = time.perf_counter(), self._compiled_s()
        mean_s = mean_compile_s(self.access.vault.layout)
        with Builders(self.settings.build_processes, self.settings.level, mean_s) as builders:
            rehearsal = rehearse(
                self.pipe, self.states, shape, clock=self.clock, builders=builders, worthwhile=self.worthwhile
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
            if manifest == plan.manifest_digest:  # else it stood there already
                self.store.count("published", key.digest)
            self.store.keep(self.access.tiers.hold(published, is_use=False))
        except VaultError as error:
            problem = f"not stored: {error}"
        if miss.word == "damaged":
            self.store.count("rebuilt", key.digest)
        parts = {**rehearsal.parts, **self.obstacles}
        eager = _eager_reasons(parts)
        is_new = self._compiled_s() > compiled_s
        status = "partial" if eager else "miss" if is_new else "hit"
        return self.store.outcome(
            status,
            parts,
            key=key.digest,
            reason="; ".join(text for text in (miss.reason, problem, eager) if text),
            stored=not problem and not any("not stored" in text for text in self.store.problems),
            manifest=manifest,
            tier="" if is_new else self.store.tier_of(plan.needs),
        )

    def _publish(self, plan: Manifest) -> TierHit:
        """Return what stands in the vault: a whole plan stays, unless it needs other graphs than the call does."""
        tiers = self.access.tiers
        published = tiers.publish(plan, {})
        if published.manifest.needs == plan.needs:
            return published
        tiers.quarantine(published.vault, published.tier, published.path, "The call does not need its graphs any more.")
        return tiers.publish(plan, {})

    def _missed(self, key: Key, miss: Miss, shape: CallShape | CallRange, more: str = "") -> SignatureError | MissError:
        """Return why nothing is loaded: something lacks a signature, else :class:`MissError`."""
        return self.store.unsigned or MissError(self._message(key, miss, shape) + more, key.digest.hex, miss.reason)

    def _message(self, key: Key, miss: Miss, shape: CallShape | CallRange) -> str:
        order = self.access.tiers.order
        folders = ", ".join(str(tier.dir) for tier in order)
        where = f"The vault {folders} holds" if len(order) == 1 else f"The tiers {folders} hold"
        reason = miss.reason.rstrip(".")
        problems = [problem.rstrip(".") for problem in self.store.problems]
        others = [text for text in problems if text not in reason and text.partition(": ")[2] not in reason]
        also = f" Also: {'; '.join(others)}." if others else ""
        return (
            f"{where} no usable graphs for {type(self.pipe).__name__} (key {key.digest.short}): {reason}.{also} "
            f"To freeze it, {_freeze_command(self.pipe, shape, self.settings)}; or use mode 'compile'."
        )

    def finish(self, result: Outcome, asked: Sequence[AskedShape], parts: Sequence[str] | None) -> None:
        """Make the pipeline a loaded one."""
        previous = self.previous
        digests = {name: found.digest for name, found in self.architectures.items() if name in self.states}
        frozen = graph_parts.frozen_parts(self.pipe)
        before = {name: digest for name, digest in (previous.digests if previous else {}).items() if name in frozen}
        described = self.access.described(self.pipe, graph_parts.find_parts(self.pipe), asked, parts)
        described["regions"] = self.settings.regions
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
        self.made[:] = [weakref.ref(state)]

    def release(self) -> None:
        for shelf, store in self.shelves.items():
            shelf.store = store
        for lease in self.store.leases[self.held :]:
            lease.release()
        del self.store.leases[self.held :]


def _verify(shelf: Any, module: nn.Module) -> str:
    """Return why the graphs of a part whose sub-modules changed cannot follow, or nothing."""
    if not isinstance(shelf, VaultShelf):
        return ""
    same = architecture(module).digest == shelf.of.architecture.digest
    return "" if same else "its sub-modules are not those that were frozen"


def _eager_reasons(parts: Mapping[str, PartOutcome]) -> str:
    return "; ".join(f"{name}: {part.reason}" for name, part in parts.items() if part.status == "eager")


def _freeze_command(pipe: Pipeline, shape: CallShape | CallRange, settings: Settings) -> str:
    """A clause with the command that freezes ``pipe`` at ``shape`` into the vault of ``settings``."""
    least, most = (shape.least, shape.most) if isinstance(shape, CallRange) else (shape, shape)
    if callable(most.call) or (isinstance(most.call, Mapping) and most.call):
        return "run this program once with mode='compile' (its call cannot be given on a command line)"
    model = getattr(getattr(pipe, "config", None), "_name_or_path", None)
    if not model:
        return "run this program once with mode='compile'"
    words = ["pipevault", "prewarm", str(model)]
    if most.width and most.height:
        words += ["--size", _range(f"{least.width}x{least.height}", f"{most.width}x{most.height}")]
    dtype = getattr(pipe, "dtype", None)
    if dtype is not None and str(dtype) != "torch.float32":
        words += ["--dtype", str(dtype).removeprefix("torch.")]
    parts = {name: part for name, part in vars(pipe).items() if hasattr(part, "parameters")}
    words += ["--device", execution_device(pipe, parts).type]
    if most.batch_size > 1:
        words += ["--batch-size", _range(least.batch_size, most.batch_size)]
    if most.num_frames:
        words += ["--frames", _range(least.num_frames, most.num_frames)]
    if most.guidance is not None:
        words += ["--guidance" if most.guidance else "--no-guidance"]
    if settings.weights != "bound":
        words += ["--weights", settings.weights]
    if (name := parse_level(settings.level).name) in ("strict", "invariant"):  # the other levels share their graphs
        words += ["--level", name]
    return f"run `{shlex.join([*words, '--dir', str(settings.dir)])}`"


def _range(least: object, most: object) -> str:
    return str(most) if least == most else f"{least}..{most}"
