"""Versions of everything that turns a pipeline into native code."""

from __future__ import annotations

import functools
import subprocess
import sys

from pipevault.compat.pytorch import inductor_compilers
from pipevault.compat.versions import installed_torch_version, installed_version

ABSENT = "none"
_PACKAGES = ("torch", "triton", "diffusers", "transformers", "onediff", "onediffx")
_TRITON = ("triton", "pytorch-triton", "pytorch-triton-rocm", "pytorch-triton-xpu", "triton-windows")
_COMPILER_TIMEOUT_S = 30.0


def toolchain_factors(*, graph_format: int) -> dict[str, str]:
    """Return the version of each package that decides generated code, ``"none"`` where it is not installed.

    Starts no process and imports nothing. ``graph_format`` is the version of the backend's artifact format.
    """
    return {"graph_format": str(graph_format), **{name: package_version(name) for name in _PACKAGES}}


def package_version(name: str) -> str:
    """Return the version of the imported module ``name``, else of its installed distribution, else ``"none"``."""
    version = getattr(sys.modules.get(name), "__version__", None)
    return str(version) if version else _installed_version(name)


@functools.cache
def _installed_version(name: str) -> str:
    if name == "torch":
        return installed_torch_version() or ABSENT
    return installed_version(*(_TRITON if name == "triton" else (name,))) or ABSENT


def find_cxx_compiler() -> str | None:
    """Return the first line that the first working compiler of Inductor's search list says of its version, or ``None``.

    Starts a process: never on a hit.
    """
    for candidate in inductor_compilers():
        try:
            finished = subprocess.run(
                [candidate, "--version"], capture_output=True, text=True, timeout=_COMPILER_TIMEOUT_S, check=True
            )
        except (OSError, subprocess.SubprocessError):
            continue
        return finished.stdout.partition("\n")[0].strip()
    return None


def toolchain_record(*, graph_format: int) -> dict[str, str]:
    """Return :func:`toolchain_factors` and the C++ compiler's version, for manifests. Starts a process."""
    compiler = find_cxx_compiler()
    return {**toolchain_factors(graph_format=graph_format), "cxx": ABSENT if compiler is None else compiler}
