"""pipevault freezes the compiled graphs of a diffusion pipeline once and loads the same graphs everywhere.

Importing this package imports no torch; the names below are loaded when they are first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from pipevault import errors
from pipevault.compat.onediff import announce_backend

if TYPE_CHECKING:
    from pipevault.determinism.embed import read_record as read_record
    from pipevault.determinism.levels import level as level
    from pipevault.determinism.noise import noise as noise
    from pipevault.determinism.record import RunRecord as RunRecord
    from pipevault.determinism.seeds import isolated_rng as isolated_rng
    from pipevault.determinism.seeds import seed_everything as seed_everything
    from pipevault.determinism.streams import generators as generators
    from pipevault.determinism.streams import sample_seed as sample_seed
    from pipevault.graphs.adapters import register_adapter as register_adapter
    from pipevault.manager import Explanation as Explanation
    from pipevault.manager import Outcome as Outcome
    from pipevault.manager import PartOutcome as PartOutcome
    from pipevault.manager import PipelineCache as PipelineCache
    from pipevault.manager import Step as Step
    from pipevault.manager import from_pretrained as from_pretrained
    from pipevault.manager import outcome as outcome
    from pipevault.manager import unload as unload
    from pipevault.manager.replay import Replay as Replay
    from pipevault.manager.replay import replay as replay
    from pipevault.manager.save import save as save
    from pipevault.runtime.records import record_of as record_of
    from pipevault.settings import Settings as Settings

__version__ = "0.1.0"

# So that onediffx.compile_pipe(pipe, backend="inductor") works; nothing is imported before.
announce_backend("inductor", "pipevault.runtime.by_hand")

_HOMES = {
    **dict.fromkeys(
        ("Explanation", "Outcome", "PartOutcome", "PipelineCache", "Step", "from_pretrained", "outcome", "unload"),
        "pipevault.manager",
    ),
    "register_adapter": "pipevault.graphs.adapters",
    "Settings": "pipevault.settings",
    "RunRecord": "pipevault.determinism.record",
    "record_of": "pipevault.runtime.records",
    "read_record": "pipevault.determinism.embed",
    "save": "pipevault.manager.save",
    **dict.fromkeys(("Replay", "replay"), "pipevault.manager.replay"),
    "level": "pipevault.determinism.levels",
    **dict.fromkeys(("seed_everything", "isolated_rng"), "pipevault.determinism.seeds"),
    **dict.fromkeys(("generators", "sample_seed"), "pipevault.determinism.streams"),
    "noise": "pipevault.determinism.noise",
}

__all__ = [
    "Explanation",
    "Outcome",
    "PartOutcome",
    "PipelineCache",
    "Replay",
    "RunRecord",
    "Settings",
    "Step",
    "errors",
    "from_pretrained",
    "generators",
    "isolated_rng",
    "level",
    "noise",
    "outcome",
    "read_record",
    "record_of",
    "register_adapter",
    "replay",
    "sample_seed",
    "save",
    "seed_everything",
    "unload",
]


def __getattr__(name: str) -> Any:
    if home := _HOMES.get(name):
        return getattr(import_module(home), name)
    raise AttributeError(f"module 'pipevault' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
