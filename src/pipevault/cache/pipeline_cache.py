"""``PipelineCache``: give a pipeline the graphs of the vault, and freeze those that are missing."""

from __future__ import annotations

import logging
import time
import weakref
from collections.abc import Mapping, Sequence
from copy import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from torch import nn

from pipevault.cache.access import Access
from pipevault.cache.keys import PartIdentity, execution_device
from pipevault.cache.loaded import (
    LoadedState,
    attach_state,
    given_back,
    loaded_state,
    release_class,
    status,
    unchanged_on_error,
    unload,
)
from pipevault.cache.onediff_backends import onediff_backend
from pipevault.cache.onediff_load import OnediffState, load_onediff
from pipevault.cache.outcome import Explanation, Outcome, Progress, combine
from pipevault.cache.plan import plan_outcomes
from pipevault.cache.search import Store
from pipevault.cache.session import LoadSession
from pipevault.cache.turn import resources
from pipevault.calls.call_shapes import AskedShape, Parts, ShapeFields, asked_shape, call_shapes
from pipevault.compat.versions import require_inductor, warn_untried
from pipevault.determinism.levels import SWITCHES, needs, parse_level
from pipevault.determinism.levels import level as at_level
from pipevault.determinism.turns import TURNS
from pipevault.digest import Digest
from pipevault.errors import SettingsError
from pipevault.graphs import parts as graph_parts
from pipevault.graphs.inductor import BuildOptions
from pipevault.key import Key
from pipevault.settings import Settings
from pipevault.settings.arguments import SettingsFields, resolve_fields, spelled_out
from pipevault.store.manifest import Manifest
from pipevault.store.vault import Vault

if TYPE_CHECKING:
    from typing_extensions import Unpack

AnyPipeline = TypeVar("AnyPipeline")

logger = logging.getLogger("pipevault")


class PipelineCache:
    """A vault and how to use it.

    ``settings``: a :class:`pipevault.settings.Settings`; or its fields are given, and those left out follow the
    environment, the config file and the defaults. ``determinism`` is another name of ``level``. A name that is
    misspelt is a :class:`SettingsError`.

    ``build_config`` overrides fields of ``torch._inductor.config`` for compiling; it is part of the key.
    ``progress`` is called with a :class:`~pipevault.cache.outcome.Step` whenever one begins or ends.
    """

    @spelled_out(SettingsFields)
    def __init__(
        self,
        dir: str | Path | None = None,
        *,
        settings: Settings | None = None,
        build_config: Mapping[str, bool | int | float | str] | None = None,
        progress: Progress | None = None,
        **fields: Unpack[SettingsFields],
    ) -> None:
        self.settings = resolve_fields(settings, {"dir": dir, **fields})
        profile, weights = self.settings.compile_profile, self.settings.weights
        self._use(BuildOptions.of_profile(profile, weights, build_config or {}), progress)
        if self.settings.mode != "off":
            require_inductor() if self._backend is None else self._backend.require()

    def _use(self, build: BuildOptions, progress: Progress | None) -> None:
        self._access = Access(self.settings, build, progress)
        self._backend = onediff_backend(self.settings.backend, build)

    def with_build(self, build: BuildOptions) -> PipelineCache:
        """Return a cache of the same settings that compiles with ``build``, whatever profile they name."""
        other = copy(self)
        other._use(build, self._access.progress)
        return other

    @property
    def build(self) -> BuildOptions:
        """The options that graphs are compiled with."""
        return self._access.build

    @property
    def vault(self) -> Vault:
        """The vault of ``settings.dir``, made if need be. Raises :class:`~pipevault.errors.VaultError`."""
        return self._access.vault

    def find_entry(self, key: Digest) -> Manifest | None:
        """Return the manifest of ``key`` in the first tier that has a usable one."""
        found = self._access.tiers.lookup(key)
        return None if found is None else found.manifest

    @spelled_out(ShapeFields)
    def prepare(
        self,
        pipe: AnyPipeline,
        *,
        parts: Parts = None,
        shapes: Sequence[Mapping[str, Any]] | None = None,
        **shape: Unpack[ShapeFields],
    ) -> AnyPipeline:
        """Give ``pipe`` the frozen graphs of the vault, and return it.

        Without a shape, all graphs that fit its parts are attached, and each is opened when first used; where there is
        none at all, those of the pipeline's default call are frozen. With one, or
        with ``shapes``, a list of mappings of the same arguments, the graphs for such calls are made sure to
        exist. A size that is a pair, such as ``height=(512, 1024)``, asks for graphs that serve the whole range;
        ``dynamic`` makes ranges of the single sizes, from half to twice, and of up to four samples. Where a part cannot
        have such a graph, ``problems`` of the outcome say why, and single sizes are frozen as they come. A second load
        adds to the first. ``parts`` names the parts to freeze; by default all. With ``auto``, those stay eager that
        gain less than 3 %, by their times when their graphs were checked; the outcome says so. What happened:
        :func:`pipevault.outcome`. If it fails, the pipeline is what it was.

        Raises :class:`~pipevault.errors.MissError` in mode ``require``, :class:`~pipevault.errors.CannotFreezeError`
        and its subclasses, :class:`~pipevault.errors.BadCallError`, :class:`~pipevault.errors.VaultError`.
        """
        asked, name = call_shapes(shapes, **shape), type(pipe).__name__
        wanted = {**resources(pipe), SWITCHES: needs(parse_level(self.settings.level))}
        with TURNS.take(wanted, what=f"loading {name}", timeout_s=self.settings.turn_timeout_s):
            started_s = time.perf_counter()
            self._prepare(pipe, asked, None if parts == "auto" else parts, worthwhile=parts == "auto")
            if logger.isEnabledFor(logging.INFO):
                _log_load(name, status(pipe), time.perf_counter() - started_s)
            return pipe

    load = prepare
    """The first name of :meth:`prepare`, which stays. A subclass that overrides either of them overrides both."""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        own = next(vars(base) for base in cls.__mro__ if "prepare" in vars(base) or "load" in vars(base))
        for name, other in (("prepare", "load"), ("load", "prepare")):
            if name not in own:
                setattr(cls, name, own[other])

    def _prepare(
        self, pipe: Any, asked: Sequence[AskedShape], parts: Sequence[str] | None, *, worthwhile: bool
    ) -> None:
        """Do :meth:`prepare` in the turn of the pipeline."""
        if self.settings.mode == "off":
            unload(pipe)
            attach_state(pipe, LoadedState(Outcome("off", reason="mode is off"), weakref.ref(pipe)))
            return
        if self._backend is not None:
            load_onediff(self._access, self._backend, pipe, asked, parts)
            return
        warn_untried()
        is_other = isinstance(loaded_state(pipe), OnediffState)
        with given_back(pipe) if is_other else unchanged_on_error(pipe), at_level(self.settings.level):
            wanted = [shape.resolve(pipe, self._access.per_sample) for shape in asked]
            names = tuple(graph_parts.find_parts(pipe, parts))
            previous = loaded_state(pipe)
            release_class(pipe)
            session = LoadSession(self._access, pipe, names, previous, worthwhile=worthwhile)
            try:
                outcomes = tuple(session.ensure(shape) for shape in wanted) or (session.attached(parts),)
                session.finish(combine(outcomes), asked, parts)
            except BaseException:  # whatever it was goes on; a pipeline that was not loaded holds no lease
                session.release()
                raise

    @spelled_out(ShapeFields)
    def key(self, pipe: AnyPipeline, *, parts: Parts = None, **shape: Unpack[ShapeFields]) -> Key:
        """Return the key of the plan for a call. ``shape`` takes the arguments of :meth:`prepare`."""
        names = tuple(graph_parts.find_parts(pipe, None if parts == "auto" else parts))
        resolved = asked_shape(shape).resolve(pipe, self._access.per_sample)
        return self._access.plan_key(pipe, names, resolved, worthwhile=parts == "auto")

    def part_identity(self, pipe: AnyPipeline, part: str) -> PartIdentity:
        """Return all that decides the code of a part's graphs next to their signatures."""
        module = graph_parts.get_part(pipe, part)
        if not isinstance(module, nn.Module):
            raise SettingsError(f"{type(pipe).__name__} has no part {part!r}.")
        device = execution_device(pipe, {part: module})
        with at_level(self.settings.level):
            return PartIdentity.of(module, device, backend=self.settings.backend, build=self.build)

    def part_key(self, pipe: AnyPipeline, part: str) -> Key:
        """Return the factors of the identity of a part, as the key of a graph without a signature."""
        return Key(self.part_identity(pipe, part).factors)

    @spelled_out(ShapeFields)
    def explain(self, pipe: AnyPipeline, *, parts: Parts = None, **shape: Unpack[ShapeFields]) -> Explanation:
        """Return what :meth:`prepare` would do with these arguments, without doing it."""
        key = self.key(pipe, parts=parts, **shape)
        store = Store(self._access)
        search = store.search(key.digest, set_aside=False)
        found = next(search.entries(), None)
        if found is None:
            miss = search.miss(key)
            wanted = graph_parts.find_parts(pipe, None if parts == "auto" else parts)
            shelves = {name: self.part_identity(pipe, name).shelf for name in wanted}
            partly = tuple(name for name, shelf in shelves.items() if self._access.tiers.shelf(shelf)[0])
            reason = miss.reason
            if partly:
                reason += f"; without a plan, graphs of {', '.join(partly)} are there, and run where a call fits them"
            problems = tuple(store.problems)
            return Explanation(
                key, "miss", reason, miss.nearest, miss.differences, problems=problems, with_graphs=partly
            )
        needs = found.manifest.needs
        graphs = {graph: next(store.search(graph, set_aside=False).entries(), None) for graph in needs}
        problems, parts_found = tuple(store.problems), plan_outcomes(found.manifest)
        if missing := [graph.short for graph, place in graphs.items() if place is None]:
            reason = f"the plan {key.digest.short} needs graphs that are gone: {', '.join(missing)}"
            return Explanation(key, "miss", reason, parts=parts_found, problems=problems)
        tiers = [found.tier, *(place.tier for place in graphs.values() if place is not None)]
        farthest = max(tiers, key=self._access.tiers.order.index).dir
        where = "the vault" if len(self._access.tiers.order) == 1 else f"tier {farthest}"
        what = f"the plan {key.digest.short} and its {len(graphs)} graphs are" if graphs else f"{key.digest.short} is"
        reason = f"{what} in {where}"
        return Explanation(key, "hit", reason, parts=parts_found, tier=str(farthest), problems=problems)


def _log_load(pipeline: str, done: Outcome, seconds: float) -> None:
    """Log the one line of a load: status, parts and seconds."""
    frozen, eager = (
        ", ".join(name for name, part in done.parts.items() if part.status == wanted) or "none"
        for wanted in ("frozen", "eager")
    )
    logger.info("loaded %s: %s in %.2f s; frozen: %s; eager: %s", pipeline, done.status, seconds, frozen, eager)
