"""Reading a golden, and noticing that it is not as it was recorded."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from PIL import Image

from pipevault.determinism.describe import digest_array
from pipevault.determinism.record import RunRecord
from pipevault.digest import digest_json
from pipevault.errors import BadRecordError, NewerRecordError, NoGoldenError, RecordDigestError, RecordError
from pipevault.manager.golden.draw import Array, Drawn, Sample
from pipevault.manager.golden.files import (
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
from pipevault.reading import read_file

_TYPES: Mapping[str, tuple[type, ...]] = {
    "case": (str,),
    "machine_type": (str,),
    "record": (dict,),
    "request": (dict, type(None)),
    "factors": (dict, type(None)),
    "samples": (list,),
    "latents": (list,),
    "tolerance": (dict, type(None)),
}


def read_golden(path: Path) -> Golden:
    """The golden in the folder ``path``, verified.

    :class:`NoGoldenError` if there is none; :class:`RecordDigestError` if a file of it was changed or lost,
    :class:`NewerRecordError`, :class:`BadRecordError`.
    """
    document = _document(path / GOLDEN_FILE)
    record = RunRecord.from_document(document["record"], source=str(path / GOLDEN_FILE))
    drawn = Drawn(record, _read_samples(path, document["samples"]), _read_latents(path, document), document["factors"])
    return Golden(path, document["case"], drawn, document["request"], _tolerance(path, document["tolerance"]))


def _document(file: Path) -> dict[str, Any]:
    try:
        document = json.loads(read_file(file))
    except FileNotFoundError:
        raise NoGoldenError(f"There is no golden {file.parent}. Record it first.") from None
    except OSError as error:
        raise RecordError(f"{file} cannot be read: {error.strerror}. Mend its permissions.", str(file)) from error
    except (ValueError, RecursionError) as error:
        _changed(file, f"it is no JSON ({error})")
    if not isinstance(document, dict) or GOLDEN_MARK not in document:
        _changed(file, f"it has no field {GOLDEN_MARK!r}")
    version = document[GOLDEN_MARK]
    if isinstance(version, int) and version > GOLDEN_VERSION:
        raise NewerRecordError(
            f"The golden {file} is of version {version}; this pipevault knows up to {GOLDEN_VERSION}. Upgrade "
            "pipevault.",
            str(file),
        )
    content = {name: value for name, value in document.items() if name != "digest"}
    try:
        computed = digest_json(content).hex
    except (ValueError, RecursionError) as error:
        _changed(file, f"it is no plain JSON ({error})")
    if document.get("digest") != computed:
        _changed(file, "its content has another digest than it states")
    _check_fields(document, file)
    return document


def _check_fields(document: Mapping[str, Any], file: Path) -> None:
    if isinstance(document[GOLDEN_MARK], bool) or document[GOLDEN_MARK] != GOLDEN_VERSION:
        _bad(GOLDEN_MARK, "is no version", file)
    for name, types in _TYPES.items():
        if name not in document:
            _bad(name, "is missing", file)
        if not isinstance(document[name], types):
            _bad(name, f"is no {' or '.join('null' if kind is type(None) else kind.__name__ for kind in types)}", file)
    for name in document:
        if name not in (*_TYPES, GOLDEN_MARK, "digest"):
            _bad(name, "is no field of a golden of this version", file)


def _tolerance(path: Path, document: Mapping[str, Any] | None) -> Tolerance | None:
    if document is None:
        return None
    try:
        return Tolerance.from_json(document)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        _bad("tolerance", f"cannot be read ({type(error).__name__}: {error})", path / GOLDEN_FILE)


def _read_samples(path: Path, digests: Sequence[str]) -> tuple[Sample, ...]:
    arrays = _read_arrays(path / SAMPLES_FILE)
    samples: list[Sample] = []
    for index, digest in enumerate(digests):
        array = arrays.get(str(index))
        file = picture_file(path, index) if array is None else path / SAMPLES_FILE
        sample = _read_picture(file) if array is None else array
        if sample_sha256(sample) != digest:
            _changed(file, f"sample {index} is not the one that {GOLDEN_FILE} names")
        samples.append(sample)
    return tuple(samples)


def _read_latents(path: Path, document: Mapping[str, Any]) -> tuple[Array, ...]:
    arrays = _read_arrays(path / LATENTS_FILE)
    for index, digest in enumerate(document["latents"]):
        if str(index) not in arrays or digest_array(arrays[str(index)]) != digest:
            _changed(path / LATENTS_FILE, f"latents {index} are not those that {GOLDEN_FILE} names")
    return tuple(arrays[str(index)] for index in range(len(document["latents"])))


def _read_picture(file: Path) -> Image.Image:
    try:
        with Image.open(file) as picture:
            picture.load()
            return picture
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # Pillow's, all
        _changed(file, "it is missing" if isinstance(error, FileNotFoundError) else f"it is no picture ({error})")


def _read_arrays(file: Path) -> dict[str, Array]:
    if not file.is_file():
        return {}
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        arrays: dict[str, Array] = load_file(file)
        return arrays
    except (OSError, SafetensorError) as error:
        _changed(file, f"it cannot be read ({error})")


def _changed(file: Path, what: str) -> NoReturn:
    raise RecordDigestError(
        f"The golden {file.parent} was changed after it was recorded: {file.name}: {what}. Use its files as they were "
        "recorded, or record it anew.",
        str(file),
    )


def _bad(name: str, what: str, file: Path) -> NoReturn:
    raise BadRecordError(f"Field {name!r} of the golden {file} {what}. Record it anew.", name, str(file))
