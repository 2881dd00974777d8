"""pipevault freezes the compiled graphs of a diffusion pipeline once and loads the same graphs everywhere.

Importing this package imports no torch; the names below are loaded when they are first used.
"""

from __future__ import annotations

import sys

if sys.argv[:1] == ["-m"] and " -m pipevault " in f"{' '.join(sys.orig_argv)} ":  # Ctrl-C while this is imported, too
    from pipevault_command import be_quiet

    be_quiet()

from importlib import import_module
from typing import TYPE_CHECKING, Any

from pipevault import errors
from pipevault.cache.generation_hook import announce_generation
from pipevault.compat.onediff import announce_backend

if TYPE_CHECKING:
    from pipevault.cache.loaded import outcome as outcome
    from pipevault.cache.loaded import status as status
    from pipevault.cache.loaded import unload as unload
    from pipevault.cache.outcome import Explanation as Explanation
    from pipevault.cache.outcome import Outcome as Outcome
    from pipevault.cache.outcome import PartOutcome as PartOutcome
    from pipevault.cache.outcome import Step as Step
    from pipevault.cache.pipeline_cache import PipelineCache as PipelineCache
    from pipevault.determinism.levels import level as level
    from pipevault.determinism.noise import noise as noise
    from pipevault.determinism.seeds import isolated_rng as isolated_rng
    from pipevault.determinism.seeds import seed_everything as seed_everything
    from pipevault.determinism.streams import generators as generators
    from pipevault.determinism.streams import sample_seed as sample_seed
    from pipevault.evidence.record_files.embed import read_record as read_record
    from pipevault.evidence.replay import Replay as Replay
    from pipevault.evidence.replay import replay as replay
    from pipevault.evidence.save import save as save
    from pipevault.graphs.adapters import register_adapter as register_adapter
    from pipevault.runtime.construct import from_pretrained as from_pretrained
    from pipevault.runtime.record import RunRecord as RunRecord
    from pipevault.runtime.records import record_of as record_of
    from pipevault.settings import Settings as Settings

__version__ = "0.2.0"

# So that onediffx.compile_pipe(pipe, backend="inductor") works; nothing is imported before.
announce_backend("inductor", "pipevault.runtime.by_hand")
announce_generation("pipevault.runtime.generation")

_HOMES = {
    **dict.fromkeys(("Explanation", "Outcome", "PartOutcome", "Step"), "pipevault.cache.outcome"),
    "PipelineCache": "pipevault.cache.pipeline_cache",
    **dict.fromkeys(("outcome", "status", "unload"), "pipevault.cache.loaded"),
    "from_pretrained": "pipevault.runtime.construct",
    "register_adapter": "pipevault.graphs.adapters",
    "Settings": "pipevault.settings",
    "RunRecord": "pipevault.runtime.record",
    "record_of": "pipevault.runtime.records",
    "read_record": "pipevault.evidence.record_files.embed",
    "save": "pipevault.evidence.save",
    **dict.fromkeys(("Replay", "replay"), "pipevault.evidence.replay"),
    "level": "pipevault.determinism.levels",
    **dict.fromkeys(("seed_everything", "isolated_rng"), "pipevault.determinism.seeds"),
    **dict.fromkeys(("generators", "sample_seed"), "pipevault.determinism.streams"),
    "noise": "pipevault.determinism.noise",
}

__all__ = ["errors", *_HOMES]


def __getattr__(name: str) -> Any:
    if home := _HOMES.get(name):
        return getattr(import_module(home), name)
    raise AttributeError(f"module 'pipevault' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
