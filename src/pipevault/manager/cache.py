"""``PipelineCache``: load a pipeline's compiled graphs from the vault, compiling and publishing on a miss."""

from __future__ import annotations

import logging
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from torch import nn

from pipevault.determinism.levels import level as at_level
from pipevault.determinism.levels import parse_level
from pipevault.digest import Digest
from pipevault.errors import (
    CompilerMissingError,
    CorruptEntryError,
    MissError,
    SettingsError,
    VaultError,
    VaultNotWritableError,
    WrongMachineError,
)
from pipevault.fingerprint.machine import check_package_machine
from pipevault.fingerprint.model import architecture
from pipevault.graphs import parts as graph_parts
from pipevault.graphs.inductor import BuildOptions
from pipevault.graphs.state import PartOptions
from pipevault.key import Key
from pipevault.manager.call import CallShape, resolve_shape
from pipevault.manager.keys import build_key, execution_device, module_dtype, part_identity
from pipevault.manager.lookup import Miss, look_up, open_vault
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
from pipevault.settings import Settings
from pipevault.store.manifest import Manifest
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
        level: str | None = None,
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
            level=level,
        )
        self.build = BuildOptions(self.settings.weights, dict(build_config or {}))
        self._progress = progress
        self._vault: Vault | None = None

    @property
    def vault(self) -> Vault:
        """Opened on first use, and made if need be. Raises the :class:`~pipevault.errors.VaultError` that fits."""
        if self._vault is None:
            self._vault = Vault.open(self.settings.dir, create=self.settings.mode == "compile")
        return self._vault

    def _existing_vault(self, *, create: bool) -> Vault | None:
        if self._vault is None:
            self._vault = open_vault(self.settings.dir, create=create)
        return self._vault

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
        wanted = asked = _shapes(height, width, num_frames, batch_size, guidance, call, shapes)
        if self.settings.mode != "off":
            wanted = [resolve_shape(pipe, self._per_sample(shape)) for shape in asked]
        names = tuple(graph_parts.find_parts(pipe, parts))
        release_class(pipe)
        graph_parts.detach(pipe, tuple(graph_parts.frozen_parts(pipe)))
        if self.settings.mode == "off":
            attach_state(pipe, Outcome("off", reason="mode is off"), {}, level=self.settings.level)
            return pipe
        outcomes: list[Outcome] = []
        loaded: list[Manifest] = []
        with at_level(self.settings.level):
            for shape in wanted:
                outcomes.append(self._load_shape(pipe, names, shape, loaded))
        result = combine(tuple(outcomes))
        load = self._load_described(pipe, asked, parts)
        attach_state(pipe, result, self._digests(pipe, loaded, result), level=self.settings.level, load=load)
        return pipe

    def key(self, pipe: Any, *, parts: Sequence[str] | None = None, **shape: Any) -> Key:
        """The key under which :meth:`load` looks. ``shape`` takes the arguments of :meth:`load`."""
        return self._key(
            pipe, tuple(graph_parts.find_parts(pipe, parts)), resolve_shape(pipe, self._per_sample(CallShape(**shape)))
        )

    def explain(self, pipe: Any, *, parts: Sequence[str] | None = None, **shape: Any) -> Explanation:
        """What :meth:`load` would do with these arguments, without doing it."""
        key = self.key(pipe, parts=parts, **shape)
        found = look_up(self._existing_vault(create=False), self.settings.dir, key)
        if isinstance(found, Miss):
            return Explanation(key, "miss", found.reason, found.nearest, found.differences)
        return Explanation(key, "hit", f"entry {key.digest.short} is in the vault")

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

    def _digests(self, pipe: Any, loaded: Sequence[Manifest], result: Outcome) -> dict[str, str]:
        """The architecture digest of each frozen part, from the key of an entry that has it."""
        frozen = [name for name, part in result.parts.items() if part.status == "frozen"]
        if all(entry.status == "hit" for entry in result.entries or (result,)):
            factors = loaded[-1].key.factors["architecture"]
        else:  # eager code ran here, and may have filled caches that belong to the architecture
            factors = {name: architecture(graph_parts.get_part(pipe, name)) for name in frozen}
        return {name: factors[name]["digest"] for name in frozen}

    def _key(self, pipe: Any, names: Sequence[str], shape: CallShape) -> Key:
        modules = {name: graph_parts.get_part(pipe, name) for name in names}
        with at_level(self.settings.level):
            return build_key(pipe, modules, shape, backend=self.settings.backend, build=self.build)

    def _load_shape(self, pipe: Any, names: Sequence[str], shape: CallShape, loaded: list[Manifest]) -> Outcome:
        clock = Clock(self._progress)
        with clock.step("fingerprint"):
            key = self._key(pipe, names, shape)
        with clock.step("lookup"):
            found = self._look_up(key)
        if isinstance(found, Manifest):
            try:
                return self._open_entry(pipe, found, loaded, clock)
            except (CorruptEntryError, WrongMachineError) as error:
                self._quarantine(error, key)
                found = Miss(str(error))
        if self.settings.mode == "require":
            raise MissError(self._miss_message(pipe, key, found, shape), key.digest.hex, found.reason)
        return self._compile(pipe, names, shape, key, found, loaded, clock)

    def _look_up(self, key: Key) -> Manifest | Miss:
        found = look_up(self._existing_vault(create=self.settings.mode == "compile"), self.settings.dir, key)
        if isinstance(found, Miss) and found.damage:
            self._quarantine(found.damage, key)
        return found

    def _quarantine(self, error: Exception, key: Key) -> None:
        """Set aside what is damaged; a document that onediffx could not read stands in the manifest."""
        if isinstance(error, CorruptEntryError) and self.settings.mode == "compile":
            inside = error.path.is_relative_to(self.vault.root)
            self.vault.quarantine(error.path if inside else self.vault.layout.manifest_file(key.digest), str(error))

    def _open_entry(self, pipe: Any, manifest: Manifest, loaded: list[Manifest], clock: Clock) -> Outcome:
        """Verify and load an entry beside those that are loaded already."""
        graphs = {name: part["graphs"] for name, part in manifest.parts.items() if part["graphs"]}
        with clock.step("verify"):
            paths = {ref.digest.hex: self.vault.verified_path(ref) for ref in manifest.artifacts}
            self._check_machine(pipe, graphs)
        with clock.step("load"), tempfile.TemporaryDirectory(prefix="pipevault-") as folder:
            options = self._options(manifest.key, lambda digest: paths[digest])
            graph_parts.attach(pipe, tuple(graphs), options)
            try:
                graph_parts.load(pipe, Path(folder), graphs)
            except BaseException:  # whatever it was goes on; the pipeline must not keep half-loaded parts
                graph_parts.detach(pipe, tuple(graphs))
                raise
        loaded.append(manifest)
        parts = part_outcomes(manifest.parts)
        eager = [f"{name}: {part.reason}" for name, part in parts.items() if part.status == "eager"]
        return Outcome(
            status="partial" if eager else "hit",
            key=manifest.key.digest,
            reason="; ".join(eager),
            parts=parts,
            seconds=clock.seconds,
            stored=True,
            manifest=manifest.manifest_digest,
        )

    def _check_machine(self, pipe: Any, graphs: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
        """Native code of another instruction set must be refused before it is opened (pytorch #153697)."""
        device = execution_device(pipe, {name: graph_parts.get_part(pipe, name) for name in graphs})
        for name, documents in graphs.items():
            for document in documents:
                if mismatch := check_package_machine(document["machine"], device):
                    package = self.vault.layout.artifact_file(Digest(document["package"]))
                    raise WrongMachineError(f"{package}, a graph of {name}, is for another machine: {mismatch}.")

    def _options(self, key: Key, artifact_path: Callable[[str], Path] | None) -> PartOptions:
        def verify(name: str, module: nn.Module) -> str:
            frozen = key.factors["architecture"][name]["digest"]
            return "" if architecture(module)["digest"] == frozen else "its sub-modules are not those that were frozen"

        return PartOptions(
            mode="frozen",
            on_unfrozen=self.settings.on_unfrozen,
            build=self.build,
            artifact_path=artifact_path,
            verify=verify,
            freeze_hint=(
                "Freeze such calls too, with PipelineCache.load(pipe, shapes=[...]) in mode 'compile' or with "
                "`pipevault prewarm`"
            ),
        )

    def _compile(
        self,
        pipe: Any,
        names: Sequence[str],
        shape: CallShape,
        key: Key,
        miss: Miss,
        loaded: list[Manifest],
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
        with _FREEZING, self.vault.lock(key.digest, timeout_s=self.settings.lock_timeout_s, on_wait=waiting):
            found = self._look_up(key)
            if isinstance(found, Manifest):
                try:
                    return self._open_entry(pipe, found, loaded, clock)
                except CorruptEntryError as error:
                    self._quarantine(error, key)
            return self._freeze_and_publish(pipe, names, shape, key, miss, loaded, clock)

    def _freeze_and_publish(
        self,
        pipe: Any,
        names: Sequence[str],
        shape: CallShape,
        key: Key,
        miss: Miss,
        loaded: list[Manifest],
        clock: Clock,
    ) -> Outcome:
        # Imported here because a hit needs none of it.
        from pipevault.manager.freeze import freeze_pipeline
        from pipevault.manager.publish import make_manifest, reusable_graphs

        graph_parts.detach(pipe, names)
        with tempfile.TemporaryDirectory(prefix="pipevault-freeze-") as scratch:
            folder = Path(scratch)
            frozen = freeze_pipeline(
                pipe,
                names,
                shape,
                options=self._options(key, None),
                identities={name: part_identity(key, name) for name in names},
                folder=folder,
                clock=clock,
                reuse=reusable_graphs(self.vault),
            )
            manifest, files = make_manifest(key, frozen, folder)
            try:
                with clock.step("publish"):
                    manifest = self.vault.publish(manifest, files)
            except VaultError as error:
                return self._unstored(pipe, key, frozen, miss, error, loaded, clock)
        # The process that compiled must run what every other process runs: the published entry.
        graph_parts.detach(pipe, names)
        for entry in tuple(loaded):
            self._reopen(pipe, entry)
        hit = self._open_entry(pipe, manifest, loaded, clock)
        reason = "; ".join(text for text in (miss.reason, hit.reason) if text)
        return replace(hit, status="partial" if hit.status == "partial" else "miss", reason=reason)

    def _reopen(self, pipe: Any, manifest: Manifest) -> None:
        self._open_entry(pipe, manifest, [], Clock(None))

    def _unstored(
        self,
        pipe: Any,
        key: Key,
        frozen: Frozen,
        miss: Miss,
        error: Exception,
        loaded: list[Manifest],
        clock: Clock,
    ) -> Outcome:
        """Publishing failed: the graphs in memory were checked, so the pipeline runs on them all the same."""
        for entry in loaded:
            self._reopen(pipe, entry)
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

    def _miss_message(self, pipe: Any, key: Key, miss: Miss, shape: CallShape) -> str:
        from pipevault.manager.advice import freeze_command

        command = freeze_command(pipe, shape, weights=self.settings.weights, dir=self.settings.dir)
        return (
            f"The vault {self.settings.dir} holds no usable entry for {type(pipe).__name__} (key {key.digest.short}): "
            f"{miss.reason}. To freeze it, {command}; or use mode 'compile'."
        )


def _shapes(
    height: int | None,
    width: int | None,
    num_frames: int | None,
    batch_size: int,
    guidance: bool | None,
    call: Mapping[str, Any] | Callable[[Any], Any] | None,
    shapes: Sequence[Mapping[str, Any]] | None,
) -> list[CallShape]:
    base = CallShape(height, width, num_frames, batch_size, guidance, call)
    if shapes is None:
        return [base]
    if not shapes:
        raise SettingsError("shapes is empty: give at least one mapping such as {'height': 512, 'width': 512}.")
    try:
        return [replace(base, **shape) for shape in shapes]
    except TypeError as error:
        raise SettingsError(
            f"shapes takes mappings with height, width, num_frames, batch_size, guidance, call: {error}."
        ) from error
