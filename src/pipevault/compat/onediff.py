"""OneDiff's registry of backends: a backend of this package is there when OneDiff asks for it, and imported only then.

OneDiff looks a backend that it does not know up as a module of its own, ``onediff.infer_compiler.backends.<name>``,
whose import registers it. :func:`announce_backend` answers for that name; a module of OneDiff's own comes first.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


@dataclass(frozen=True)
class _BackendFinder:
    """The finder and loader of one backend: importing OneDiff's module for it imports ``home``, which registers it."""

    name: str
    home: str

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return ModuleSpec(name, self, origin=self.home) if name == self.name else None  # type: ignore[arg-type]

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        import_module(self.home)


def announce_backend(name: str, home: str) -> None:
    """Have OneDiff find the backend ``name``, which the import of the module ``home`` registers. Idempotent."""
    finder = _BackendFinder(f"onediff.infer_compiler.backends.{name}", home)
    if finder not in sys.meta_path:
        sys.meta_path.append(finder)


def register_backend(name: str, compile_module: Any) -> None:
    """Put a backend into OneDiff's registry. Idempotent: the registry itself refuses a name that it has."""
    from onediff.infer_compiler.backends import registry

    if name not in registry._BACKENDS:
        registry.register_backend(name)(compile_module)
