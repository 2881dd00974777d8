"""The one way in which versioned JSON documents are read, checked and written.

A format is a :class:`Format` of a type that ``msgspec`` converts to. Whether unknown fields are refused is the type's
own to say (``forbid_unknown_fields``). Its errors are the format's own, and name the file, the field and what was
expected.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Generic, NoReturn, TypeAlias, TypeVar

import msgspec

from pipevault.digest import canonical_json, digest_json

DocumentT = TypeVar("DocumentT")

Sha256: TypeAlias = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{64}\Z")]

_NAMED = re.compile(r"object (?:missing required|contains (unknown)) field `(.*)`", re.DOTALL)


@dataclass(frozen=True)
class Problem:
    """A problem of a document; as text a sentence. ``source`` is its file; ``field`` where in it, as in ``seeds[1]``,
    or empty. ``version`` is the document's if that is what is wrong.
    """

    source: str
    what: str
    field: str = ""
    version: int | None = None

    @property
    def path(self) -> Path:
        return Path(self.source)

    def __str__(self) -> str:
        return f"{self.source} {'is damaged: ' if self.version is None else ''}{self.what}."


MakeError = Callable[[Problem], Exception]


@dataclass(frozen=True)
class Format(Generic[DocumentT]):
    """A versioned JSON format: an object of ``type`` with ``version`` in ``version_field``.

    ``newer``, ``older``, ``foreign`` (anything but a JSON object with that field) and ``edited`` are where the error is
    another than what ``damaged`` makes. ``digest_field``: that of the SHA-256 of the rest in canonical JSON.
    ``canonical``: other bytes than :func:`~pipevault.digest.canonical_json` gives are refused.
    """

    type: type[DocumentT]
    version_field: str
    version: int
    damaged: MakeError = ValueError
    newer: MakeError | None = None
    older: MakeError | None = None
    foreign: MakeError | None = None
    edited: MakeError | None = None
    digest_field: str = ""
    canonical: bool = True

    def parse(self, data: str | bytes, source: str | Path) -> DocumentT:
        """Read ``data``, the content of ``source``. Raises what the format makes of a :class:`Problem`."""
        try:
            # Bytes that are compared need no look at each object and number.
            document = json.loads(data) if self.canonical else _loads_strictly(data)
        except (ValueError, RecursionError) as error:
            raise (self.foreign or self.damaged)(Problem(str(source), f"it is not JSON ({error})")) from error
        parsed = self.check(document, source)
        if self.canonical:
            try:
                if canonical_json(document) != data:
                    _loads_strictly(data)
                    raise ValueError("expected canonical JSON, as it was written")
            except (ValueError, RecursionError) as error:
                raise self.damaged(Problem(str(source), str(error))) from error
        return parsed

    def check(self, document: Any, source: str | Path, *, within: str = "") -> DocumentT:
        """Convert a parsed document, the field ``within`` of its file or all of it. Raises like :meth:`parse`."""
        if not isinstance(document, dict) or self.version_field not in document:
            what = _at(within, f"expected an object with the field `{self.version_field}`")
            raise (self.foreign or self.damaged)(Problem(str(source), what, self.version_field))
        version = document[self.version_field]
        field = f"{within}.{self.version_field}".lstrip(".")
        if type(version) is not int or version < 1:
            raise self.bad(source, field, f"expected an integer from 1 on, got {_shown(version)}")
        if version != self.version:
            make = self.newer if version > self.version else self.older
            what = f"is of version {version} (`{field}`), not {self.version}"
            raise (make or self.damaged)(Problem(str(source), what, field, version))
        if self.digest_field:
            self._check_digest(document, source)
        try:
            return msgspec.convert(document, self.type)
        except (msgspec.ValidationError, UnicodeError, RecursionError) as error:
            raise self.bad(source, within, error) from error

    def bad(self, source: str | Path, field: str, what: str | Exception) -> Exception:
        """Return the error for a field that is not as it must be; an error of msgspec says where in it."""
        if isinstance(what, Exception):
            what, field = _read_message(str(what), field)
        return self.damaged(Problem(str(source), _at(field, what), field))

    def _check_digest(self, document: dict[str, Any], source: str | Path) -> None:
        if self.digest_field not in document:
            raise self.bad(source, self.digest_field, "missing")
        try:
            computed = digest_json({n: value for n, value in document.items() if n != self.digest_field}).hex
        except (ValueError, RecursionError) as error:
            raise self.bad(source, self.digest_field, f"the rest is not plain JSON ({error})") from error
        if document[self.digest_field] != computed:
            what = f"expected the digest of the rest, {computed}, got {_shown(document[self.digest_field])}"
            raise (self.edited or self.damaged)(Problem(str(source), _at(self.digest_field, what), self.digest_field))

    def write(self, document: DocumentT) -> bytes:
        return canonical_json(msgspec.to_builtins(document))


def _read_message(message: str, within: str) -> tuple[str, str]:
    """The problem and its field in a message of msgspec, as in ``Expected `int`, got `str` - at `$.seeds[1]```."""
    what, _, place = message.partition(" - at ")
    field = within + place.removeprefix("`key` in ").strip("`").removeprefix("$")
    what = what[:1].lower() + what[1:]
    if named := _NAMED.fullmatch(what):
        field += f".{named[2]}"
        what = "unknown" if named[1] else "missing"
    return what, field.lstrip(".")


def _at(field: str, what: str) -> str:
    return f"field `{field}`: {what}" if field else what


def _shown(value: Any) -> str:
    # A deeply nested value has no repr.
    return f"`{type(value).__name__}`" if isinstance(value, (list, dict)) else f"{value!r:.80}"


def _loads_strictly(data: str | bytes) -> Any:
    return json.loads(data, object_pairs_hook=_without_duplicates, parse_constant=_refuse_constant, parse_float=_finite)


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    document = dict(pairs)
    if len(document) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"expected each field once, got `{twice}` twice")
    return document


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"expected a finite number, got {name}")


def _finite(text: str) -> float:
    number = float(text)
    return number if math.isfinite(number) else _refuse_constant(text)
