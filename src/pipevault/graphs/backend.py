"""The OneDiff backend ``inductor``: registers itself in OneDiff's public registry when this module is imported."""

from __future__ import annotations

from typing import Any

from onediff.infer_compiler.backends import registry
from torch import nn

from pipevault.errors import SettingsError
from pipevault.graphs.part import freeze_module
from pipevault.graphs.state import PartOptions

NAME = "inductor"


def compile_module(torch_module: nn.Module | None = None, *, options: PartOptions | None = None) -> Any:
    """Freeze a module, as ``onediff.infer_compiler.compile(module, backend="inductor", options=…)`` asks for."""
    if torch_module is None:
        return lambda module: compile_module(module, options=options)
    if not isinstance(torch_module, nn.Module):
        raise SettingsError(f"The backend {NAME!r} compiles modules, not a {type(torch_module).__name__}.")
    if options is not None and not isinstance(options, PartOptions):
        raise SettingsError(f"The options of the backend {NAME!r} are a PartOptions, not {options!r}.")
    return freeze_module(torch_module, options or PartOptions())


def register() -> None:
    """Idempotent: OneDiff's registry refuses a name that it has."""
    if NAME not in registry._BACKENDS:
        registry.register_backend(NAME)(compile_module)


register()
