"""``PipelineCache``: load a pipeline's compiled graphs from the vault, compiling and publishing on a miss."""

from __future__ import annotations

import logging
import os
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pipevault.determinism.levels import level as at_level
from pipevault.determinism.levels import parse_level
from pipevault.digest import Digest
from pipevault.errors import (
    CompilerMissingError,
    LockTimeoutError,
    MissError,
    SignatureError,
    VaultError,
    VaultNotWritableError,
)
from pipevault.fingerprint.model import architecture
from pipevault.graphs import parts as graph_parts
from pipevault.graphs.inductor import BuildOptions
from pipevault.key import Key
from pipevault.manager.call import CallShape, resolve_shape
from pipevault.manager.call_shapes import call_shapes
from pipevault.manager.entries import Entries, Held, release
from pipevault.manager.keys import build_key, execution_device, module_dtype, part_identity
from pipevault.manager.leases import HeldLeases
from pipevault.manager.lookup import Miss, Search, open_vault
from pipevault.manager.outcome import (
    Clock,
    Explanation,
    Outcome,
    Progress,
    Step,
    combine,
    part_outcomes,
)
from pipevault.manager.pipeline import attach_state, release_class
from pipevault.settings import Settings, Tier
from pipevault.store.liveness import scratch_prefix
from pipevault.store.manifest import Manifest
from pipevault.store.tiers import Found, Tiers
from pipevault.store.vault import Vault

if TYPE_CHECKING:
    from pipevault.manager.freeze import Frozen

Pipeline = TypeVar("Pipeline")

logger = logging.getLogger("pipevault")

# Export and compile patch torch's global state, so that a process freezes one pipeline at a time.
_FREEZING = threading.Lock()


class PipelineCache:
    """A vault and how to use it. Arguments left out follow :class:`pipevault.settings.Settings`.

    ``build_config`` overrides fields of ``torch._inductor.config`` for compiling; it is part of the key.
    ``progress`` is called with a :class:`~pipevault.manager.outcome.Step` whenever one begins or ends.
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
        level: str | None = None,
        tiers: Sequence[str | Path | Tier | Mapping[str, Any]] | None = None,
        tier_timeout_s: float | None = None,
        max_size: int | str | None = None,
        signature: str | None = None,
        trusted_keys: Sequence[str | Path] | None = None,
        allow_group_write: bool | None = None,
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
            level=level,
            tiers=tiers,
            tier_timeout_s=tier_timeout_s,
            max_size=max_size,
            signature=signature,
            trusted_keys=trusted_keys,
            allow_group_write=allow_group_write,
        )
        self.build = BuildOptions(self.settings.weights, dict(build_config or {}))
        self._progress = progress
        self._vault: Vault | None = None
        self._tiers = Tiers(self.settings, self._own_vault)
        self._entries = Entries(self._tiers, self.build)

    @property
    def vault(self) -> Vault:
        """Of ``settings.dir``, made if need be. Raises the :class:`~pipevault.errors.VaultError` that fits."""
        if (vault := self._own_vault(self.settings.mode == "compile")) is not None:
            return vault
        return Vault.open(self.settings.dir, create=False)

    def _own_vault(self, create: bool) -> Vault | None:
        if self._vault is not None and not os.path.exists(self._vault.layout.vault_file):
            self._vault = None  # the folder was deleted; what is published there must be a vault again
        if self._vault is None:
            self._vault = open_vault(
                self.settings.dir, create=create, allow_group_write=self.settings.allow_group_write
            )
        return self._vault

    def find_entry(self, key: Digest) -> Manifest | None:
        """The manifest of ``key`` in the first tier that has a usable one."""
        found = self._tiers.lookup(key)
        return None if found is None else found.manifest

    def load(
        self,
        pipe: Pipeline,
        *,
        height: int | None = None,
        width: int | None = None,
        num_frames: int | None = None,
        batch_size: int = 1,
        guidance: bool | None = None,
        call: Mapping[str, Any] | Callable[[Any], Any] | None = None,
        shapes: Sequence[Mapping[str, Any]] | None = None,
        parts: Sequence[str] | None = None,
    ) -> Pipeline:
        """Give ``pipe`` the frozen graphs for a call of this shape, and return it.

        ``shapes`` freezes several, an entry each: a list of mappings with the arguments before it. ``parts`` names
        the parts to freeze; by default all that the call uses. What happened: :func:`pipevault.outcome`.

        Raises :class:`~pipevault.errors.MissError` in mode ``require``, :class:`~pipevault.errors.CannotFreezeError`
        and its subclasses, :class:`~pipevault.errors.BadCallError`, :class:`~pipevault.errors.VaultError`.
        """
        wanted = asked = call_shapes(height, width, num_frames, batch_size, guidance, call, shapes)
        if self.settings.mode != "off":
            wanted = [resolve_shape(pipe, self._per_sample(shape)) for shape in asked]
        names = tuple(graph_parts.find_parts(pipe, parts))
        release_class(pipe)
        graph_parts.detach(pipe, tuple(graph_parts.frozen_parts(pipe)))
        if self.settings.mode == "off":
            attach_state(pipe, Outcome("off", reason="mode is off"), {}, level=self.settings.level)
            return pipe
        outcomes: list[Outcome] = []
        loaded: list[Held] = []
        try:
            with at_level(self.settings.level):
                for shape in wanted:
                    outcomes.append(self._load_shape(pipe, names, shape, loaded))
            result = combine(tuple(outcomes))
            load = self._load_described(pipe, asked, parts)
            digests = self._digests(pipe, loaded, result)
        except BaseException:  # whatever it was goes on; a pipeline that was not loaded keeps no entry
            release(loaded)
            raise
        leases = HeldLeases([held.lease for held in loaded])
        attach_state(pipe, result, digests, level=self.settings.level, load=load, leases=leases)
        return pipe

    def key(self, pipe: Any, *, parts: Sequence[str] | None = None, **shape: Any) -> Key:
        """The key under which :meth:`load` looks. ``shape`` takes the arguments of :meth:`load`."""
        return self._key(
            pipe, tuple(graph_parts.find_parts(pipe, parts)), resolve_shape(pipe, self._per_sample(CallShape(**shape)))
        )

    def explain(self, pipe: Any, *, parts: Sequence[str] | None = None, **shape: Any) -> Explanation:
        """What :meth:`load` would do with these arguments, without doing it."""
        key = self.key(pipe, parts=parts, **shape)
        search = Search(self._tiers, key, mend=False)
        found = next(search.entries(), None)
        if found is None:
            miss = search.miss()
            problems = tuple(search.problems)
            return Explanation(key, "miss", miss.reason, miss.nearest, miss.differences, problems=problems)
        where = "the vault" if len(self._tiers.order) == 1 else f"tier {found.tier.dir}"
        return Explanation(
            key,
            "hit",
            f"entry {key.digest.short} is in {where}",
            parts=part_outcomes(found.manifest.parts),
            tier=str(found.tier.dir),
            problems=tuple(search.problems),
        )

    def _load_described(self, pipe: Any, shapes: Sequence[CallShape], parts: Sequence[str] | None) -> dict[str, Any]:
        """What a record must tell so that the same load can be done again."""
        modules = graph_parts.find_parts(pipe)
        return {
            "shapes": [shape.to_json() for shape in shapes],
            "parts": None if parts is None else list(parts),
            "backend": self.settings.backend,
            "weights": self.settings.weights,
            "build_config": dict(self.build.config),
            "device": str(execution_device(pipe, modules)),
            "dtype": {name: module_dtype(module) for name, module in modules.items()},
        }

    def _per_sample(self, shape: CallShape) -> CallShape:
        """At level ``invariant`` each sample runs on its own, so graphs for one sample serve every batch."""
        per_sample = parse_level(self.settings.level).name == "invariant"
        return replace(shape, batch_size=1) if per_sample else shape

    def _digests(self, pipe: Any, loaded: Sequence[Held], result: Outcome) -> dict[str, str]:
        """The architecture digest of each frozen part, from the key of an entry that has it."""
        frozen = [name for name, part in result.parts.items() if part.status == "frozen"]
        if all(entry.status == "hit" for entry in result.entries or (result,)):
            factors = loaded[-1].found.manifest.key.factors["architecture"]
        else:  # eager code ran here, and may have filled caches that belong to the architecture
            factors = {name: architecture(graph_parts.get_part(pipe, name)) for name in frozen}
        return {name: factors[name]["digest"] for name in frozen}

    def _key(self, pipe: Any, names: Sequence[str], shape: CallShape) -> Key:
        modules = {name: graph_parts.get_part(pipe, name) for name in names}
        with at_level(self.settings.level):
            return build_key(pipe, modules, shape, backend=self.settings.backend, build=self.build)

    def _load_shape(self, pipe: Any, names: Sequence[str], shape: CallShape, loaded: list[Held]) -> Outcome:
        clock = Clock(self._progress)
        with clock.step("fingerprint"):
            key = self._key(pipe, names, shape)
        search = self._search(key)
        outcome = self._entries.load_first(pipe, search, loaded, clock)
        if outcome is not None:
            return outcome
        with clock.step("lookup"):
            miss = search.miss()
        self._entries.count("miss", key.digest, reason=miss.word)
        if self.settings.mode == "require":
            if search.unsigned is not None:
                raise search.unsigned
            message = self._miss_message(pipe, key, miss, shape, search.problems)
            raise MissError(message, key.digest.hex, miss.reason)
        if self._tiers.policy(self._tiers.own_tier) == "require":
            raise SignatureError(
                f"{self.settings.dir} has no entry for this pipeline ({miss.reason}), and one that is frozen now would "
                "lack the signature that is required there. Freeze it with signature 'off', then sign it: `pipevault "
                "sign`.",
                self.settings.dir,
            )
        outcome = self._compile(pipe, names, shape, key, miss, loaded, clock)
        return replace(outcome, problems=tuple(dict.fromkeys([*search.problems, *outcome.problems])))

    def _search(self, key: Key) -> Search:
        return Search(self._tiers, key, mend=self.settings.mode == "compile")

    def _compile(
        self,
        pipe: Any,
        names: Sequence[str],
        shape: CallShape,
        key: Key,
        miss: Miss,
        loaded: list[Held],
        clock: Clock,
    ) -> Outcome:
        if not self.vault.writable:
            raise VaultNotWritableError(
                f"{self.vault.root} has no entry for this pipeline and cannot be written. Mend its permissions, give "
                "another folder, or use mode 'off'.",
                self.vault.root,
            )
        from pipevault.fingerprint.toolchain import find_cxx_compiler

        if find_cxx_compiler() is None:
            raise CompilerMissingError(
                "No C++ compiler was found. Install g++ or set CXX; or load what another machine of the same type "
                "froze with mode='require'."
            )
        waiting = lambda detail: clock.report(Step("", "wait", None, detail))  # noqa: E731
        if self._progress is None:
            logger.warning("freezing %s, which takes minutes: %s", type(pipe).__name__, miss.reason)
        with _FREEZING, ExitStack() as stack:
            try:
                stack.enter_context(
                    self.vault.lock(key.digest, timeout_s=self.settings.lock_timeout_s, on_wait=waiting)
                )
            except LockTimeoutError as error:
                if self.settings.on_lock_timeout != "compile":
                    raise
                logger.warning("%s Freezing it here too, as on_lock_timeout is 'compile'.", error)
            outcome = self._entries.load_first(pipe, self._search(key), loaded, clock)
            if outcome is not None:
                return outcome
            return self._freeze_and_publish(pipe, names, shape, key, miss, loaded, clock)

    def _freeze_and_publish(
        self,
        pipe: Any,
        names: Sequence[str],
        shape: CallShape,
        key: Key,
        miss: Miss,
        loaded: list[Held],
        clock: Clock,
    ) -> Outcome:
        # Imported here because a hit needs none of it.
        from pipevault.manager.freeze import freeze_pipeline
        from pipevault.manager.publish import make_manifest, reusable_graphs

        graph_parts.detach(pipe, names)
        with tempfile.TemporaryDirectory(prefix=scratch_prefix("freeze")) as scratch:
            folder = Path(scratch)
            started_s = time.perf_counter()
            frozen = freeze_pipeline(
                pipe,
                names,
                shape,
                options=self._entries.options(key, None),
                identities={name: part_identity(key, name) for name in names},
                folder=folder,
                clock=clock,
                reuse=reusable_graphs(self.vault),
            )
            compile_s = round(time.perf_counter() - started_s, 3)
            manifest, files = make_manifest(key, frozen, folder)
            manifest = replace(manifest, info={**manifest.info, "compile_s": compile_s})
            self._entries.count("compiled", key.digest, seconds=compile_s)
            try:
                with clock.step("publish"):
                    manifest = self.vault.publish(manifest, files)
            except VaultError as error:
                return self._unstored(pipe, key, frozen, miss, error, loaded, clock)
        self._entries.count("published", key.digest, bytes=manifest.size_bytes)
        if miss.word == "damaged":
            self._entries.count("rebuilt", key.digest)
        # The process that compiled must run what every other process runs: the published entry.
        graph_parts.detach(pipe, names)
        for held in tuple(loaded):
            self._entries.attach(pipe, held.found, Clock(None))
        tier = self._tiers.own_tier
        found = Found(self.vault, manifest, tier, tier)
        hit = self._entries.open(pipe, found, loaded, clock, is_use=False)
        problems: list[str] = []
        self._entries.limit_size(found, problems.append)
        reason = "; ".join(text for text in (miss.reason, hit.reason) if text)
        status = "partial" if hit.status == "partial" else "miss"
        return replace(hit, status=status, reason=reason, problems=tuple(problems))

    def _unstored(
        self,
        pipe: Any,
        key: Key,
        frozen: Frozen,
        miss: Miss,
        error: Exception,
        loaded: list[Held],
        clock: Clock,
    ) -> Outcome:
        """Publishing failed: the graphs in memory were checked, so the pipeline runs on them all the same."""
        for held in loaded:
            self._entries.attach(pipe, held.found, Clock(None))
        parts = frozen.outcomes()
        status = "partial" if any(part.status == "eager" for part in parts.values()) else "miss"
        return Outcome(
            status=status,
            key=key.digest,
            reason=f"{miss.reason}; not stored: {error}",
            parts=parts,
            seconds=clock.seconds,
            stored=False,
        )

    def _miss_message(self, pipe: Any, key: Key, miss: Miss, shape: CallShape, problems: Sequence[str]) -> str:
        from pipevault.manager.advice import freeze_command

        command = freeze_command(
            pipe, shape, weights=self.settings.weights, level=self.settings.level, dir=self.settings.dir
        )
        folders = ", ".join(str(tier.dir) for tier in self._tiers.order)
        where = f"The vault {folders} holds" if len(self._tiers.order) == 1 else f"The tiers {folders} hold"
        reason = miss.reason.rstrip(".")
        others = [problem.rstrip(".") for problem in problems if problem.partition(": ")[2].rstrip(".") not in reason]
        also = f" Also: {'; '.join(others)}." if others else ""
        return (
            f"{where} no usable entry for {type(pipe).__name__} (key {key.digest.short}): {reason}.{also} "
            f"To freeze it, {command}; or use mode 'compile'."
        )
