"""The shelf of a part in the vaults: its graphs are found by listing a folder, verified when opened, published when
frozen.

The manifest of a graph has one part, named by the class of the module, with one graph. That of a call that cannot be
frozen has the reason in its place and no artifacts; its factors include the versions for which it holds.
"""

from __future__ import annotations

import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from pipevault.cache.keys import PartIdentity, made_here
from pipevault.cache.search import SLOW, Store
from pipevault.compat.pytorch import forget_vector_isa
from pipevault.digest import Digest
from pipevault.errors import CorruptEntryError, InterruptedBuildError, VaultError, WrongMachineError
from pipevault.files.opened import OpenedFile
from pipevault.files.scratch import kept_scratch_folder
from pipevault.fingerprint.machine import check_package_machine
from pipevault.graphs.freezing import CallTimes, FrozenCall
from pipevault.graphs.frozen import GraphDocument
from pipevault.graphs.library import GraphFiles
from pipevault.graphs.signature import CallSignature
from pipevault.graphs.table import ShelfItem
from pipevault.key import Key
from pipevault.store.manifest import ArtifactRef, Manifest, now_utc
from pipevault.store.tiers import TierHit


class VaultShelf:
    """The graphs of the part with ``identity`` on ``device``, in the tiers of ``store``."""

    def __init__(self, store: Store, part: str, identity: PartIdentity, device: torch.device) -> None:
        self.store = store
        self.part = part
        self.of = identity
        self.device = device
        self._shelf = identity.shelf
        self.identity = self._shelf.hex
        self._read: dict[Digest, ShelfItem | None] = {}
        self._frozen_here: set[Digest] = set()
        self._unopened: dict[Digest, TierHit] = {}
        """The entries that were read and not opened yet."""

    def news(self, known: Collection[str]) -> Iterator[ShelfItem]:
        keys, problems = self.store.tiers.shelf(self._shelf)
        for problem in problems:
            self.store.tell(problem)
        for key in keys:
            if key.hex in known:
                continue
            if key not in self._read:
                self._read[key] = self._look(key)
            if (kept := self._read[key]) is not None:
                yield kept

    def _look(self, key: Digest) -> ShelfItem | None:
        search = self.store.search(key)
        found = next(search.entries(), None)
        if found is None:
            for reason in search.reasons:
                start = "".join(reason.partition(SLOW)[:2])  # how long it is left out for differs
                if not any(start in problem for problem in self.store.problems):  # told with the name of its tier
                    self.store.tell(reason)
            return None
        kept = self._kept(found)
        if kept is not None:
            self.store.origins[key] = found.tier.dir
        return kept

    def forget(self, key: str) -> None:
        self._read.pop(Digest(key), None)
        self._unopened.pop(Digest(key), None)

    @contextmanager
    def freezing(self, signature: CallSignature) -> Iterator[None]:
        self.store.require_writable(f"{self.part} ({signature})")
        with self.store.locked(self.of.graph_key(signature).digest):
            yield

    def keep(self, frozen: FrozenCall, seconds: float) -> ShelfItem:
        """Publish a graph. Raises :class:`InterruptedBuildError` for one that was compiled for another machine: where
        the compiler fails while Inductor probes the CPU, it takes the CPU for one without vector instructions.
        """
        document = frozen.document
        if mismatch := check_package_machine(document.machine, self.device):
            forget_vector_isa()
            raise InterruptedBuildError(
                f"{self.part} was compiled for another machine: {mismatch}. The C++ compiler must have failed for a "
                "moment. Try again; nothing was stored."
            )
        files = {Digest(digest): path for digest, path in frozen.paths.items()}
        artifacts = [
            ArtifactRef(Digest(digest), frozen.paths[digest].stat().st_size, name)
            for name, digest in document.files.items()
        ]
        constants = {".".join(map(str, steps)): sha256 for _, steps, sha256 in document.origins}
        key = self.of.graph_key(document.signature, constants)
        part = {"status": "frozen", "reason": "", "graphs": [document.to_json()]}
        self.store.count("compiled", key.digest, seconds=round(seconds, 3))
        try:
            return self._publish(key, part, artifacts, files, {"compile_s": round(seconds, 3), **_times(frozen.times)})
        except VaultError as error:
            self.store.tell(f"{self.part} was frozen and not stored: {error}")
            return self._in_memory(key, frozen)

    def refuse(self, signature: CallSignature, reason: str) -> ShelfItem:
        key = self.of.graph_key(signature)
        part = {"status": "eager", "reason": reason, "graphs": []}
        try:
            return self._publish(key, part)
        except VaultError as error:
            self.store.tell(f"why {self.part} cannot be frozen was not stored: {error}")
            return ShelfItem(signature, key.digest.hex, refusal=reason)

    def _publish(
        self,
        key: Key,
        part: Mapping[str, Any],
        artifacts: Sequence[ArtifactRef] = (),
        files: Mapping[Digest, Path] | None = None,
        info: Mapping[str, Any] | None = None,
    ) -> ShelfItem:
        details = {
            **(info or {}),
            "signature_text": str(CallSignature.from_json(key.factors["signature"])),
            **made_here(),
        }
        manifest = Manifest(key, {self.of.architecture.class_name: part}, tuple(artifacts), details, now_utc())
        published = self.store.tiers.publish(manifest, files or {})
        self._frozen_here.add(key.digest)
        self.store.count("published", key.digest, bytes=published.manifest.size_bytes)
        kept = self._kept(published)
        if kept is None:
            raise CorruptEntryError(f"The entry {key.digest.short} was published and cannot be read.", published.path)
        self._read[key.digest] = kept
        self.store.limit_size(published)
        return kept

    def _kept(self, found: TierHit) -> ShelfItem | None:
        """Read an entry of this shelf; ``None`` if it is another part's (its folder shares 64 bits only)."""
        manifest, key = found.manifest, found.manifest.key
        if key.shelf != self._shelf:
            return None
        [part] = manifest.parts.values()
        signature = CallSignature.from_json(key.factors["signature"])
        if part["status"] != "frozen":
            return ShelfItem(signature, key.digest.hex, refusal=part["reason"])
        document = _document(manifest)
        self._unopened[key.digest] = found
        times = _read_times(manifest.info)
        return ShelfItem(signature, key.digest.hex, document, lambda: self._files(key.digest, document), times=times)

    def _files(self, key: Digest, document: GraphDocument) -> GraphFiles:
        opened: dict[str, OpenedFile] = {}
        search = self.store.search(key, known=self._unopened.pop(key, None))

        def check(found: TierHit) -> None:
            if mismatch := check_package_machine(document.machine, self.device):
                library = found.vault.layout.artifact_file(Digest(document.library))
                raise WrongMachineError(f"{library}, a graph of {self.part}, is for another machine: {mismatch}.")
            if not search.knows(found) and _document(found.manifest) != document:
                raise VaultError(f"the graph {key.short} was frozen again meanwhile", found.vault.root)
            opened.update(self.store.tiers.open_artifacts(found))

        found = self.store.open_found(search, check)
        if found is None:
            reasons = "; ".join(search.reasons) or "it is gone"
            raise CorruptEntryError(
                f"The graph {key.short} of {self.part} cannot be used: {reasons}", self.store.settings.dir
            )
        if key in self._frozen_here:
            self._frozen_here.discard(key)
        else:
            self.store.count_hit(found)
        return document.open_files(lambda name, digest: opened[digest])

    def _in_memory(self, key: Key, frozen: FrozenCall) -> ShelfItem:
        folder = kept_scratch_folder()
        paths = {digest: Path(shutil.copy2(path, folder)) for digest, path in frozen.paths.items()}
        kept = replace(frozen, paths=paths)
        return ShelfItem(frozen.document.signature, key.digest.hex, frozen.document, kept.open)


def _document(manifest: Manifest) -> GraphDocument:
    [part] = manifest.parts.values()
    return GraphDocument.from_json(part["graphs"][0])


def _times(times: CallTimes | None) -> dict[str, float]:
    return {} if times is None else {"eager_s": round(times.eager_s, 6), "frozen_s": round(times.frozen_s, 6)}


def _read_times(info: Mapping[str, Any]) -> CallTimes | None:
    eager_s, frozen_s = info.get("eager_s"), info.get("frozen_s")
    is_noted = isinstance(eager_s, (int, float)) and isinstance(frozen_s, (int, float))
    return CallTimes(float(eager_s), float(frozen_s)) if is_noted else None  # type: ignore[arg-type]
