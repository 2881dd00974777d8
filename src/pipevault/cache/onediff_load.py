"""Loading a pipeline with one of OneDiff's own backends, ``nexfort`` or ``oneflow``.

A hit restores what was kept, verified, before anything is compiled. A miss compiles, compares the whole output with
the eager one, and publishes. Either way the pipeline is one that was loaded: seeds, records, levels and turns work.
"""

from __future__ import annotations

import logging
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import nn

from pipevault.cache.access import Access
from pipevault.cache.guard import WatchedModule, changed_error, replaced_error
from pipevault.cache.keys import build_key, made_here
from pipevault.cache.loaded import HeldLeases, LoadedState, attach_state, given_back
from pipevault.cache.onediff_backends import ARTIFACT, OnediffBackend
from pipevault.cache.outcome import Outcome, PartOutcome, combine
from pipevault.cache.plan import plan_outcomes
from pipevault.cache.rehearsal import compare_outputs, run_whole
from pipevault.cache.search import Miss, Search, Store
from pipevault.calls.call import CallShape
from pipevault.calls.call_shapes import AskedShape
from pipevault.determinism.levels import level as at_level
from pipevault.digest import digest_file
from pipevault.errors import BadCallError, CorruptEntryError, MissError, NothingFrozenError, VaultError
from pipevault.files.archive import pack_files, unpack_files
from pipevault.files.scratch import scratch_folder
from pipevault.graphs import parts as graph_parts
from pipevault.graphs.check import pipeline_tolerance
from pipevault.graphs.state import FREEZING
from pipevault.key import Key
from pipevault.pipeline import Pipeline
from pipevault.store.manifest import ArtifactRef, Manifest, now_utc
from pipevault.store.tiers import TierHit

logger = logging.getLogger("pipevault")


@dataclass(eq=False)
class OnediffState(LoadedState):
    """The state of a pipeline that a backend of OneDiff compiled.

    ``parts`` has the eager and the compiled module of each. ``watched`` are eager modules that the backend does not
    look at again. ``new_compilations`` counts what it compiled since it was last asked.
    """

    parts: Mapping[str, tuple[nn.Module, Any]] = field(default_factory=dict)
    watched: Mapping[str, WatchedModule] = field(default_factory=dict)
    new_compilations: Callable[[], int] = lambda: 0

    def check(self, pipe: Pipeline, name: str | None = None) -> None:
        for part, (_, compiled) in self.parts.items():
            now = graph_parts.get_part(pipe, part)
            if now is not compiled:
                raise replaced_error(part, now)
        for part, module in self.watched.items():
            if (change := module.change()) is not None:
                raise changed_error(part, change.text)
        if count := self.new_compilations():
            logger.warning(
                "%s: %d graphs were compiled for calls that nothing was kept for; load it for such calls to keep them",
                type(pipe).__name__,
                count,
            )

    def give_back(self, pipe: Pipeline) -> None:
        for eager, compiled in self.parts.values():
            graph_parts.replace_part(pipe, compiled, eager)


def load_onediff(
    access: Access, backend: OnediffBackend, pipe: Pipeline, asked: Sequence[AskedShape], parts: Sequence[str] | None
) -> None:
    """Load ``pipe`` with ``backend`` in place of what was loaded before, which stays if this fails."""
    backend.require()
    wanted = [shape.resolve(pipe, access.per_sample) for shape in asked or [AskedShape()]]
    single = [shape for shape in wanted if isinstance(shape, CallShape)]
    if len(single) < len(wanted):
        raise BadCallError(f"Backend {backend.name!r} keeps single sizes. Give no range of sizes, or use 'inductor'.")
    if len(wanted) > 1 and not backend.takes_many_shapes:
        raise BadCallError(f"A load with backend {backend.name!r} takes one call shape, not {len(wanted)}.")
    with given_back(pipe), at_level(access.settings.level):
        load = _Load(access, backend, pipe, tuple(graph_parts.find_parts(pipe, parts)))
        try:
            outcomes = tuple(load.ensure(shape) for shape in single)
            load.finish(combine(outcomes), asked, parts)
        except BaseException:  # whatever it was goes on; the pipeline is what it was
            load.undo()
            for lease in load.store.leases:
                lease.release()
            raise


@dataclass
class _Load:
    access: Access
    backend: OnediffBackend
    pipe: Pipeline
    names: tuple[str, ...]
    compiled: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.store = Store(self.access)
        self.clock = self.store.clock
        self.eager: dict[str, nn.Module] = {name: graph_parts.get_part(self.pipe, name) for name in self.names}
        self.folder = self.backend.prepare()

    def ensure(self, shape: CallShape) -> Outcome:
        """Restore what was kept for calls of ``shape``, or compile and keep it."""
        settings = self.access.settings
        with self.clock.step("fingerprint"):
            key = build_key(self.pipe, self.eager, shape, backend=settings.backend, build=self.access.build)
        search = self.store.search(key.digest)
        if (hit := self._restored(search)) is not None:
            return hit
        miss = search.miss(key)
        if settings.mode == "require":
            raise MissError(
                f"The vault {settings.dir} holds nothing that {self.backend.name} compiled for "
                f"{type(self.pipe).__name__} (key {key.digest.short}): {miss.reason.rstrip('.')}. Load it once in mode "
                "'compile'.",
                key.digest.hex,
                miss.reason,
            )
        self.store.require_writable(type(self.pipe).__name__)
        logger.warning("compiling %s with %s: %s", type(self.pipe).__name__, self.backend.name, miss.reason)
        with self.store.locked(key.digest, "Compiling"), FREEZING:
            hit = self._restored(self.store.search(key.digest))
            return hit if hit is not None else self._compiled(key, miss, shape)

    def _restored(self, search: Search, *, is_hit: bool = True) -> Outcome | None:
        """Unpack the entry and hand it to the backend; ``None`` if there is none that can be used."""

        def unpack(found: TierHit) -> None:
            with ExitStack() as stack:
                opened = self.store.tiers.open_artifacts(found)
                files = {name: stack.enter_context(file) for name, file in opened.items()}
                [ref] = [ref for ref in found.manifest.artifacts if ref.name == ARTIFACT]
                unpack_files(files[ref.digest.hex].path, self.folder)

        with self.clock.step("restore"):
            found = self.store.open_found(search, unpack)
            if found is None:
                return None
            self._compile()
            kept = tuple(name for name, part in found.manifest.parts.items() if part["status"] == "frozen")
            if missing := [name for name in kept if name not in self.compiled]:
                raise CorruptEntryError(
                    f"The entry {found.key.short} has {', '.join(missing)}, which {type(self.pipe).__name__} lacks.",
                    found.vault.layout.manifest_file(found.key),
                )
            self.backend.load(self.compiled, self.folder, kept)
        if is_hit:
            self.store.count_hit(found)
        parts, tier = plan_outcomes(found.manifest), self.store.tier_of([found.key])
        return self.store.outcome("hit", parts, key=found.key, manifest=found.manifest.manifest_digest, tier=tier)

    def _compile(self) -> None:
        """Put compiled parts into the pipeline. Those of an earlier shape stay."""
        if self.compiled:
            return
        for name, part in self.backend.compile(self.eager).items():
            graph_parts.replace_part(self.pipe, self.eager[name], part)
            self.compiled[name] = part

    def _compiled(self, key: Key, miss: Miss, shape: CallShape) -> Outcome:
        started_s = time.perf_counter()
        self.undo()
        with self.clock.step("capture"):
            expected = run_whole(self.pipe, shape)
        self._compile()
        with self.clock.step("compile"), _calls_of(self.compiled) as called:
            output = run_whole(self.pipe, shape)
        with self.clock.step("check"):
            check = compare_outputs(expected, output, pipeline_tolerance(self.eager.values()))
        if not check.passed:
            raise NothingFrozenError(
                f"What {self.backend.name} compiled does not draw what the eager {type(self.pipe).__name__} does: "
                f"{check.failure}. Nothing was stored."
            )
        if not called:
            raise NothingFrozenError(
                f"The call runs no part of {type(self.pipe).__name__}, so there is nothing to keep."
            )
        statuses: dict[str, Any] = {
            name: {"status": "frozen" if name in called else "not called", "reason": "", "graphs": []}
            for name in self.names
        }
        info = {
            "compile_s": round(time.perf_counter() - started_s, 3),
            "check": {"distance": check.distance, "tolerance": check.tolerance},
            **made_here(),
        }
        self.store.count("compiled", key.digest, seconds=info["compile_s"])
        self.store.count("miss", key.digest, reason=miss.word)
        problem, published = "", None
        try:
            with self.clock.step("publish"):
                published = self._publish(key, statuses, info)
        except VaultError as error:
            problem = f"not stored: {error}"
            self.store.tell(problem)
        self.backend.new_compilations()  # they are accounted for
        if published is not None:
            if not self.backend.takes_many_shapes:  # this process runs what every other one will load
                self.undo()
            if self._restored(self.store.search(key.digest), is_hit=False) is None:
                raise CorruptEntryError(
                    f"The entry {key.digest.short} was published and cannot be read.",
                    self.access.vault.layout.manifest_file(key.digest),
                )
        return self.store.outcome(
            "miss",
            {name: PartOutcome(part["status"]) for name, part in sorted(statuses.items())},
            key=key.digest,
            reason="; ".join(text for text in (miss.reason, problem) if text),
            stored=published is not None,
            manifest=None if published is None else published.manifest_digest,
        )

    def _publish(self, key: Key, parts: Mapping[str, Any], info: Mapping[str, Any]) -> Manifest:
        with scratch_folder("onediff") as folder:
            (folder / "files").mkdir()
            archive = folder / ARTIFACT
            pack_files(self.backend.collect(self.compiled, folder / "files"), archive)
            digest = digest_file(archive)
            ref = ArtifactRef(digest, archive.stat().st_size, ARTIFACT)
            published = self.access.vault.publish(Manifest(key, parts, (ref,), info, now_utc()), {digest: archive})
        self.store.count("published", key.digest, bytes=published.size_bytes)
        return published

    def undo(self) -> None:
        """Put the eager parts back."""
        for name, part in self.compiled.items():
            graph_parts.replace_part(self.pipe, part, self.eager[name])
        self.compiled.clear()

    def finish(self, result: Outcome, asked: Sequence[AskedShape], parts: Sequence[str] | None) -> None:
        """Make the pipeline a loaded one."""
        watched = {} if self.backend.takes_many_shapes else {n: WatchedModule(m) for n, m in self.eager.items()}
        state = OnediffState(
            outcome=result,
            owner=weakref.ref(self.pipe),
            names=self.names,
            level=self.access.settings.level,
            load=self.access.described(self.pipe, self.eager, asked, parts),
            leases=HeldLeases(self.store.leases),
            default_size=next((shape.size for shape in asked if shape.size), {}),
            turn_timeout_s=self.access.settings.turn_timeout_s,
            parts={name: (self.eager[name], part) for name, part in self.compiled.items()},
            watched=watched,
            new_compilations=self.backend.new_compilations,
        )
        attach_state(self.pipe, state)


@contextmanager
def _calls_of(parts: Mapping[str, nn.Module]) -> Iterator[set[str]]:
    """Collect the names of the parts that are called inside."""
    called: set[str] = set()

    def note(name: str, *arguments: Any) -> None:
        called.add(name)

    handles = [part.register_forward_pre_hook(partial(note, name)) for name, part in parts.items()]
    try:
        yield called
    finally:
        for handle in handles:
            handle.remove()
