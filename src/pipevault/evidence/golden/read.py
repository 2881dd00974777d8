"""The reader of goldens, which notices that one is not as it was recorded."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
from PIL import Image

from pipevault.calls.describe import digest_array
from pipevault.errors import BadRecordError, NewerRecordError, NoGoldenError, RecordDigestError, RecordError
from pipevault.evidence.files import Array
from pipevault.evidence.golden.draw import Drawn, Sample
from pipevault.evidence.golden.files import (
    GOLDEN_FILE,
    GOLDEN_MARK,
    GOLDEN_VERSION,
    LATENTS_FILE,
    SAMPLES_FILE,
    Golden,
    Tolerance,
    picture_file,
    sample_sha256,
)
from pipevault.files.documents import Format, Problem, Sha256
from pipevault.reading import read_file
from pipevault.runtime.record import RunRecord


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


def _bad(problem: Problem) -> BadRecordError:
    return BadRecordError(f"The golden {problem} Record it again.", problem.field, problem.source)


def _newer(problem: Problem) -> NewerRecordError:
    return NewerRecordError(f"The golden {problem} Upgrade pipevault.", problem.source)


def _edited(problem: Problem) -> RecordDigestError:
    return _changed(problem.path, problem.what)


_FORMAT = Format(
    _Document,
    GOLDEN_MARK,
    GOLDEN_VERSION,
    damaged=_bad,
    newer=_newer,
    foreign=_edited,
    edited=_edited,
    digest_field="digest",
    canonical=False,
)


def read_golden(path: Path) -> Golden:
    """Read and verify the golden in the folder ``path``.

    :class:`NoGoldenError` if there is none; :class:`RecordDigestError` if a file of it was changed or lost,
    :class:`NewerRecordError`, :class:`BadRecordError`.
    """
    document = _document(path / GOLDEN_FILE)
    record = RunRecord.from_document(document.record, source=str(path / GOLDEN_FILE))
    samples, latents = _read_samples(path, document.samples), _read_latents(path, document.latents)
    drawn = Drawn(record, samples, latents, document.factors)
    return Golden(path, document.case, drawn, document.request, document.tolerance)


def _document(file: Path) -> _Document:
    try:
        return _FORMAT.parse(read_file(file), file)
    except FileNotFoundError:
        raise NoGoldenError(f"The golden {file.parent} does not exist. Record it first.") from None
    except OSError as error:
        raise RecordError(f"{file} cannot be read: {error.strerror}. Fix its permissions.", str(file)) from error


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
        with Image.open(file) as picture:
            picture.load()
            return picture
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # Pillow's, all
        what = "it is missing" if isinstance(error, FileNotFoundError) else f"it is not a picture ({error})"
        raise _changed(file, what) from error


def _read_arrays(file: Path) -> dict[str, Array]:
    if not file.is_file():
        return {}
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        arrays: dict[str, Array] = load_file(file)
        return arrays
    except (OSError, SafetensorError) as error:
        raise _changed(file, f"it cannot be read ({error})") from error


def _changed(file: Path, what: str) -> RecordDigestError:
    return RecordDigestError(
        f"The golden {file.parent} was changed after it was recorded: {file.name}: {what}. Use its files as they were "
        "recorded, or record it again.",
        str(file),
    )
