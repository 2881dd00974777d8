"""The contract that each versioned JSON format keeps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipevault.digest import canonical_json
from pipevault.errors import PinError
from pipevault.files.documents import Format
from pipevault.store import pins

PATH = Path("pins/kept.json")
FORMATS: list[tuple[Format[Any], dict[str, Any], type[Exception]]] = [
    (pins._FORMAT, {"created_at": "2025-01-31T12:00:00+00:00", "key": "a" * 64, "pin_version": 1}, PinError),
]

each_format = pytest.mark.parametrize(
    ("form", "document", "error"), FORMATS, ids=[form.version_field for form, *_ in FORMATS]
)


@each_format
def test_round_trip(form: Format[Any], document: dict[str, Any], error: type[Exception]) -> None:
    data = canonical_json(document)
    assert form.write(form.parse(data, PATH)) == data


@each_format
def test_each_field_is_checked(form: Format[Any], document: dict[str, Any], error: type[Exception]) -> None:
    for field in document:
        missing = {name: value for name, value in document.items() if name != field}
        for bad in (missing, document | {field: [True]}):
            with pytest.raises(error, match=field) as caught:
                form.parse(canonical_json(bad), PATH)
            assert str(PATH) in str(caught.value)


@each_format
def test_an_unknown_field_is_refused(form: Format[Any], document: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error, match="unknown_field"):
        form.parse(canonical_json(document | {"unknown_field": 1}), PATH)


@each_format
def test_other_versions_are_named(form: Format[Any], document: dict[str, Any], error: type[Exception]) -> None:
    newer = document | {form.version_field: form.version + 1}
    with pytest.raises(error, match=f"of version {form.version + 1}.*Upgrade"):
        form.parse(canonical_json(newer | {"unknown_field": 1}), PATH)
    for version in (0, -1, True, 1.0, "1", None):
        with pytest.raises(error, match=f"xpected .*{form.version_field}"):
            form.parse(canonical_json(document | {form.version_field: version}), PATH)


@each_format
def test_what_is_no_canonical_json_is_refused(
    form: Format[Any], document: dict[str, Any], error: type[Exception]
) -> None:
    data = canonical_json(document)
    twice = data[:-1] + b"," + data[1:]
    for bad in (
        b"", b"\xff", b"[]", b"[" * 100_000, data + b"\n", json.dumps(document, indent=1).encode(), twice,
        data[:-1] + b',"z":NaN}', data[:-1] + b',"z":1e999}', b'{"a":' * 100_000,
    ):  # fmt: skip
        with pytest.raises(error, match="damaged"):
            form.parse(bad, PATH)
