"""nexfort behind OneDiff: which torch it runs with, and the folder where it keeps what it compiled.

nexfort compiles with TorchDynamo as calls come, and its modules cannot be saved. What can be kept is its cache: below
``TORCHINDUCTOR_CACHE_DIR`` it writes an entry for each graph, ``compiledgraph/<key>/entry``, if ``NEXFORT_GRAPH_CACHE``
is ``1`` and the mode has ``cache-all``; code and libraries lie next to it. A process that finds them compiles nothing.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipevault.compat.versions import installed_version, torch_version
from pipevault.errors import UnusableBackendError

TRIED = "0.1.dev271"
TRIED_TORCH = "2.4"


def require_nexfort() -> None:
    """Raise :class:`UnusableBackendError` unless nexfort is installed with a torch that it runs with.

    Nothing is imported: with another torch than they were built against its extensions fail or crash.
    """
    torch = torch_version() or "none"
    if re.match(rf"{re.escape(TRIED_TORCH)}(\D|$)", torch) is None:
        raise UnusableBackendError(
            f"backend 'nexfort' needs torch {TRIED_TORCH}, and this is torch {torch}. Install torch {TRIED_TORCH}.0 "
            f"and nexfort {TRIED} in an environment of their own (scripts/test_nexfort.sh builds one), or use another "
            "backend.",
            "nexfort",
        )
    if nexfort_version() == "none":
        raise UnusableBackendError(
            f"backend 'nexfort' needs nexfort, which is not installed. Run: pip install nexfort=={TRIED}", "nexfort"
        )


def nexfort_version() -> str:
    """Return the version of the installed nexfort, ``none`` where there is none."""
    return installed_version("nexfort") or "none"


def compile_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``options`` with the mode that keeps what is compiled."""
    modes = str(options.get("mode") or "O2").split(":")
    return {**options, "mode": ":".join(dict.fromkeys([*modes, "cache-all"]))}


def use_cache(folder: Path) -> None:
    """Have nexfort keep what it compiles in ``folder`` from now on, and look there first."""
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder)
    os.environ["NEXFORT_GRAPH_CACHE"] = "1"
    config: Any = sys.modules.get("nexfort.fx_compiler.config")
    if config is not None:  # it reads the variable when it is imported
        config.graph_cache = True


def cached_graphs(folder: Path) -> frozenset[str]:
    """Return the names of the graphs whose entries lie in ``folder``: one more is one compilation."""
    return frozenset(path.parent.name for path in folder.glob("compiledgraph/*/entry"))


def cached_files(folder: Path) -> dict[str, Path]:
    """Return the files of the cache by relative name; locks are no part of it."""
    named = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    return {name: path for name, path in sorted(named.items()) if not name.startswith("locks/")}
