"""Opening entries of the tiers for a pipeline: verified, checked against this machine, leased and counted."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from pipevault.digest import Digest
from pipevault.errors import VaultError, WrongMachineError
from pipevault.fingerprint.machine import check_package_machine
from pipevault.fingerprint.model import architecture
from pipevault.graphs import parts as graph_parts
from pipevault.graphs.inductor import BuildOptions
from pipevault.graphs.state import PartOptions
from pipevault.key import Key
from pipevault.manager.keys import execution_device
from pipevault.manager.lookup import Search
from pipevault.manager.outcome import Clock, Outcome, part_outcomes
from pipevault.store.liveness import scratch_prefix
from pipevault.store.tiers import Found, Tiers

if TYPE_CHECKING:
    from pipevault.store.leases import Lease


@dataclass(frozen=True)
class Held:
    """An entry that a pipeline has loaded, and what keeps it in its vault."""

    found: Found
    lease: Lease


class Entries:
    """Opens entries of ``tiers`` for parts that are built with ``build``."""

    def __init__(self, tiers: Tiers, build: BuildOptions) -> None:
        self._tiers = tiers
        self._build = build

    def load_first(self, pipe: Any, search: Search, loaded: list[Held], clock: Clock) -> Outcome | None:
        """What came of the first entry that can be loaded; ``None`` if there is none."""
        outcome = self._load_first(pipe, search, loaded, clock)
        for _ in range(search.quarantined):
            self.count("quarantined", search.key.digest)
        return None if outcome is None else replace(outcome, problems=tuple(search.problems))

    def _load_first(self, pipe: Any, search: Search, loaded: list[Held], clock: Clock) -> Outcome | None:
        places = search.places()
        while True:
            with clock.step("lookup"):
                found = next(places, None)
            if found is None:
                return None
            try:
                outcome = self.open(pipe, found, loaded, clock)
            except (VaultError, WrongMachineError) as error:
                search.refuse(found, error)
                continue
            self.count("hit", found.key)
            compile_s = found.manifest.info.get("compile_s")
            if isinstance(compile_s, (int, float)):
                self.count("saved", found.key, seconds=compile_s - sum(clock.seconds.values()))
            if found.tier != found.origin:
                self.limit_size(found, search.tell)
            return replace(outcome, tier=str(found.origin.dir))

    def open(self, pipe: Any, found: Found, loaded: list[Held], clock: Clock, *, is_use: bool = True) -> Outcome:
        """Verify and load an entry beside those that are loaded already.

        What a process published itself just now is no use: an entry that nobody else loads counts as unused.
        """
        with clock.step("verify"):
            lease = self._tiers.hold(found, is_use=is_use)
        try:
            self.attach(pipe, found, clock)
        except BaseException:  # whatever it was goes on; what was not loaded is not in use
            lease.release()
            raise
        loaded.append(Held(found, lease))
        parts = part_outcomes(found.manifest.parts)
        eager = [f"{name}: {part.reason}" for name, part in parts.items() if part.status == "eager"]
        return Outcome(
            status="partial" if eager else "hit",
            key=found.key,
            reason="; ".join(eager),
            parts=parts,
            seconds=clock.seconds,
            stored=True,
            manifest=found.manifest.manifest_digest,
        )

    def attach(self, pipe: Any, found: Found, clock: Clock) -> None:
        """The same without a lease, for an entry that is held already."""
        graphs = {name: part["graphs"] for name, part in found.manifest.parts.items() if part["graphs"]}
        with clock.step("verify"):
            paths = self._tiers.verified_paths(found)
            self._check_machine(pipe, found, graphs)
        with clock.step("load"), tempfile.TemporaryDirectory(prefix=scratch_prefix("load")) as folder:
            options = self.options(found.manifest.key, lambda digest: paths[digest])
            graph_parts.attach(pipe, tuple(graphs), options)
            try:
                graph_parts.load(pipe, Path(folder), graphs)
            except BaseException:  # whatever it was goes on; the pipeline must not keep half-loaded parts
                graph_parts.detach(pipe, tuple(graphs))
                raise

    def count(self, event: str, key: Digest | None = None, **numbers: Any) -> None:
        """In the vault of ``settings.dir``, if there is one."""
        if (vault := self._tiers.own()) is not None:
            from pipevault.store.stats import count

            count(vault.layout, event, key=key, **numbers)

    def limit_size(self, found: Found, tell: Callable[[str], None]) -> None:
        """Keep ``max_size`` where ``found`` was written just now; ``tell`` gets a sentence if that fails."""
        try:
            problems = self._tiers.limit_size(found)
        except VaultError as error:
            problems = (f"max_size could not be kept: {error}",)
        for problem in problems:
            tell(problem)

    def _check_machine(self, pipe: Any, found: Found, graphs: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
        """Native code of another instruction set must be refused before it is opened (pytorch #153697)."""
        device = execution_device(pipe, {name: graph_parts.get_part(pipe, name) for name in graphs})
        for name, documents in graphs.items():
            for document in documents:
                if mismatch := check_package_machine(document["machine"], device):
                    package = found.vault.layout.artifact_file(Digest(document["package"]))
                    raise WrongMachineError(f"{package}, a graph of {name}, is for another machine: {mismatch}.")

    def options(self, key: Key, artifact_path: Callable[[str], Path] | None) -> PartOptions:
        """For parts of the entry ``key``. ``artifact_path`` finds a file by its digest; to freeze needs none."""

        def verify(name: str, module: nn.Module) -> str:
            frozen = key.factors["architecture"][name]["digest"]
            return "" if architecture(module)["digest"] == frozen else "its sub-modules are not those that were frozen"

        return PartOptions(
            mode="frozen",
            on_unfrozen=self._tiers.settings.on_unfrozen,
            build=self._build,
            artifact_path=artifact_path,
            verify=verify,
            freeze_hint=(
                "Freeze such calls too, with PipelineCache.load(pipe, shapes=[...]) in mode 'compile' or with "
                "`pipevault prewarm`"
            ),
        )


def release(loaded: Sequence[Held]) -> None:
    for held in loaded:
        held.lease.release()
