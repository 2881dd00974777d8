"""The OneDiff backend ``inductor``: freezing a module that OneDiff compiles."""

from __future__ import annotations

from torch import nn

from pipevault.errors import SettingsError
from pipevault.graphs.part import freeze_module
from pipevault.graphs.state import PartOptions

NAME = "inductor"


def compile_module(module: nn.Module, options: PartOptions) -> nn.Module:
    """Freeze a module. Raises :class:`SettingsError` for what is none."""
    if not isinstance(module, nn.Module):
        raise SettingsError(f"The backend {NAME!r} compiles modules, not a {type(module).__name__}.")
    return freeze_module(module, options)
