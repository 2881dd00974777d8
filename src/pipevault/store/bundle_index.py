"""The first member of a bundle, ``pipevault_bundle.json``: what follows, and in which order.

Canonical JSON, shown here with line breaks::

    {"members": [{"digest": "<sha256>", "name": "artifacts/ee/eef93e…", "size_bytes": 5312211},
                 {"digest": "<sha256>", "name": "entries/<shelf>/7c2b5a….json", "size_bytes": 1480},
                 {"digest": "<sha256>", "name": "signatures/7c/7c2b5a….0123456789abcdef.json", "size_bytes": 310}],
     "pipevault_bundle": 2,
     "self_digest": "<sha256 of this document's canonical JSON without self_digest>"}

A member's name is the place that it has in a vault, ``digest`` that of its bytes; members are sorted by name. It names
no host, user or time, so that equal entries make equal bundles.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipevault.digest import Digest, canonical_json, digest_bytes
from pipevault.errors import BundleError, NewerBundleError
from pipevault.store.layout import Layout

BUNDLE_VERSION = 2
INDEX_NAME = "pipevault_bundle.json"
INDEX_LIMIT_BYTES = 32 << 20
"""Enough for some 180,000 members."""
MANIFEST_LIMIT_BYTES = 64 << 20
SIGNATURE_LIMIT_BYTES = 64 << 10

_FIELDS = frozenset({"members", "pipevault_bundle", "self_digest"})
_MEMBER_FIELDS = frozenset({"digest", "name", "size_bytes"})
_ROOT = Path("/")
_LAYOUT = Layout(_ROOT)


@dataclass(frozen=True)
class Member:
    """A file of the bundle. ``name`` is its path in a vault, with ``/``; ``digest`` that of its bytes."""

    name: str
    size_bytes: int
    digest: Digest

    @property
    def key(self) -> Digest | None:
        """The key whose manifest this is, or ``None``."""
        return _LAYOUT.key_of_manifest(_ROOT / self.name)

    @property
    def artifact(self) -> Digest | None:
        """The digest of the artifact that this is, or ``None``."""
        return _LAYOUT.digest_of_artifact(_ROOT / self.name)

    @property
    def signed_key(self) -> Digest | None:
        """The key of the entry that this is a signature for, or ``None``."""
        return _LAYOUT.key_of_signature(_ROOT / self.name)


@dataclass(frozen=True)
class BundleIndex:
    """``ValueError`` says what is wrong with ``members``: an order, a name, a size, or nothing to import."""

    members: tuple[Member, ...]

    def __post_init__(self) -> None:
        names = [member.name for member in self.members]
        if names != sorted(set(names)):
            raise ValueError("its members are not sorted, or two share a name")
        for member in self.members:
            _check_member(member)
        if not self.keys:
            raise ValueError("it holds no entry")

    @property
    def keys(self) -> tuple[Digest, ...]:
        """Of the entries, sorted."""
        return tuple(sorted(key for member in self.members if (key := member.key)))

    def to_bytes(self) -> bytes:
        body = self._body()
        return canonical_json({**body, "self_digest": digest_bytes(canonical_json(body)).hex})

    @classmethod
    def from_bytes(cls, data: bytes, path: Path) -> BundleIndex:
        """Parse and verify; ``path`` is only named in errors. :class:`BundleError`, :class:`NewerBundleError`."""
        try:
            return _parse(data, path)
        except (ValueError, TypeError, RecursionError) as error:  # RecursionError: deeply nested JSON
            if isinstance(error, BundleError):
                raise
            raise BundleError(
                f"The index of the bundle {path} is damaged: {error}. Nothing was imported; get the bundle again.", path
            ) from error

    def _body(self) -> dict[str, Any]:
        return {
            "members": [
                {"digest": member.digest.hex, "name": member.name, "size_bytes": member.size_bytes}
                for member in self.members
            ],
            "pipevault_bundle": BUNDLE_VERSION,
        }


def _parse(data: bytes, path: Path) -> BundleIndex:
    document = json.loads(data.decode("utf-8"))
    if not isinstance(document, dict):
        raise ValueError("it is no JSON object")
    _check_version(document.get("pipevault_bundle"), path)
    _require_fields(document, _FIELDS, "the document")
    if not isinstance(document["members"], list):
        raise ValueError("'members' must be a list")
    index = BundleIndex(tuple(_parse_member(item) for item in document["members"]))
    if index.to_bytes() != data:
        raise ValueError("its bytes are not the canonical form with its self_digest, so it was changed")
    return index


def _parse_member(item: Any) -> Member:
    if not isinstance(item, dict):
        raise ValueError("a member must be an object")
    _require_fields(item, _MEMBER_FIELDS, "a member")
    name, size_bytes = item["name"], item["size_bytes"]
    if not isinstance(name, str):
        raise ValueError(f"a member has the name {name!r}")
    if not isinstance(size_bytes, int) or isinstance(size_bytes, bool) or size_bytes < 0:
        raise ValueError(f"{name!r} has the size {size_bytes!r}")
    return Member(name, size_bytes, Digest(item["digest"]))


def _check_member(member: Member) -> None:
    name = member.name
    # A path is built from a name only after this: "entries//x", "./x" and the like are another spelling of a place.
    if not re.fullmatch(r"[A-Za-z0-9._-]+(/[A-Za-z0-9._-]+)*", name) or {".", ".."} & set(name.split("/")):
        raise ValueError(f"{name!r} is no place in a vault")
    if member.key is not None:
        limit_bytes = MANIFEST_LIMIT_BYTES
    elif member.signed_key is not None:
        limit_bytes = SIGNATURE_LIMIT_BYTES
    elif member.artifact is not None:
        if member.artifact != member.digest:
            raise ValueError(f"{name!r} is said to have the digest {member.digest.short}")
        return
    else:
        raise ValueError(f"{name!r} is no place in a vault")
    if member.size_bytes > limit_bytes:
        raise ValueError(f"{name!r} has {member.size_bytes} bytes; the limit is {limit_bytes}")


def _check_version(version: Any, path: Path) -> None:
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise ValueError(f"its pipevault_bundle is {version!r}")
    if version > BUNDLE_VERSION:
        raise NewerBundleError(
            f"{path} is a bundle of version {version}; this pipevault reads up to {BUNDLE_VERSION}. Upgrade pipevault. "
            "Nothing was imported.",
            path,
        )
    if version < BUNDLE_VERSION:
        raise BundleError(
            f"{path} is a bundle of version {version}, which pipevault 0.1 wrote; this pipevault reads version "
            f"{BUNDLE_VERSION} alone. Nothing was imported. Freeze the pipelines again, and export them from there.",
            path,
        )


def _require_fields(document: Mapping[str, Any], fields: frozenset[str], what: str) -> None:
    if document.keys() != fields:
        raise ValueError(f"{what} has the fields {sorted(document)} instead of {sorted(fields)}")
