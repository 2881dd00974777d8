"""OneDiff's own backends, ``nexfort`` and ``oneflow``: what is kept of a pipeline that they compiled, and its key.

Neither has graphs for a part and a signature. What is kept is one archive for a pipeline and a call shape: the compile
cache of nexfort, or what ``save_pipe`` wrote of OneFlow's graphs. The entry has the key of a plan and one artifact.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, TypeAlias

from torch import nn

from pipevault.compat import nexfort, onediffx, oneflow
from pipevault.errors import SettingsError
from pipevault.files.scratch import kept_scratch_folder
from pipevault.fingerprint.toolchain import package_version
from pipevault.graphs.inductor import BuildOptions

ARTIFACT = "onediff.tar"


class Nexfort:
    """The backend nexfort, whose compile cache is kept, in one folder of the process."""

    name = "nexfort"
    takes_many_shapes = True
    """True if what was kept for one call shape can be used together with that for another."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        self._options = nexfort.compile_options(options)

    def require(self) -> None:
        """Raise :class:`~pipevault.errors.UnusableBackendError` unless it can run here. Changes and imports nothing."""
        nexfort.require_nexfort()

    def factors(self) -> Mapping[str, Mapping[str, Any]]:
        """Return what decides its code, next to what decides that of every graph, by group of factors of the key."""
        return {"toolchain": {"nexfort": nexfort.nexfort_version()}, "backend": {"mode": self._options["mode"]}}

    def prepare(self) -> Path:
        """Make the process ready to compile, and return the folder to which archives are unpacked."""
        folder = _nexfort_folder()
        nexfort.use_cache(folder)
        return folder

    def compile(self, parts: Mapping[str, nn.Module]) -> dict[str, Any]:
        """Return the parts compiled, which for a lazy compiler means ready to be."""
        return onediffx.compile_parts(parts, backend=self.name, options=dict(self._options))

    def load(self, compiled: Mapping[str, Any], folder: Path, names: tuple[str, ...]) -> None:
        """Give the compiled parts what was unpacked to ``folder``: nexfort finds it when it would compile."""
        _known_graphs.update(nexfort.cached_graphs(folder))

    def collect(self, compiled: Mapping[str, Any], folder: Path) -> dict[str, Path]:
        """Return the files to keep of parts that ran, by relative name; ``folder`` is empty, for files to be made."""
        return nexfort.cached_files(_nexfort_folder())

    def new_compilations(self) -> int:
        """Count what it compiled in this process since it was last asked."""
        graphs = nexfort.cached_graphs(_nexfort_folder())
        count = len(graphs - _known_graphs)
        _known_graphs.update(graphs)
        return count


class Oneflow:
    """The backend OneFlow, whose graphs go through ``save_pipe`` and ``load_pipe``. Methods as above."""

    name = "oneflow"
    takes_many_shapes = False

    def __init__(self, options: Mapping[str, Any]) -> None:
        self._options = dict(options)
        oneflow.compile_options(self._options)

    def require(self) -> None:
        oneflow.require_oneflow()

    def factors(self) -> Mapping[str, Mapping[str, Any]]:
        versions, variables = {"oneflow": package_version("oneflow")}, oneflow.variables(self._options)
        return {"toolchain": versions, "backend": {"variables": variables}}

    def prepare(self) -> Path:
        oneflow.pin_variables(self._options)
        return kept_scratch_folder()

    def compile(self, parts: Mapping[str, nn.Module]) -> dict[str, Any]:
        compiled = onediffx.compile_parts(parts, backend=self.name, options=oneflow.compile_options(self._options))
        onediffx.check_deployable(compiled)
        return compiled

    def load(self, compiled: Mapping[str, Any], folder: Path, names: tuple[str, ...]) -> None:
        onediffx.load_parts(compiled, folder, names)

    def collect(self, compiled: Mapping[str, Any], folder: Path) -> dict[str, Path]:
        onediffx.save_parts(compiled, folder)
        return {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}

    def new_compilations(self) -> int:
        return 0  # OneFlow does not tell


OnediffBackend: TypeAlias = "Nexfort | Oneflow"

_known_graphs: set[str] = set()
"""The graphs in nexfort's folder that are accounted for."""


def onediff_backend(name: str, build: BuildOptions) -> OnediffBackend | None:
    """Return OneDiff's own backend of that name; ``None`` for the others. It may refuse ``build``."""
    if name not in ("nexfort", "oneflow"):
        return None
    if build.weights != "bound":
        raise SettingsError(f"weights {build.weights!r} needs backend 'inductor': {name} takes the live weights.")
    return Nexfort(build.config) if name == "nexfort" else Oneflow(build.config)


@cache
def _nexfort_folder() -> Path:
    return kept_scratch_folder()
