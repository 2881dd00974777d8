"""The files that a pipeline's weights were read from, so that their digests need not be computed in every process."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from pipevault.digest import digest_json

_WEIGHT_SUFFIXES = frozenset({".safetensors", ".bin", ".pt", ".ckpt", ".json"})
_PLAIN_TYPES = (bool, int, float, str, Path, torch.dtype, type(None))
_SHA256 = re.compile(r"[0-9a-f]{64}")


def weights_origin(component: Any, options: Mapping[str, Any]) -> str | None:
    """Return a hex SHA-256 that names the files in the folder of ``component`` and the ``options`` it was opened with.

    Files of the Hugging Face cache that are named by the SHA-256 of their content (``blobs/<sha256>``, which is all
    that LFS keeps) go by that name wherever the cache lies; others by path, size and time of change. ``None`` where the
    folder is not known, or an option is not a plain value.
    """
    folder = getattr(getattr(component, "config", None), "_name_or_path", None)
    if not folder or not Path(folder).is_dir():
        return None
    if not all(isinstance(value, _PLAIN_TYPES) for value in options.values()):
        return None
    files = sorted(path for path in Path(folder).iterdir() if path.suffix in _WEIGHT_SUFFIXES)
    described = {name: repr(value) for name, value in options.items()}
    return digest_json({"files": [[path.name, *_identity(path)] for path in files], "options": described}).hex


def _identity(path: Path) -> list[Any]:
    target = path.resolve()
    if target.parent.name == "blobs" and _SHA256.fullmatch(target.name):
        return [target.name]
    status = target.stat()
    return [str(target), status.st_size, status.st_mtime_ns, status.st_ino]
