"""The shelf of a part in the vaults: its graphs are found by listing a folder, verified when opened, published when
frozen.

The manifest of a graph has one part, named by the class of the module, with one graph. That of a call that cannot be
frozen has the reason in its place and no artifacts; its factors include the versions for which it holds.
"""

from __future__ import annotations

import logging
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pipevault.cache.identity import graph_key
from pipevault.cache.search import Search
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
from pipevault.fingerprint.machine import check_package_machine, machine_record
from pipevault.fingerprint.toolchain import find_cxx_compiler, toolchain_record
from pipevault.graphs.freezing import Frozen
from pipevault.graphs.frozen import GraphDocument
from pipevault.graphs.inductor import GRAPH_FORMAT
from pipevault.graphs.signature import Signature
from pipevault.graphs.table import Files, Kept
from pipevault.key import Key
from pipevault.settings import Settings
from pipevault.store.liveness import scratch_prefix
from pipevault.store.manifest import ArtifactRef, Manifest, now_utc
from pipevault.store.tiers import Found, Tiers
from pipevault.store.vault import Vault

if TYPE_CHECKING:
    from pipevault.store.leases import Lease

logger = logging.getLogger("pipevault")


@dataclass
class Store:
    """What the shelves of one cache share: the tiers, the settings, and what is told of while they are used."""

    tiers: Tiers
    settings: Settings
    own: Callable[[], Vault]
    leases: list[Lease] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    wait: Callable[[str], None] = lambda text: None

    def tell(self, problem: str) -> None:
        if problem not in self.problems:
            self.problems.append(problem)
            logger.warning("%s", problem)

    def count(self, event: str, key: Digest | None = None, **numbers: Any) -> None:
        """Count in the vault of ``settings.dir``, if there is one."""
        if (vault := self.tiers.own()) is not None:
            from pipevault.store.stats import count

            count(vault.layout, event, key=key, **numbers)

    def require_writable(self, what: str) -> Vault:
        """The own vault, ready for new graphs. Raises what stands in the way of freezing ``what``."""
        vault = self.own()
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
        return vault

    def open_found(self, search: Search, check: Callable[[Found], None], *, is_use: bool = True) -> Found | None:
        """The first place from which the entry can be used: leased, its files verified. ``None`` if there is none."""
        for found in search.places():
            try:
                lease = self.tiers.hold(found, is_use=is_use)
                try:
                    check(found)
                except BaseException:  # whatever it was goes on; what was not loaded is not in use
                    lease.release()
                    raise
            except (VaultError, WrongMachineError) as error:
                search.refuse(found, error)
                continue
            self.leases.append(lease)
            if found.tier != found.origin:
                self.limit_size(found)
            return found
        for _ in range(search.quarantined):
            self.count("quarantined", search.key)
        for problem in search.problems:
            self.tell(problem)
        return None

    def limit_size(self, found: Found) -> None:
        """Keep ``max_size`` where ``found`` was written just now."""
        try:
            problems = self.tiers.limit_size(found)
        except VaultError as error:
            problems = (f"max_size could not be kept: {error}",)
        for problem in problems:
            self.tell(problem)


class VaultShelf:
    """The graphs of the part with ``factors`` on ``device``, in the tiers of ``store``."""

    def __init__(self, store: Store, part: str, factors: Mapping[str, Any], device: torch.device) -> None:
        self.store = store
        self.part = part
        self.factors = factors
        self.device = device
        self._shelf = graph_key(factors, Signature(()), {}).shelf
        self.identity = self._shelf.hex
        self._seen: set[Digest] = set()
        self._unstored: dict[str, Frozen] = {}

    def news(self) -> Iterator[Kept]:
        keys, problems = self.store.tiers.shelf(self._shelf)
        for problem in problems:
            self.store.tell(problem)
        for key in keys:
            if key in self._seen:
                continue
            self._seen.add(key)
            found = next(self._search(key).entries(), None)
            if found is not None and (kept := self._kept(found.manifest)) is not None:
                yield kept

    @contextmanager
    def freezing(self, signature: Signature) -> Iterator[None]:
        what = f"{self.part} ({signature})"
        vault = self.store.require_writable(what)
        settings = self.store.settings
        key = graph_key(self.factors, signature, {}).digest
        lock = vault.lock(key, timeout_s=settings.lock_timeout_s, on_wait=self.store.wait)
        held = False
        try:
            lock.__enter__()
            held = True
        except LockTimeoutError as error:
            if settings.on_lock_timeout != "compile":
                raise
            logger.warning("%s Freezing it here too, as on_lock_timeout is 'compile'.", error)
        try:
            yield
        finally:
            if held:
                lock.__exit__(None, None, None)

    def keep(self, frozen: Frozen, seconds: float) -> Kept:
        document = frozen.document
        files = {Digest(document.package): frozen.package}
        artifacts = [ArtifactRef(Digest(document.package), frozen.package.stat().st_size, "graph.pt2")]
        if document.constants and frozen.constants:
            files[Digest(document.constants)] = frozen.constants
            size_bytes = frozen.constants.stat().st_size
            artifacts.append(ArtifactRef(Digest(document.constants), size_bytes, "constants.safetensors"))
        constants = {".".join(map(str, steps)): sha256 for _, steps, sha256 in document.origins}
        key = graph_key(self.factors, document.signature, constants)
        part = {"status": "frozen", "reason": "", "graphs": [document.to_json()]}
        self.store.count("compiled", key.digest, seconds=round(seconds, 3))
        try:
            return self._publish(key, part, artifacts, files, {"compile_s": round(seconds, 3)})
        except VaultError as error:
            self.store.tell(f"{self.part} was frozen and not stored: {error}")
            return self._in_memory(key, frozen)

    def refuse(self, signature: Signature, reason: str) -> Kept:
        key = graph_key(self.factors, signature, {})
        part = {"status": "eager", "reason": reason, "graphs": []}
        try:
            return self._publish(key, part, [], {}, {})
        except VaultError as error:
            self.store.tell(f"why {self.part} cannot be frozen was not stored: {error}")
            return Kept(signature, key.digest.hex, refusal=reason)

    def _publish(
        self,
        key: Key,
        part: Mapping[str, Any],
        artifacts: list[ArtifactRef],
        files: Mapping[Digest, Path],
        info: Mapping[str, Any],
    ) -> Kept:
        vault = self.store.own()
        name = str(self.factors["architecture"]["class"])
        details = {
            **info,
            "signature_text": str(Signature.from_json(_plain(key.factors["signature"]))),
            "machine": machine_record(),
            "toolchain": toolchain_record(graph_format=GRAPH_FORMAT),
        }
        manifest = vault.publish(Manifest(key, {name: part}, tuple(artifacts), details, now_utc()), files)
        self._seen.add(key.digest)
        self.store.count("published", key.digest, bytes=manifest.size_bytes)
        kept = self._kept(manifest)
        if kept is None:
            raise CorruptEntryError(
                f"The entry {key.digest.short} was published and cannot be read.",
                vault.layout.manifest_file(key.digest),
            )
        tier = self.store.tiers.own_tier
        self.store.limit_size(Found(vault, manifest, tier, tier))
        return kept

    def _kept(self, manifest: Manifest) -> Kept | None:
        """What a manifest of this shelf says; ``None`` if it is another part's (its folder shares 64 bits only)."""
        key = manifest.key
        if key.shelf != self._shelf:
            return None
        [part] = manifest.parts.values()
        signature = Signature.from_json(_plain(key.factors["signature"]))
        if part["status"] != "frozen":
            return Kept(signature, key.digest.hex, refusal=part["reason"])
        document = GraphDocument.from_json(_plain(part["graphs"][0]))
        return Kept(signature, key.digest.hex, document, lambda: self._files(key.digest, document))

    def _files(self, key: Digest, document: GraphDocument) -> Files:
        paths: dict[str, Path] = {}

        def check(found: Found) -> None:
            paths.update(self.store.tiers.verified_paths(found))
            if mismatch := check_package_machine(document.machine, self.device):
                package = found.vault.layout.artifact_file(Digest(document.package))
                raise WrongMachineError(f"{package}, a graph of {self.part}, is for another machine: {mismatch}.")

        search = self._search(key)
        found = self.store.open_found(search, check)
        if found is None:
            self._seen.discard(key)
            reasons = "; ".join(search.reasons) or "it is gone"
            raise CorruptEntryError(
                f"The graph {key.short} of {self.part} cannot be used: {reasons}", self.store.settings.dir
            )
        self.store.count("hit", key)
        compile_s = found.manifest.info.get("compile_s")
        if isinstance(compile_s, (int, float)):
            self.store.count("saved", key, seconds=compile_s)
        return paths[document.package], paths[document.constants] if document.constants else None

    def _search(self, key: Digest) -> Search:
        return Search(self.store.tiers, key, mend=self.store.settings.mode == "compile")

    def _in_memory(self, key: Key, frozen: Frozen) -> Kept:
        folder = Path(tempfile.mkdtemp(prefix=scratch_prefix(f"unstored{secrets.token_hex(4)}")))
        import atexit

        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        package = Path(shutil.copy2(frozen.package, folder))
        constants = Path(shutil.copy2(frozen.constants, folder)) if frozen.constants else None
        return Kept(frozen.document.signature, key.digest.hex, frozen.document, lambda: (package, constants))


def _plain(document: Any) -> Any:
    return document
