"""The published JSON Schema of run records, and a check of documents against it that names the field.

Only the keywords that ``record_schema.json`` uses are understood; an unknown one is an error of the package, not
ignored. Stricter than JSON Schema in one point: 1.0 is not an integer, because it has other bytes than 1.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from importlib import resources
from typing import Any

_ELSEWHERE = frozenset(
    {
        *("$schema", "$id", "$defs", "title", "description"),
        *("$ref", "anyOf", "properties", "required", "additionalProperties", "items"),
    }
)
"""Keywords that say nothing of the value itself."""
_TYPES: Mapping[str, Callable[[Any], bool]] = {
    "object": lambda value: isinstance(value, dict),
    "array": lambda value: isinstance(value, list),
    "string": lambda value: isinstance(value, str),
    "integer": lambda value: isinstance(value, int) and not isinstance(value, bool),
    "number": lambda value: isinstance(value, (int, float)) and not isinstance(value, bool),
    "null": lambda value: value is None,
}


@cache
def schema() -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of the records that this version writes."""
    loaded: dict[str, Any] = json.loads(resources.files(__package__).joinpath("record_schema.json").read_text("utf-8"))
    return loaded


def first_offence(document: Any) -> tuple[str, str] | None:
    """The first field that is missing, unknown or wrong, as in ``seeds.samples[1]``, and what is wrong with it."""
    return next(_offences(document, schema(), ""), None)


def _offences(value: Any, rules: Mapping[str, Any], field: str) -> Iterator[tuple[str, str]]:
    for name, rule in rules.items():
        if name not in _ELSEWHERE and (complaint := _complaint(value, name, rule)):
            yield field, complaint
            return
    if "$ref" in rules:
        yield from _offences(value, schema()["$defs"][rules["$ref"].removeprefix("#/$defs/")], field)
    if "anyOf" in rules:
        offences = [next(_offences(value, choice, field), None) for choice in rules["anyOf"]]
        if all(offences):
            yield field, ", and ".join(offence[1] for offence in offences if offence)
    if isinstance(value, dict):
        yield from _offences_of_fields(value, rules, field)
    if isinstance(value, list) and "items" in rules:
        for index, item in enumerate(value):
            yield from _offences(item, rules["items"], f"{field}[{index}]")


def _offences_of_fields(value: Mapping[str, Any], rules: Mapping[str, Any], field: str) -> Iterator[tuple[str, str]]:
    properties, other = rules.get("properties", {}), rules.get("additionalProperties", True)
    prefix = f"{field}." if field else ""
    for name in rules.get("required", ()):
        if name not in value:
            yield prefix + name, "missing"
    for name, item in value.items():
        if name in properties:
            yield from _offences(item, properties[name], prefix + name)
        elif other is False:
            yield prefix + name, "unknown"
        elif isinstance(other, dict):
            yield from _offences(item, other, prefix + name)


def _complaint(value: Any, keyword: str, rule: Any) -> str | None:
    """Return what ``value`` itself breaks; its items and fields are looked at elsewhere."""
    match keyword:
        case "type":
            names = [rule] if isinstance(rule, str) else rule
            return None if any(_TYPES[name](value) for name in names) else f"is not of type {' or '.join(names)}"
        case "const":
            return None if value == rule and type(value) is type(rule) else f"is not {rule!r}"
        case "enum":
            return None if value in rule else f"is none of {', '.join(map(str, rule))}"
        case "pattern":
            # Not re.search as it stands: Python's "$" also matches before a last line feed.
            fits = not isinstance(value, str) or re.fullmatch(rule[1:-1], value)
            return None if fits else f"is not of the form {rule}"
        case "minLength":
            return None if not isinstance(value, str) or len(value) >= rule else "is empty"
        case "minimum":
            return None if not isinstance(value, (int, float)) or value >= rule else f"is below {rule}"
        case _:
            raise NotImplementedError(f"The record's schema uses {keyword!r}, which is not understood here.")
