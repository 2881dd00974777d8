"""OneFlow behind OneDiff: whether it can be used here, and the environment variables that decide its graphs."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipevault.errors import SettingsError, UnusableBackendError

PINNED = (
    "ONEFLOW_CONV2D_KERNEL_ENABLE_TUNING_WARMUP",
    "ONEFLOW_KERNEL_CONV_CUTLASS_IMPL_ENABLE_TUNING_WARMUP",
    "ONEFLOW_KERNEL_GEMM_CUTLASS_IMPL_ENABLE_TUNING_WARMUP",
)
"""Tuning as the program warms up picks other kernels in each process. OneDiff switches it on unless told otherwise."""


def require_oneflow() -> None:
    """Raise :class:`UnusableBackendError` unless OneDiff's backend can run. One that is registered counts as such."""
    registry = sys.modules.get("onediff.infer_compiler.backends.registry")
    if registry is not None and "oneflow" in registry._BACKENDS:
        return
    spec = importlib.util.find_spec("oneflow")
    if spec is None:
        raise UnusableBackendError(
            "backend 'oneflow' needs OneFlow, which is not installed. Use another backend.", "oneflow"
        )
    if not any(Path(folder, "framework", "args_tree.py").is_file() for folder in spec.submodule_search_locations or ()):
        raise UnusableBackendError(
            "backend 'oneflow' needs the module oneflow/framework/args_tree.py, which this OneFlow lacks; the releases "
            "on PyPI, up to 0.9.0, are too old for OneDiff 1.2. Install a newer build, or use another backend.",
            "oneflow",
        )


def compile_options(options: Mapping[str, Any]) -> Any:
    """Return OneDiff's options for OneFlow. Raises :class:`SettingsError` for one that it does not have."""
    from dataclasses import fields
    from difflib import get_close_matches

    from onediff.infer_compiler import OneflowCompileOptions

    known = tuple(field.name for field in fields(OneflowCompileOptions))
    for name in options:
        if name not in known:
            close = get_close_matches(name, known, n=1, cutoff=0.5)
            raise SettingsError(
                f"OneflowCompileOptions has no option {name!r}."
                + (f" Did you mean {close[0]}?" if close else f" Options: {', '.join(known)}.")
            )
    if options.get("graph_file"):
        raise SettingsError("graph_file is another way to keep graphs. Leave it out: the vault keeps them.")
    return OneflowCompileOptions(**options)


def variables(options: Mapping[str, Any]) -> dict[str, str]:
    """Return every ``ONEFLOW_*`` variable as it will be in force once a part is compiled with ``options``."""
    before = _in_force()
    try:
        pin_variables(options)
        return _in_force()
    finally:
        for name in _in_force().keys() - before.keys():
            del os.environ[name]
        os.environ.update(before)


def _in_force() -> dict[str, str]:
    return {name: value for name, value in sorted(os.environ.items()) if name.startswith("ONEFLOW_")}


def pin_variables(options: Mapping[str, Any]) -> None:
    """Set the variables as OneDiff's compilation will, but for run-time tuning, which stays off unless asked for."""
    from onediff.infer_compiler.backends.env_var import set_oneflow_default_env_vars, set_oneflow_env_vars

    for name in PINNED:
        os.environ.setdefault(name, "0")
    set_oneflow_default_env_vars()
    set_oneflow_env_vars(compile_options(options))
