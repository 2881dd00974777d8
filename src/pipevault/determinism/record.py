"""The run record of a generation: what was asked for, what it ran on, what came out.

A JSON document (``record_schema.json``), in short::

    {"pipevault_record": 2, "created_at": "2026-01-31T12:00:00+00:00",
     "pipeline": {"class": "StableDiffusionPipeline", "model": "org/name", "revision": null, "scheduler": "…"},
     "call": {"prompt": "a seven", "num_inference_steps": 12, ...},
     "seeds": {"root": 7, "samples": [4312, 977], "source": "argument", "streams": {}},
     "level": {"asked": "repeatable", "achieved": "repeatable", "flags": {...}, "notes": []},
     "key": "<key>", "manifest": "<sha256>", "graphs": {"unet": {"<key>": "<sha256>"}}, "outcome": "hit",
      "weights": {"unet": "<sha256>"},
     "versions": {"torch": "2.13.0"}, "machine": {...},
     "results": {"noise": "<sha256>", "latents": "<sha256>", "pixels": ["<sha256>", "<sha256>"], "values": null,
                 "undigested": {}},
     "seconds": {"waiting": 0.0, "drawing": 1.2}, "sample": 1, "digest": "<sha256>"}

``digest`` covers all the rest in canonical JSON, so an edited record is noticed. It is no signature: whoever edits a
record can compute it again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from datetime import datetime, timezone
from typing import Any, NoReturn

from pipevault.determinism.describe import describe, digest_array, pixels_sha256
from pipevault.determinism.record_schema import first_offence, schema
from pipevault.digest import Digest, canonical_json, digest_json
from pipevault.errors import BadRecordError, NewerRecordError, NoRecordError, OldRecordError, RecordDigestError

__all__ = ["RECORD_MARK", "RECORD_VERSION", "RunRecord", "describe", "digest_array", "pixels_sha256", "schema"]

RECORD_VERSION = 2
RECORD_LIMIT_BYTES = 1 << 25
"""What is longer is not read: parsed JSON may take forty times its size in memory."""

RECORD_MARK = "pipevault_record"
"""The field that makes a JSON document a run record; its value is the version."""


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """One generation. All fields are plain JSON as ``record_schema.json`` describes them; treat them as read-only.

    They are copied through JSON, where a tuple becomes a list, so that a record equals what is read back from it.
    :class:`BadRecordError` names the field that is not as described. ``sample`` tells which sample of the batch a
    file holds; ``None`` stands for all of them.
    """

    pipeline: Mapping[str, Any]
    call: Mapping[str, Any]
    seeds: Mapping[str, Any]
    level: Mapping[str, Any]
    results: Mapping[str, Any]
    outcome: str
    key: str | None = None
    manifest: str | None = None
    graphs: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    weights: Mapping[str, str] = field(default_factory=dict)
    versions: Mapping[str, str | None] = field(default_factory=dict)
    machine: Mapping[str, Any] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)
    created_at: str = field(default_factory=_now)
    sample: int | None = None

    def __post_init__(self) -> None:
        for item in fields(self):
            object.__setattr__(self, item.name, _plain_json(getattr(self, item.name), item.name))
        _check(self.to_document(), "")

    def __hash__(self) -> int:
        return hash(self.digest)

    @property
    def digest(self) -> Digest:
        """Over all fields and the version."""
        return digest_json(self._content())

    def of_sample(self, index: int | None) -> RunRecord:
        """The same record for the file that holds sample ``index``; :class:`BadRecordError` if it is negative."""
        return self if index == self.sample else replace(self, sample=index)

    def to_document(self) -> dict[str, Any]:
        content = self._content()
        return {**content, "digest": digest_json(content).hex}

    def to_json(self) -> str:
        """Canonical JSON, one line."""
        return canonical_json(self.to_document()).decode("utf-8")

    @classmethod
    def from_json(cls, text: str | bytes, *, source: str = "") -> RunRecord:
        """Inverse of :meth:`to_json`; ``source`` names the file for messages.

        :class:`NoRecordError` (no JSON, or another document), :class:`NewerRecordError`, :class:`OldRecordError`,
        :class:`RecordDigestError`, :class:`BadRecordError`, looked for in this order.
        """
        if len(text) > RECORD_LIMIT_BYTES:
            raise BadRecordError(
                f"The run record{_of(source)} is longer than {RECORD_LIMIT_BYTES >> 20} MiB, which no record may be.",
                "",
                source,
            )
        try:
            document = json.loads(text, parse_constant=_no_constant)
        except (ValueError, RecursionError) as error:
            raise NoRecordError(
                f"{source or 'The text'} is no run record: it is not JSON ({error}).", source
            ) from error
        return cls.from_document(document, source=source)

    @classmethod
    def from_document(cls, document: Any, *, source: str = "") -> RunRecord:
        """Like :meth:`from_json`, from JSON that is already parsed."""
        _check_version(document, source)
        content = dict(document)
        _check_digest(content, content.pop("digest", None), source)
        _check(document, source)
        del content[RECORD_MARK]
        return cls(**content)

    def _content(self) -> dict[str, Any]:
        return {RECORD_MARK: RECORD_VERSION, **{item.name: getattr(self, item.name) for item in fields(self)}}


def _check_version(document: Any, source: str) -> None:
    if not isinstance(document, dict) or RECORD_MARK not in document:
        raise NoRecordError(
            f"{source or 'The document'} is no run record: it has no field {RECORD_MARK!r}. Give a file that "
            "pipevault saved, or its sidecar.",
            source,
        )
    version = document[RECORD_MARK]
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        _fail(RECORD_MARK, f"is {version!r}, which is no version", source)
    if version < RECORD_VERSION:
        raise OldRecordError(
            f"The run record{_of(source)} is of version {version}, which noted noise in another way; this pipevault "
            f"reads version {RECORD_VERSION}. Draw the output again, or read it with the pipevault that wrote it.",
            source,
        )
    if version > RECORD_VERSION:
        raise NewerRecordError(
            f"The run record{_of(source)} is of version {version}; this pipevault reads version {RECORD_VERSION}. "
            "Upgrade pipevault.",
            source,
        )


def _check_digest(content: dict[str, Any], stated: Any, source: str) -> None:
    if stated is None:
        _fail("digest", "is missing", source)
    try:
        computed = digest_json(content).hex
    except (ValueError, RecursionError) as error:
        _fail("digest", f"cannot be checked, because the record is no plain JSON ({error})", source)
    if stated != computed:
        raise RecordDigestError(
            f"The run record{_of(source)} was changed after it was written: its content has the digest {computed}, "
            f"and it states {stated!r}. Use the file as it was saved.",
            source,
        )


def _check(document: Mapping[str, Any], source: str) -> None:
    if offence := first_offence(document):
        _fail(*offence, source)


def _plain_json(value: Any, name: str) -> Any:
    try:
        return json.loads(canonical_json(dict(value) if isinstance(value, Mapping) else value))
    except (TypeError, ValueError, RecursionError) as error:
        raise BadRecordError(f"Field {name!r} of the run record is no plain JSON: {error}.", name) from error


def _fail(name: str, complaint: str, source: str) -> NoReturn:
    raise BadRecordError(f"Field {name!r} of the run record{_of(source)} {complaint}.", name, source)


def _of(source: str) -> str:
    return f" of {source}" if source else ""


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")
