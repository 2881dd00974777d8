"""The vault as loads use it: the settings, the options of builds, the tiers, and the vault for new graphs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from pipevault.cache.keys import build_key, execution_device, module_dtype
from pipevault.cache.outcome import Progress
from pipevault.cache.regions import choose_regions
from pipevault.calls.call import CallShape
from pipevault.calls.call_shapes import AskedShape, CallRange
from pipevault.determinism.levels import level as at_level
from pipevault.determinism.levels import parse_level
from pipevault.graphs import parts as graph_parts
from pipevault.graphs.inductor import BuildOptions
from pipevault.key import Key
from pipevault.pipeline import Pipeline
from pipevault.settings import Settings
from pipevault.store.tiers import Tiers
from pipevault.store.vault import Vault


@dataclass
class Access:
    """The settings of a :class:`~pipevault.PipelineCache` and what they open, for every load of it."""

    settings: Settings
    build: BuildOptions
    progress: Progress | None = None
    tiers: Tiers = field(init=False)

    def __post_init__(self) -> None:
        self.tiers = Tiers(self.settings)

    @property
    def vault(self) -> Vault:
        """The vault of ``settings.dir``, made if need be. Raises :class:`~pipevault.errors.VaultError`."""
        return self.tiers.own_vault(self.settings.mode == "compile") or Vault.of(self.settings)

    def per_sample(self, shape: CallShape) -> CallShape:
        """Return the shape to freeze for calls of ``shape``: at level ``invariant`` each sample runs on its own."""
        return replace(shape, batch_size=1) if parse_level(self.settings.level).name == "invariant" else shape

    def plan_key(
        self, pipe: Pipeline, names: tuple[str, ...], shape: CallShape | CallRange, *, worthwhile: bool = False
    ) -> Key:
        """Return the key of the plan for calls of ``shape`` that freeze the parts ``names``."""
        modules = {name: graph_parts.get_part(pipe, name) for name in names}
        is_own = self.settings.backend == "inductor"
        chosen: Mapping[str, Any] = choose_regions(pipe, names, self.settings.regions) if is_own else {}
        with at_level(self.settings.level):
            return build_key(
                pipe,
                modules,
                shape,
                backend=self.settings.backend,
                build=self.build,
                regions={name: str(its) for name, its in chosen.items()},
                worthwhile=worthwhile and is_own,
            )

    def described(
        self,
        pipe: Pipeline,
        modules: Mapping[str, nn.Module],
        shapes: Sequence[AskedShape],
        parts: Sequence[str] | None,
    ) -> dict[str, Any]:
        """Return what a record must tell so that the same load can be done again."""
        return {
            "shapes": [shape.to_json() for shape in shapes],
            "parts": None if parts is None else list(parts),
            "backend": self.settings.backend,
            "weights": self.settings.weights,
            "build": self.build.digest,
            "device": str(execution_device(pipe, modules)),
            "dtype": {name: module_dtype(module) for name, module in modules.items()},
        }
