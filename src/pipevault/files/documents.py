"""The one way in which versioned JSON documents are checked and written.

A format is a :class:`Format` of a ``msgspec.Struct``; whether unknown fields are refused is the struct's own to say
(``forbid_unknown_fields``). Its errors are the format's own, and name the file, the field and what was expected.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, NoReturn, TypeVar

import msgspec

from pipevault.digest import canonical_json

DocumentT = TypeVar("DocumentT", bound=msgspec.Struct)
MakeError = Callable[[str, Path], Exception]
"""From what is wrong and the file."""


@dataclass(frozen=True)
class Format(Generic[DocumentT]):
    """A versioned JSON format: canonical JSON of ``type``, with ``version`` in ``version_field``."""

    type: type[DocumentT]
    version_field: str
    version: int
    damaged: MakeError
    newer: MakeError
    older: MakeError

    def parse(self, data: bytes, path: Path) -> DocumentT:
        """The document in ``data``, the bytes of ``path``. Raises what :attr:`damaged`, :attr:`newer` and
        :attr:`older` make.
        """
        try:
            document = json.loads(data, object_pairs_hook=_without_duplicates, parse_constant=_refuse_constant)
            version = self._version(document)
            if version == self.version:
                parsed = msgspec.convert(document, self.type)
                if canonical_json(document) != data:
                    raise ValueError("expected canonical JSON, as it was written")
                return parsed
        except (ValueError, RecursionError) as error:
            raise self.damaged(f"{path} is damaged: {error}.", path) from error
        make = self.newer if version > self.version else self.older
        raise make(f"{path} is of version {version} (`{self.version_field}`), not {self.version}.", path)

    def write(self, document: DocumentT) -> bytes:
        """The canonical bytes of ``document``."""
        return canonical_json(msgspec.to_builtins(document))

    def _version(self, document: Any) -> int:
        version = document.get(self.version_field) if isinstance(document, dict) else None
        if type(version) is not int or version < 1:
            raise ValueError(f"expected an object with an integer from 1 on in `{self.version_field}`")
        return version


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    document = dict(pairs)
    if len(document) < len(pairs):
        raise ValueError("expected each field once")
    return document


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"expected a finite number, got {name}")
