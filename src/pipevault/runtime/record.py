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

``digest`` covers all the rest in canonical JSON, so an edited record is noticed. It is not a signature: whoever edits a
record can compute it again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from datetime import datetime, timezone
from typing import Any

from pipevault.digest import Digest, canonical_json, digest_json
from pipevault.errors import (
    BadRecordError,
    NewerRecordError,
    NoRecordError,
    OldRecordError,
    RecordDigestError,
    RecordError,
)
from pipevault.files.documents import Format, MakeError, Problem
from pipevault.runtime.record_schema import first_offence

RECORD_VERSION = 2
RECORD_LIMIT_BYTES = 1 << 25
"""A longer one is not read: parsed JSON may take forty times its size in memory."""

RECORD_MARK = "pipevault_record"
"""The field that makes a JSON document a run record; its value is the version."""


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """One generation. All fields are plain JSON as ``record_schema.json`` describes them, copied through JSON, so that
    a record equals what is read back from it; treat them as read-only. :class:`BadRecordError` names the field that is
    not as described. ``sample`` tells which sample of the batch a file holds; ``None`` stands for all of them.
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
    created_at: str = field(default_factory=lambda: datetime.now(timezone.utc).isoformat(timespec="seconds"))
    sample: int | None = None

    def __post_init__(self) -> None:
        for item in fields(self):
            object.__setattr__(self, item.name, _plain_json(getattr(self, item.name), item.name))
        _check(self.to_document(), "")

    def __hash__(self) -> int:
        return hash(self.digest)

    @property
    def digest(self) -> Digest:
        """The digest over all fields and the version."""
        return digest_json(self._content())

    def of_sample(self, index: int | None) -> RunRecord:
        """Return the record for the file that holds sample ``index``; :class:`BadRecordError` if it is negative."""
        return self if index == self.sample else replace(self, sample=index)

    def to_document(self) -> dict[str, Any]:
        return {**self._content(), "digest": self.digest.hex}

    def to_json(self) -> str:
        """Return canonical JSON, one line."""
        return canonical_json(self.to_document()).decode("utf-8")

    @classmethod
    def from_json(cls, text: str | bytes, *, source: str = "") -> RunRecord:
        """Read what :meth:`to_json` wrote; ``source`` names the file for messages.

        :class:`NoRecordError` (no JSON, or another document), :class:`NewerRecordError`, :class:`OldRecordError`,
        :class:`RecordDigestError`, :class:`BadRecordError`, looked for in this order.
        """
        if len(text) > RECORD_LIMIT_BYTES:
            raise BadRecordError(
                f"The run record{_of(source)} is longer than {RECORD_LIMIT_BYTES >> 20} MiB, which no record may be.",
                "",
                source,
            )
        return cls._checked(_FORMAT.parse(text, source), source)

    @classmethod
    def from_document(cls, document: Any, *, source: str = "") -> RunRecord:
        """Read like :meth:`from_json`, from JSON that is already parsed."""
        return cls._checked(_FORMAT.check(document, source), source)

    @classmethod
    def _checked(cls, document: dict[str, Any], source: str) -> RunRecord:
        _check(document, source)
        return cls(**{name: value for name, value in document.items() if name not in (RECORD_MARK, "digest")})

    def _content(self) -> dict[str, Any]:
        return {RECORD_MARK: RECORD_VERSION, **vars(self)}


def _bad(problem: Problem) -> BadRecordError:
    return BadRecordError(f"The run record{_of(problem.source)}: {problem.what}.", problem.field, problem.source)


def _error(kind: type[RecordError], text: str) -> MakeError:
    def make(problem: Problem) -> RecordError:
        source = problem.source
        return kind(text.format(of=_of(source), what=problem.what, source=source or "The document"), source)

    return make


_FORMAT = Format(
    dict[str, Any],
    RECORD_MARK,
    RECORD_VERSION,
    damaged=_bad,
    newer=_error(NewerRecordError, "The run record{of} {what}. Upgrade pipevault."),
    older=_error(
        OldRecordError,
        "The run record{of} {what}; version 1 noted noise in another way. Draw the output again, or read it with the "
        "pipevault that wrote it.",
    ),
    foreign=_error(
        NoRecordError, "{source} is not a run record: {what}. Give a file that pipevault saved, or its sidecar."
    ),
    edited=_error(
        RecordDigestError, "The run record{of} was changed after it was written: {what}. Use the file as it was saved."
    ),
    digest_field="digest",
    canonical=False,
)
"""The fields are what ``record_schema.json`` says, the published description."""


def _check(document: Mapping[str, Any], source: str) -> None:
    if offence := first_offence(document):
        raise _FORMAT.bad(source, *offence)


def _plain_json(value: Any, name: str) -> Any:
    try:
        return json.loads(canonical_json(dict(value) if isinstance(value, Mapping) else value))
    except (TypeError, ValueError, RecursionError) as error:
        raise BadRecordError(f"Field {name!r} of the run record is not plain JSON: {error}.", name) from error


def _of(source: str) -> str:
    return f" of {source}" if source else ""
