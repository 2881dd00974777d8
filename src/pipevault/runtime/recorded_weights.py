"""Digests of a pipeline's weights for its run records: computed while the first generation draws, and again only for
parts whose weights moved. What a part's files give is remembered across processes in the user's cache folder.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from threading import Thread
from typing import Any

import msgspec
import torch
from torch import nn

from pipevault.digest import digest_json
from pipevault.errors import CannotFreezeError, NoHomeError, VaultError
from pipevault.files.atomic import make_folder, write_file
from pipevault.files.documents import Format, Sha256
from pipevault.fingerprint.weights import weights_digest
from pipevault.fingerprint.weights_stamp import Stamp, WeightsWatch, weights_stamp
from pipevault.graphs import parts as graph_parts
from pipevault.pipeline import Pipeline
from pipevault.reading import read_file
from pipevault.settings.user_folders import user_folder

logger = logging.getLogger("pipevault")

ORIGINS = "_pipevault_origins"
"""Attribute of a pipeline that :func:`note_origins` looked at: for each part the name of its files, and its stamp."""

_MEMORY_VERSION = 1
_WEIGHT_SUFFIXES = frozenset({".safetensors", ".bin", ".pt", ".ckpt", ".json"})
_PLAIN_TYPES = (bool, int, float, str, Path, torch.dtype, type(None))
_SHA256 = re.compile(r"[0-9a-f]{64}")


class _Memory(msgspec.Struct):
    pipevault_weights: int
    sha256: Sha256


_FORMAT = Format(_Memory, "pipevault_weights", _MEMORY_VERSION, canonical=False)


@dataclass(frozen=True)
class _Known:
    """The digest of weights that ``watch`` has looked at before. At a future a thread of process ``pid`` is at work."""

    watch: WeightsWatch
    digest: str | Future[str]
    pid: int = field(default_factory=os.getpid)

    def result(self, module: nn.Module) -> str | None:
        """Wait for the digest; ``None`` if it failed, if the weights moved, or in a fork, which has no such thread."""
        if not self.watch.watches(module):
            return None
        digest = self.digest
        if isinstance(digest, Future):
            # In a fork not even a look at it: another thread may have held its lock.
            if self.pid != os.getpid() or digest.exception() is not None:
                return None
            digest = digest.result()
        return None if self.watch.has_moved() else digest


class RecordedWeights:
    def __init__(self, origins: Mapping[str, tuple[str, Stamp]] | None = None) -> None:
        self._origins = dict(origins or {})
        self._known: dict[str, _Known] = {}

    def begin(self, modules: Mapping[str, nn.Module]) -> None:
        """Start to compute, in a thread of its own, what :meth:`digests` has not yet been asked for: only of weights
        that lie in the host's memory as plain bytes, for a device is left to the generation that runs.
        """
        new = {name: module for name, module in modules.items() if name not in self._known}
        watches = {name: watch for name in new if (watch := WeightsWatch(new[name])).is_plain}
        if not watches:
            return
        begun: dict[str, Future[str]] = {name: Future() for name in watches}
        self._known |= {name: _Known(watches[name], future) for name, future in begun.items()}

        def compute() -> None:
            for name, future in begun.items():
                try:
                    future.set_result(self._digest(name, new[name]))
                except Exception as error:  # whatever it is, :meth:`digests` computes again and meets it
                    future.set_exception(error)

        Thread(target=compute, name="pipevault weights", daemon=True).start()

    def digests(self, modules: Mapping[str, nn.Module]) -> dict[str, str]:
        """Return the :func:`~pipevault.fingerprint.weights.weights_digest` of each of ``modules`` whose weights can be
        read as plain bytes.
        """
        found: dict[str, str] = {}
        for name, module in modules.items():
            known = self._known.get(name)
            digest = known.result(module) if known else None
            if known is not None and digest is not None:
                watch = known.watch
            else:
                try:
                    watch = WeightsWatch(module)
                    digest = self._digest(name, module)
                except CannotFreezeError as error:
                    logger.debug("the weights of %s are not recorded: %s", name, error)
                    continue
            self._known[name] = _Known(watch, digest)
            found[name] = digest
        return found

    def _digest(self, name: str, module: Any) -> str:
        origin, opened = self._origins.get(name, (None, None))
        if origin is None or opened != weights_stamp(module):
            return weights_digest(module)
        try:
            file = memory_file(origin, name)
            return _FORMAT.parse(read_file(file), file).sha256
        except (OSError, ValueError):  # absent, or not ours: computed again and written again; or there is no home
            digest = weights_digest(module)
        try:
            file = memory_file(origin, name)
            make_folder(file.parent)
            write_file(file, _FORMAT.write(_Memory(_MEMORY_VERSION, digest)))
        except (VaultError, NoHomeError) as error:  # a full or read-only cache folder costs time, nothing else
            logger.debug("the digest of weights is not remembered: %s", error)
        return digest


def note_origins(pipe: Pipeline, options: Mapping[str, Any]) -> None:
    """Remember on ``pipe``, which was opened with ``options`` just now, which files its parts come from."""
    origins: dict[str, tuple[str, Stamp]] = {}
    for name, module in graph_parts.find_parts(pipe).items():
        if origin := weights_origin(graph_parts.get_part(pipe, name.partition(".")[0]), options):
            origins[name] = (origin, weights_stamp(module))
    object.__setattr__(pipe, ORIGINS, origins)


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


def memory_file(origin: str, part: str) -> Path:
    """Return where the digest of a part that comes from ``origin`` is remembered."""
    return user_folder("cache") / "weights" / f"{origin}-{part}.json"
