"""Goldens on disk: a folder for each case of each machine type.

::

    digits.toml
    digits.goldens/
      cpu-avx512-1t-3f9a2c1b/        a machine type, see drawn.py
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

Digests of samples are over pixels or values, so a picture may be compressed again, and not repainted.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from PIL import Image
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from pipevault import errors
from pipevault.calls.describe import digest_array, pixels_sha256
from pipevault.digest import canonical_json, digest_json
from pipevault.evidence.files import Array, write_data
from pipevault.evidence.golden.drawn import Drawn, Sample, machine_type
from pipevault.evidence.golden.suite_file import Limits
from pipevault.evidence.record_files import image_files
from pipevault.evidence.record_files.embed import write_image
from pipevault.evidence.record_files.infotext import asked_samples
from pipevault.files.atomic import fsync_folder
from pipevault.files.documents import Format, Problem, Sha256
from pipevault.reading import read_file
from pipevault.runtime.record import RunRecord

GOLDEN_VERSION = 1
GOLDEN_MARK = "pipevault_golden"
GOLDEN_FILE = "golden.json"
SAMPLES_FILE, LATENTS_FILE = "samples.safetensors", "latents.safetensors"


@dataclass(frozen=True)
class Tolerance:
    """``measured`` has a distance in JSON for each cause of drift; ``limits`` are ``margin`` times the largest."""

    limits: Limits
    margin: float
    measured: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {"limits": self.limits.to_json(), "margin": self.margin, "measured": dict(self.measured)}


@dataclass(frozen=True)
class Golden:
    """The expected results of a case. ``path`` is its folder."""

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


def case_folder(goldens: Path, machine: str, case: str) -> Path:
    return goldens / machine / case


def machine_types(goldens: Path, case: str) -> list[str]:
    if not goldens.is_dir():
        return []
    return sorted(path.parent.parent.name for path in goldens.glob(f"[!.]*/{case}/{GOLDEN_FILE}"))


def write_golden(golden: Golden, *, overwrite: bool = False) -> None:
    """Write the golden to its ``path``, whole or not at all. :class:`SettingsError` if there is one and not
    ``overwrite``.
    """
    path = golden.path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # No rename replaces a folder that holds something, so the old one steps aside first: a crash between the two
        # renames, or one that fails both ways, leaves it next to its place under a name that begins with a dot.
        aside = tempfile.TemporaryDirectory(".tmp", f".{path.name}-", path.parent, ignore_cleanup_errors=True)
        with aside as folder:
            new, old = Path(folder, "new"), Path(f"{folder}.old")
            new.mkdir()
            _write_files(golden, new)
            if path.exists() and not overwrite:
                raise errors.SettingsError(f"{path} exists already. Record it again with overwrite.")
            try:
                if path.exists():
                    os.rename(path, old)
                os.rename(new, path)
            except BaseException:  # an interrupt too
                if old.exists() and not path.exists():
                    os.rename(old, path)
                raise
            fsync_folder(path.parent)
            shutil.rmtree(old, ignore_errors=True)
    except errors.CannotSaveError as error:
        raise errors.CannotSaveError(f"The golden {path} could not be written: {error}", path) from error
    except OSError as error:
        raise errors.CannotSaveError(
            f"The golden {path} could not be written: {error.strerror or error}. Fix the permissions of the "
            "folder, or make room.",
            path,
        ) from error


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
    write_data(folder / GOLDEN_FILE, canonical_json(_to_document(golden)) + b"\n")


def write_picture(picture: Image.Image, path: Path, record: RunRecord, index: int) -> None:
    """Write ``picture`` with the record inside, which tells its sample; the frames of a video are of the first."""
    count = max(asked_samples(record), len(record.results["pixels"]))
    write_image(picture, path, record, index=index if index < count else 0)


def _write_arrays(path: Path, arrays: Mapping[str, Array]) -> None:
    if arrays:
        write_data(path, save({name: np.ascontiguousarray(array) for name, array in arrays.items()}))


def sample_sha256(sample: Sample) -> str:
    return pixels_sha256(sample) if isinstance(sample, Image.Image) else digest_array(sample)


class _Document(msgspec.Struct, forbid_unknown_fields=True):
    pipevault_golden: int
    case: str
    machine_type: str
    record: dict[str, Any]
    request: dict[str, Any] | None
    factors: dict[str, Any] | None
    samples: list[Sha256]
    latents: list[Sha256]
    tolerance: Tolerance | None
    digest: str


def _edited(problem: Problem) -> errors.RecordDigestError:
    return _changed(problem.path, problem.what)


_FORMAT = Format(
    _Document,
    GOLDEN_MARK,
    GOLDEN_VERSION,
    damaged=lambda found: errors.BadRecordError(f"The golden {found} Record it again.", found.field, found.source),
    newer=lambda found: errors.NewerRecordError(f"The golden {found} Upgrade pipevault.", found.source),
    foreign=_edited,
    edited=_edited,
    digest_field="digest",
    canonical=False,
)


def read_golden(path: Path) -> Golden:
    """Read and verify the golden in the folder ``path``. :class:`NoGoldenError`, :class:`RecordError`."""
    file = path / GOLDEN_FILE
    try:
        document = _FORMAT.parse(read_file(file), file)
    except FileNotFoundError:
        raise errors.NoGoldenError(f"The golden {path} does not exist. Record it first.") from None
    except OSError as error:
        raise errors.RecordError(f"{file} cannot be read: {error.strerror}. Fix its permissions.", str(file)) from error
    record = RunRecord.from_document(document.record, source=str(file))
    samples, latents = _read_samples(path, document.samples), _read_latents(path, document.latents)
    drawn = Drawn(record, samples, latents, document.factors)
    return Golden(path, document.case, drawn, document.request, document.tolerance)


def _read_samples(path: Path, digests: Sequence[str]) -> tuple[Sample, ...]:
    arrays = _read_arrays(path / SAMPLES_FILE)
    samples: list[Sample] = []
    for index, digest in enumerate(digests):
        array = arrays.get(str(index))
        file = picture_file(path, index) if array is None else path / SAMPLES_FILE
        sample = _read_picture(file) if array is None else array
        if sample_sha256(sample) != digest:
            raise _changed(file, f"sample {index} is not the one that {GOLDEN_FILE} names")
        samples.append(sample)
    return tuple(samples)


def _read_latents(path: Path, digests: Sequence[str]) -> tuple[Array, ...]:
    arrays = _read_arrays(path / LATENTS_FILE)
    for index, digest in enumerate(digests):
        if str(index) not in arrays or digest_array(arrays[str(index)]) != digest:
            raise _changed(path / LATENTS_FILE, f"latents {index} are not those that {GOLDEN_FILE} names")
    return tuple(arrays[str(index)] for index in range(len(digests)))


def _read_picture(file: Path) -> Image.Image:
    try:
        return image_files.picture(file)
    except errors.NoRecordError as error:
        missing = isinstance(error.__cause__, FileNotFoundError)
        raise _changed(file, "it is missing" if missing else f"it is not a picture ({error.__cause__})") from error


def _read_arrays(file: Path) -> dict[str, Array]:
    if not file.is_file():
        return {}
    try:
        arrays: dict[str, Array] = load_file(file)
        return arrays
    except (OSError, SafetensorError) as error:
        raise _changed(file, f"it cannot be read ({error})") from error


def _changed(file: Path, what: str) -> errors.RecordDigestError:
    return errors.RecordDigestError(
        f"The golden {file.parent} was changed after it was recorded: {file.name}: {what}. Use its files as they were "
        "recorded, or record it again.",
        str(file),
    )
