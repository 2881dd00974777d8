"""The manifest of an entry: what was frozen under a key, which artifacts hold it, and which other entries it needs.

On disk it is canonical JSON (sorted keys, no white space, UTF-8, nothing after it), shown here with line
breaks::

    {"artifacts": [{"digest": "<sha256>", "name": "graph.so", "size_bytes": 612728}],
     "created_at": "2025-01-31T12:00:00+00:00",
     "info": {},
     "key": {"digest": "<key>", "factors": {"dtype": {"unet": "float16"}}, "key_version": 2},
     "manifest_version": 2,
     "needs": ["<key of another entry>"],
     "parts": {},
     "self_digest": "<sha256 of this document's canonical JSON without self_digest>"}

``needs`` is sorted: a plan needs its graphs, a graph nothing. A needed entry may be absent. ``parts`` and ``info`` are
plain JSON that the store keeps and does not read. The self digest notices edits and damage; it proves no origin.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import msgspec

from pipevault.digest import Digest, canonical_json, digest_bytes
from pipevault.errors import CorruptEntryError, NewerVaultError
from pipevault.files.documents import Format, Problem, Sha256
from pipevault.key import KEY_VERSION, Key
from pipevault.reading import read_file
from pipevault.store.layout import Layout

MANIFEST_VERSION = 2
LARGEST_SIZE_BYTES = 2**63 - 1


class _Artifact(msgspec.Struct, forbid_unknown_fields=True):
    digest: Sha256
    name: str
    size_bytes: Annotated[int, msgspec.Meta(ge=0, le=LARGEST_SIZE_BYTES)]


class _Key(msgspec.Struct, forbid_unknown_fields=True):
    digest: Sha256
    factors: dict[str, Any]
    key_version: int


class _Document(msgspec.Struct, forbid_unknown_fields=True):
    artifacts: list[_Artifact]
    created_at: str
    info: dict[str, Any]
    key: dict[str, Any]
    manifest_version: int
    needs: list[Sha256]
    parts: dict[str, Any]
    self_digest: Sha256


class _Shown(msgspec.Struct):
    artifacts: list[_Artifact]
    created_at: str
    info: dict[str, Any]
    key: _Key
    needs: list[Sha256]


_decode_shown = msgspec.json.Decoder(_Shown).decode


def _damaged(problem: Problem) -> CorruptEntryError:
    return CorruptEntryError(f"The manifest {problem}", problem.path)


def _newer(problem: Problem) -> NewerVaultError:
    return NewerVaultError(f"The manifest {problem} Upgrade pipevault, or give another folder.", problem.path)


_FORMAT = Format(_Document, "manifest_version", MANIFEST_VERSION, damaged=_damaged, newer=_newer)
_KEY_FORMAT = Format(_Key, "key_version", KEY_VERSION, damaged=_damaged, newer=_newer)

_SCALARS = frozenset({str, int, bool, type(None)})


def now_utc() -> str:
    """Return the present as a manifest writes it: ISO 8601, UTC, whole seconds."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


@dataclass(frozen=True)
class ArtifactRef:
    """One artifact of an entry. ``name``: a relative path such as ``graph.so``, unique in the entry."""

    digest: Digest
    size_bytes: int
    name: str

    def __post_init__(self) -> None:
        name = self.name
        if not name.isprintable() or "\\" in name or {"", ".", ".."} & set(name.split("/")):
            raise ValueError(f"Artifact name {name!r} is not a plain relative path such as 'graph.so'.")


@dataclass(frozen=True)
class Manifest:
    """Immutable once published. ``parts`` and ``info`` are copied to plain JSON, ``needs`` is sorted and freed of
    doubles. ``ValueError``: something is not plain JSON, or two artifacts share a name or disagree about a size.
    """

    key: Key
    parts: Mapping[str, Any]
    artifacts: tuple[ArtifactRef, ...]
    info: Mapping[str, Any]
    created_at: str
    needs: tuple[Digest, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "parts", _plain(self.parts, "parts"))
        object.__setattr__(self, "info", _plain(self.info, "info"))
        object.__setattr__(self, "artifacts", tuple(self.artifacts))
        object.__setattr__(self, "needs", tuple(sorted(set(self.needs))))
        names = [ref.name for ref in self.artifacts]
        if len(set(names)) != len(names):
            raise ValueError(f"Two artifacts share a name: {', '.join(sorted(names))}.")
        if len({(ref.digest, ref.size_bytes) for ref in self.artifacts}) != len(self.artifact_sizes):
            raise ValueError("Two artifacts have one digest and different sizes.")
        if not self.created_at:
            raise ValueError(f"created_at is {self.created_at!r}: expected an ISO 8601 time.")

    @property
    def artifact_sizes(self) -> Mapping[Digest, int]:
        return {ref.digest: ref.size_bytes for ref in self.artifacts}

    @property
    def size_bytes(self) -> int:
        """The bytes of the artifacts; one that has two names counts once, as on disk."""
        return sum(self.artifact_sizes.values())

    @cached_property
    def manifest_digest(self) -> Digest:
        """The SHA-256 over the canonical JSON of everything else in the document: what ``self_digest`` holds."""
        return digest_bytes(canonical_json(self._body()))

    def to_bytes(self) -> bytes:
        return canonical_json({**self._body(), "self_digest": self.manifest_digest.hex})

    @classmethod
    def from_bytes(cls, data: bytes, path: Path) -> Manifest:
        """Parse and verify; ``path`` is only named in errors. :class:`CorruptEntryError`, :class:`NewerVaultError`."""
        try:
            return _parse(data, path)
        except CorruptEntryError:  # a ValueError too
            raise
        except (ValueError, RecursionError) as error:  # RecursionError: parts that are deeply nested
            raise _damaged(Problem(str(path), str(error).removesuffix("."))) from error

    @classmethod
    def published(cls, data: bytes) -> Manifest:
        """Return the manifest, without its ``parts``, of a file whose ``self_digest`` holds, so that nothing is checked
        again. ``ValueError``: it is not a manifest all the same.
        """
        shown = _decode_shown(data)
        needs = tuple(map(Digest, shown.needs))
        return cls(Key(shown.key.factors), {}, _refs(shown.artifacts), shown.info, shown.created_at, needs)

    def _body(self) -> dict[str, Any]:
        return {
            "artifacts": [
                {"digest": ref.digest.hex, "name": ref.name, "size_bytes": ref.size_bytes} for ref in self.artifacts
            ],
            "created_at": self.created_at,
            "info": self.info,
            "key": {"digest": self.key.digest.hex, "factors": dict(self.key.factors), "key_version": KEY_VERSION},
            "manifest_version": MANIFEST_VERSION,
            "needs": [key.hex for key in self.needs],
            "parts": self.parts,
        }


def _parse(data: bytes, path: Path) -> Manifest:
    document = _FORMAT.parse(data, path)
    # The bytes are canonical and self_digest sorts last: cutting it off leaves the canonical form of the rest.
    rest = data[: data.rindex(b',"self_digest":')] + b"}"
    if digest_bytes(rest).hex != document.self_digest:
        raise ValueError("its content does not match its self_digest, so it was changed after it was published")
    named = _KEY_FORMAT.check(document.key, path, within="key")
    key = Key(named.factors)
    if key.digest.hex != named.digest:
        raise ValueError("field `key.digest`: the digest of its factors is not the key that it names")
    if document.needs != sorted(set(document.needs)):
        raise ValueError("field `needs`: it is not sorted, or names an entry twice")
    return Manifest(
        key=key,
        parts=document.parts,
        artifacts=_refs(document.artifacts),
        info=document.info,
        created_at=document.created_at,
        needs=tuple(map(Digest, document.needs)),
    )


def _refs(artifacts: list[_Artifact]) -> tuple[ArtifactRef, ...]:
    return tuple(ArtifactRef(Digest(item.digest), item.size_bytes, item.name) for item in artifacts)


@dataclass(frozen=True)
class BrokenManifest:
    """A file at a manifest's place that is not the manifest of ``key``; ``reason`` is a sentence."""

    path: Path
    reason: str
    key: Digest


def read_manifest(layout: Layout, key: Digest) -> Manifest | None:
    """Return the manifest of ``key``, verified; ``None`` if there is none. Raises like :func:`parse_manifest`."""
    path = layout.manifest_file(key)
    try:
        data = read_file(path)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise CorruptEntryError(f"The manifest {path} cannot be read: {error.strerror}.", path) from error
    return parse_manifest(data, path, key)


def parse_manifest(data: bytes, path: Path, key: Digest) -> Manifest:
    """Return the manifest of ``key`` in the bytes of the file ``path``. :class:`CorruptEntryError` if it is damaged,
    edited or another key's; :class:`NewerVaultError`.
    """
    manifest = Manifest.from_bytes(data, path)
    if manifest.key.digest != key:
        raise CorruptEntryError(
            f"The manifest {path} is damaged: it belongs to key {manifest.key.digest.short}, not {key.short}", path
        )
    return manifest


def _plain(value: Any, where: str) -> Any:
    """A deep copy of plain JSON; ``ValueError`` names the place of anything else."""
    if isinstance(value, dict) or isinstance(value, Mapping):  # noqa: SIM101 - dict first: an ABC is slow to ask
        for name in value:
            if not isinstance(name, str):
                raise ValueError(f"{where} has the key {name!r}: JSON needs text")
        return {
            name: item if type(item) in _SCALARS else _plain(item, f"{where}.{name}") for name, item in value.items()
        }
    if where in ("parts", "info"):
        raise ValueError(f"{where} must be a mapping")
    if isinstance(value, (list, tuple)):
        return [
            item if type(item) in _SCALARS else _plain(item, f"{where}[{index}]") for index, item in enumerate(value)
        ]
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{where} is {value!r}, which JSON cannot hold")
    if isinstance(value, (str, int, float)):
        return value
    raise ValueError(f"{where} is a {type(value).__name__}, not plain JSON")
