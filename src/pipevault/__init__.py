"""pipevault freezes the compiled graphs of a diffusion pipeline once and loads the same graphs everywhere.

Importing this package imports no torch; the names below are loaded when they are first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from pipevault import errors

if TYPE_CHECKING:
    from pipevault.manager import Explanation as Explanation
    from pipevault.manager import Outcome as Outcome
    from pipevault.manager import PartOutcome as PartOutcome
    from pipevault.manager import PipelineCache as PipelineCache
    from pipevault.manager import Step as Step
    from pipevault.manager import from_pretrained as from_pretrained
    from pipevault.manager import outcome as outcome
    from pipevault.settings import Settings as Settings

__version__ = "0.1.0"

_HOMES = {
    **dict.fromkeys(
        ("Explanation", "Outcome", "PartOutcome", "PipelineCache", "Step", "from_pretrained", "outcome"),
        "pipevault.manager",
    ),
    "Settings": "pipevault.settings",
}

__all__ = [
    "Explanation",
    "Outcome",
    "PartOutcome",
    "PipelineCache",
    "Settings",
    "Step",
    "errors",
    "from_pretrained",
    "outcome",
]


def __getattr__(name: str) -> Any:
    if home := _HOMES.get(name):
        return getattr(import_module(home), name)
    raise AttributeError(f"module 'pipevault' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
