"""The contract that each versioned JSON format keeps."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from helpers.golden_runs import a_golden, a_run, picture
from helpers.sweeps import sweep_result
from pipevault.digest import canonical_json, digest_bytes, digest_json
from pipevault.errors import (
    BadRecordError,
    BundleError,
    CorruptEntryError,
    DamagedVaultError,
    NewerBundleError,
    NewerRecordError,
    NewerVaultError,
    NoRecordError,
    PinError,
    RecordDigestError,
    SettingsError,
)
from pipevault.evidence.golden import files as golden
from pipevault.evidence.sweep import result as sweep
from pipevault.evidence.sweep.result import SweepResult
from pipevault.files.documents import Format
from pipevault.graphs import document as part
from pipevault.key import Key
from pipevault.runtime import record, recorded_weights
from pipevault.runtime.record import RunRecord
from pipevault.store import manifest, marker
from pipevault.store.bundle import zip_file
from pipevault.store.manifest import ArtifactRef, Manifest
from pipevault.store.retention import pins
from pipevault.store.stats import event_log
from pipevault.store.trust import signature

PATH = Path("folder/kept.json")
SHA256 = "a" * 64
TIME = "2025-01-31T12:00:00+00:00"


@dataclass(frozen=True)
class Case:
    """A format, a document of it, and what reading it raises. ``parse`` is that of the format if nothing else is."""

    form: Format[Any]
    document: dict[str, Any]
    error: type[Exception]
    newer: type[Exception]
    foreign: type[Exception]
    refuses_unknown: bool
    read: Callable[[bytes, Path], Any]

    def parse(self, document: dict[str, Any]) -> Any:
        """Read ``document`` with the digest that its content has, where it has that of the case's."""
        name = self.form.digest_field
        if name and document.get(name) == self.document[name]:
            rest = {field: value for field, value in document.items() if field != name}
            document = {**rest, name: digest_json(rest).hex}
        return self.read(canonical_json(document), PATH)


def case(
    form: Format[Any],
    document: dict[str, Any],
    error: type[Exception],
    newer: type[Exception] | None = None,
    foreign: type[Exception] | None = None,
    *,
    refuses_unknown: bool = True,
    read: Callable[[bytes, Path], Any] | None = None,
) -> Case:
    return Case(form, document, error, newer or error, foreign or error, refuses_unknown, read or form.parse)


MANIFEST = json.loads(
    Manifest(Key({"dtype": {"unet": "float16"}}), {}, (ArtifactRef(digest_bytes(b"a"), 1, "a"),), {}, TIME).to_bytes()
)
RUN = a_run(picture(0))
GOLDEN = golden._to_document(a_golden(Path(), RUN))
FORMATS = [
    case(pins._FORMAT, {"created_at": TIME, "key": SHA256, "pin_version": 1}, PinError),
    case(marker._FORMAT, {"pipevault_vault": 2}, DamagedVaultError, NewerVaultError, refuses_unknown=False),
    case(zip_file._FORMAT, {"pipevault_vault": 2}, BundleError, NewerBundleError),
    case(manifest._FORMAT, MANIFEST, CorruptEntryError, NewerVaultError),
    case(manifest._KEY_FORMAT, MANIFEST["key"], CorruptEntryError, NewerVaultError),
    case(
        signature._FORMAT,
        {
            **{name: "text" for name in ("algorithm", "key", "manifest", "public_key", "signature")},
            "signature_version": 1,
        },
        ValueError,
        NewerVaultError,
    ),
    case(
        event_log._FORMAT,
        {"rows": [[SHA256, "hit", "", {"times": 1, "seconds": 0.5}]], "since": 1, "totals_version": 2},
        ValueError,
        NewerVaultError,
        refuses_unknown=False,
    ),
    case(recorded_weights._FORMAT, {"pipevault_weights": 1, "sha256": SHA256}, ValueError, refuses_unknown=False),
    case(part._FORMAT, {"pipevault_part": 4, "graphs": [], "identity": None}, CorruptEntryError, refuses_unknown=False),
    case(part._SAVED_FORMAT, {"pipevault_saved": 1, "parts": ["unet"]}, CorruptEntryError, refuses_unknown=False),
    case(
        record._FORMAT,
        RUN.record.to_document(),
        BadRecordError,
        NewerRecordError,
        NoRecordError,
        read=lambda data, path: RunRecord.from_json(data, source=str(path)),
    ),
    case(golden._FORMAT, GOLDEN, BadRecordError, NewerRecordError, RecordDigestError),
    case(
        sweep._FORMAT,
        json.loads(sweep_result().to_json()),
        SettingsError,
        read=lambda data, path: SweepResult.from_json(data, source=str(path)),
    ),
]

each_format = pytest.mark.parametrize("case", FORMATS, ids=[f"{case.form.version_field}" for case in FORMATS])


def optional(case: Case) -> set[str]:
    return {"found"} if case.form is sweep._FORMAT else set()


@each_format
def test_what_was_written_is_read(case: Case) -> None:
    case.parse(case.document)
    if case.form.canonical:
        data = canonical_json(case.document)
        assert case.form.write(case.form.parse(data, PATH)) == data
    else:
        case.read(json.dumps(case.document, indent=1).encode(), PATH)


@each_format
def test_each_field_is_checked(case: Case) -> None:
    for field in case.document:
        missing = {name: value for name, value in case.document.items() if name != field}
        bad = case.document | {field: True}
        for document in (bad,) if field in optional(case) else (bad, missing):
            with pytest.raises((case.error, case.foreign, RecordDigestError), match=field) as caught:
                case.parse(document)
            assert PATH.name in str(caught.value)


@each_format
def test_an_unknown_field(case: Case) -> None:
    document = case.document | {"unknown_field": 1}
    if not case.refuses_unknown:
        case.parse(document)
        return
    with pytest.raises(case.error, match="unknown_field") as caught:
        case.parse(document)
    assert PATH.name in str(caught.value)


@each_format
def test_other_versions_are_named(case: Case) -> None:
    field, version = case.form.version_field, case.form.version
    for newer in (version + 1, 10**30):
        with pytest.raises(case.newer, match=f"of version {newer} .*{field}.*, not {version}") as caught:
            case.parse({field: newer, "unknown_field": 1})
        assert PATH.name in str(caught.value)
    others: list[Any] = [0, -1, True, 1.0, "1", None, [[1]], {}]
    for other in others:
        with pytest.raises(case.error, match=f"{field}.*expected an integer from 1 on") as caught:
            case.parse(case.document | {field: other})
        assert PATH.name in str(caught.value)


@each_format
@pytest.mark.parametrize("data", [b"", b"\xff", b"[]", b"null", b'"text"', b"{}", b"[" * 100_000, b'{"a":' * 100_000])
def test_what_is_another_document(case: Case, data: bytes) -> None:
    with pytest.raises(case.foreign) as caught:
        case.read(data, PATH)
    assert PATH.name in str(caught.value)


@each_format
def test_what_is_no_plain_json(case: Case) -> None:
    data = canonical_json(case.document)[:-1]
    for tail in (b',"zz":NaN}', b',"zz":-Infinity}', b',"zz":1e999}', b',"zz":1,"zz":1}'):
        with pytest.raises((case.error, case.foreign)) as caught:
            case.read(data + tail, PATH)
        assert PATH.name in str(caught.value)


@each_format
def test_other_bytes_of_the_same_document(case: Case) -> None:
    data = canonical_json(case.document)
    for other in (data + b"\n", json.dumps(case.document, indent=1).encode()) if case.form.canonical else ():
        with pytest.raises(case.error, match="canonical"):
            case.read(other, PATH)


@each_format
def test_a_number_of_a_million_digits(case: Case) -> None:
    data = canonical_json(case.document)[:-1] + b',"zz":' + b"9" * 1_000_000 + b"}"
    with pytest.raises((case.error, case.foreign)):
        case.read(data, PATH)
