"""Goldens on disk: a folder for each case of each machine type.

::

    digits.toml
    digits.goldens/
      cpu-avx512-1t-3f9a2c1b/        a machine type, see machine.py
        seven/                       a case; appears whole or not at all
          golden.json
          0.png, 1.png, …            the expected pictures, each with its run record inside
          samples.safetensors        in their place where the output is arrays: "0", "1", …
          latents.safetensors        what the decoder was given at each call, where that was seen

``golden.json`` is canonical JSON::

    {"pipevault_golden": 1, "case": "seven", "machine_type": "cpu-avx512-1t-3f9a2c1b",
     "record": {…},                  the whole run record: key, manifest, digests, weights, machine, versions, call
     "request": {…} or null,         of a suite's case
     "factors": {…} or null,         of the key
     "samples": ["<sha256>", …], "latents": ["<sha256>", …],
     "tolerance": {"margin": 2.0, "limits": {…}, "measured": {"eager": {"pixels": {…}, "latents": {…}}}} or null,
     "digest": "<sha256>"}           over all the rest

Digests of samples are over pixels or values, so a picture may be packed anew, and not repainted.
"""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pipevault.calls.describe import digest_array, pixels_sha256
from pipevault.digest import canonical_json, digest_json
from pipevault.errors import CannotSaveError, SettingsError
from pipevault.evidence.golden.draw import Array, Drawn, Sample
from pipevault.evidence.golden.machine import machine_type
from pipevault.evidence.golden.suite import Limits
from pipevault.evidence.record_files.embed import write_image
from pipevault.evidence.record_files.infotext import asked_samples
from pipevault.runtime.record import RunRecord

GOLDEN_VERSION = 1
GOLDEN_MARK = "pipevault_golden"
GOLDEN_FILE = "golden.json"
SAMPLES_FILE, LATENTS_FILE = "samples.safetensors", "latents.safetensors"


@dataclass(frozen=True)
class Tolerance:
    """What was measured on the machine type of a golden: ``measured`` has a distance in JSON of ``pixels`` and
    ``latents`` for each cause of drift; ``limits`` are ``margin`` times the largest of them.
    """

    limits: Limits
    margin: float
    measured: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {"limits": self.limits.to_json(), "margin": self.margin, "measured": dict(self.measured)}


@dataclass(frozen=True)
class Golden:
    """What a case is held to. ``path`` is its folder."""

    path: Path
    case: str
    drawn: Drawn
    request: Mapping[str, Any] | None = None
    tolerance: Tolerance | None = None

    @property
    def record(self) -> RunRecord:
        return self.drawn.record

    @property
    def machine_type(self) -> str:
        return machine_type(self.record.machine)


def suite_goldens(suite: Path) -> Path:
    """Where the goldens of a suite are: ``digits.toml`` -> ``digits.goldens``."""
    return suite.with_name(f"{suite.stem}.goldens")


def suite_failures(suite: Path) -> Path:
    """Where the pictures of failed checks go unless another folder is given: ``digits.failures``."""
    return suite.with_name(f"{suite.stem}.failures")


def case_folder(goldens: Path, machine: str, case: str) -> Path:
    return goldens / machine / case


def machine_types(goldens: Path, case: str) -> list[str]:
    """The machine types that have a golden of this case."""
    if not goldens.is_dir():
        return []
    return sorted(path.parent.parent.name for path in goldens.glob(f"[!.]*/{case}/{GOLDEN_FILE}"))


def write_golden(golden: Golden, *, overwrite: bool = False) -> Path:
    """Write the golden to its ``path``, whole or not at all.

    :class:`SettingsError` if there is one and ``overwrite`` is not set, :class:`CannotSaveError`.
    """
    path = golden.path
    temporary = _unique(path)
    with _file_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
        try:
            _write_files(golden, temporary)
            _publish(temporary, path, overwrite=overwrite)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return path


def picture_file(path: Path, index: int) -> Path:
    return path / f"{index}.png"


def _to_document(golden: Golden) -> dict[str, Any]:
    content = {
        GOLDEN_MARK: GOLDEN_VERSION,
        "case": golden.case,
        "machine_type": golden.machine_type,
        "record": golden.record.to_document(),
        "request": dict(golden.request) if golden.request is not None else None,
        "factors": dict(golden.drawn.factors) if golden.drawn.factors is not None else None,
        "samples": [sample_sha256(sample) for sample in golden.drawn.samples],
        "latents": [digest_array(array) for array in golden.drawn.latents],
        "tolerance": golden.tolerance.to_json() if golden.tolerance else None,
    }
    return {**content, "digest": digest_json(content).hex}


def _write_files(golden: Golden, folder: Path) -> None:
    drawn = golden.drawn
    for index, sample in enumerate(drawn.samples):
        if isinstance(sample, Image.Image):
            write_picture(sample, picture_file(folder, index), drawn.record, index)
    arrays = {str(index): sample for index, sample in enumerate(drawn.samples) if isinstance(sample, np.ndarray)}
    _write_arrays(folder / SAMPLES_FILE, arrays)
    _write_arrays(folder / LATENTS_FILE, {str(index): array for index, array in enumerate(drawn.latents)})
    (folder / GOLDEN_FILE).write_bytes(canonical_json(_to_document(golden)) + b"\n")


def write_picture(picture: Image.Image, path: Path, record: RunRecord, index: int) -> None:
    """With the record inside, which says of which sample it is; the frames of a video are of the first."""
    count = max(asked_samples(record), len(record.results["pixels"]))
    write_image(picture, path, record, index=index if index < count else 0)


def _write_arrays(path: Path, arrays: Mapping[str, Array]) -> None:
    if arrays:
        from safetensors.numpy import save_file

        save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, path)


def _publish(temporary: Path, path: Path, *, overwrite: bool) -> None:
    """No rename replaces a folder that holds something, so the old one steps aside first.

    A crash between the two renames leaves it beside its place under a name that begins with a dot.
    """
    for file in temporary.iterdir():
        _fsync(file)
    _fsync(temporary)
    if path.exists() and not overwrite:
        raise SettingsError(f"{path} exists already. To record it anew, say so with overwrite.")
    old = _unique(path)
    if path.exists():
        os.rename(path, old)
    try:
        os.rename(temporary, path)
    except OSError:
        if old.exists():
            os.rename(old, path)
        raise
    _fsync(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def _unique(path: Path) -> Path:
    return path.with_name(f".{path.name}-{os.getpid()}-{secrets.token_hex(8)}.tmp")


def _fsync(path: Path) -> None:
    if os.name == "nt" and path.is_dir():  # folders cannot be opened there
        return
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _file_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except CannotSaveError as error:
        raise CannotSaveError(f"The golden {path} could not be written: {error}", path) from error
    except OSError as error:
        raise CannotSaveError(
            f"The golden {path} could not be written: {error.strerror or error}. Mend the permissions of the folder, "
            "or make room.",
            path,
        ) from error


def sample_sha256(sample: Sample) -> str:
    return pixels_sha256(sample) if isinstance(sample, Image.Image) else digest_array(sample)
