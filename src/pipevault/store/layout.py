"""Every path of a vault, and back: which key or digest a path names. Pure; touches no file.

``cache_layout.md`` draws the tree.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from pipevault.digest import Digest
from pipevault.key import SHELF_DIGITS

MANIFEST_SUFFIX = ".json"
QUARANTINE_TIME = "%Y%m%dT%H%M%SZ"
SYSTEM_NAMES = frozenset({"lost+found"})
"""Names of what a fresh file system holds of its own."""
PIN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")

_UNSAFE_IN_NAME = re.compile(r"[^A-Za-z0-9_-]")
_LEASE_NAME = re.compile(r"([0-9a-f]{64})\.[A-Za-z0-9_-]+\.\d+\.[0-9a-f]{16}")
_STAGING_NAME = re.compile(r"[A-Za-z0-9_-]+\.\d{1,10}(?:\.([0-9a-f]{24}))?\.[0-9a-f]{16}")
_EVENTS_NAME = re.compile(_STAGING_NAME.pattern + r"\.jsonl")
_SIGNATURE_NAME = re.compile(r"[0-9a-f]{64}\.([0-9a-f]{16})\.json")
_SHARD_NAME = re.compile(r"[0-9a-f]{2}")
_SHELF_NAME = re.compile(rf"[0-9a-f]{{{SHELF_DIGITS}}}")
_QUARANTINE_NAME = re.compile(r"\d{8}T\d{6}Z-[0-9a-f]{8}-.+")


class _Place:
    """A file or folder that has the same name in every vault."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __get__(self, layout: Layout, owner: type[Layout]) -> Path:
        return layout.root / self._name


@dataclass(frozen=True)
class Layout:
    """The paths of the vault at ``root``."""

    root: Path

    vault_file = _Place("vault.json")
    entries_dir = _Place("entries")
    artifacts_dir = _Place("artifacts")
    locks_dir = _Place("locks")
    tmp_dir = _Place("tmp")
    quarantine_dir = _Place("quarantine")
    pins_dir = _Place("pins")
    leases_dir = _Place("leases")
    uses_dir = _Place("uses")
    signatures_dir = _Place("signatures")
    events_dir = _Place("events")
    totals_file = _Place("events/totals.json")
    totals_lock = _Place("events/totals.lock")

    @property
    def folders(self) -> tuple[Path, ...]:
        return (
            *(self.entries_dir, self.artifacts_dir, self.locks_dir, self.tmp_dir, self.quarantine_dir),
            *(self.pins_dir, self.leases_dir, self.uses_dir, self.signatures_dir, self.events_dir),
        )

    def manifest_file(self, key: Digest) -> Path:
        return self.entries_dir / key.hex[-SHELF_DIGITS:] / f"{key}{MANIFEST_SUFFIX}"

    def shelf_dir(self, shelf: Digest) -> Path:
        """Return the folder of the entries on a :attr:`~pipevault.key.Key.shelf`."""
        return self.entries_dir / shelf.hex[:SHELF_DIGITS]

    def artifact_file(self, digest: Digest) -> Path:
        return self.artifacts_dir / digest.hex[:2] / digest.hex

    def lock_file(self, key: Digest) -> Path:
        return self.locks_dir / f"{key}.lock"

    def holder_file(self, key: Digest) -> Path:
        return self.locks_dir / f"{key}.holder.json"

    def guard_file(self, key: Digest) -> Path:
        return self.locks_dir / f"{key}.guard"

    def pin_file(self, name: str) -> Path:
        """Take a ``name`` that :data:`PIN_NAME` allows."""
        return self.pins_dir / f"{name}.json"

    def lease_file(self, key: Digest, *, host: str, pid: int, random_hex: str) -> Path:
        return self.leases_dir / f"{key}.{_process_name(host, pid, random_hex)}"

    def use_file(self, key: Digest) -> Path:
        return self.uses_dir / key.hex[:2] / key.hex

    def signature_file(self, key: Digest, public_key_id: str) -> Path:
        """Take 16 hexadecimal digits as ``public_key_id``."""
        return self.signatures_dir / key.hex[:2] / f"{key}.{public_key_id}.json"

    def events_file(self, *, host: str, pid: int, random_hex: str, mark: str = "") -> Path:
        return self.events_dir / f"{_process_name(host, pid, random_hex, mark)}.jsonl"

    def staging_dir(self, *, host: str, pid: int, random_hex: str) -> Path:
        return self.tmp_dir / _process_name(host, pid, random_hex)

    def quarantine_file(self, *, time: str, random_hex: str, name: str) -> Path:
        """Take ``time`` as in :data:`QUARANTINE_TIME`, 8 hexadecimal digits, and the old file name."""
        return self.quarantine_dir / f"{time}-{random_hex}-{name}"

    def reason_file(self, quarantined: Path) -> Path:
        return quarantined.with_name(f"{quarantined.name}.reason.txt")

    def key_of_manifest(self, path: Path) -> Digest | None:
        """Return the key whose manifest has the path ``path``, or ``None``."""
        return _digest_if_at(path, self.manifest_file)

    def digest_of_artifact(self, path: Path) -> Digest | None:
        return _digest_if_at(path, self.artifact_file)

    def key_of_lock(self, path: Path) -> Digest | None:
        """Return the key to whose lock, holder note or guard ``path`` belongs, or ``None``."""
        return _digest_if_at(path, self.lock_file, self.holder_file, self.guard_file)

    def key_of_lease(self, path: Path) -> Digest | None:
        name = _LEASE_NAME.fullmatch(path.name)
        return Digest(name[1]) if name and path.parent == self.leases_dir else None

    def key_of_signature(self, path: Path) -> Digest | None:
        name = _SIGNATURE_NAME.fullmatch(path.name)
        return _digest_if_at(path, partial(self.signature_file, public_key_id=name[1])) if name else None

    def pin_name(self, path: Path) -> str | None:
        name = path.name.removesuffix(".json")
        return name if PIN_NAME.fullmatch(name) and path == self.pin_file(name) else None

    def is_staging(self, path: Path) -> bool:
        return path.parent == self.tmp_dir and _STAGING_NAME.fullmatch(path.name) is not None

    def is_marked_staging(self, path: Path) -> bool:
        """Return whether ``path`` is a staging folder with a mark in its name, as earlier releases made it."""
        name = _STAGING_NAME.fullmatch(path.name) if path.parent == self.tmp_dir else None
        return name is not None and name[1] is not None

    def is_events(self, path: Path) -> bool:
        return path.parent == self.events_dir and _EVENTS_NAME.fullmatch(path.name) is not None

    def is_shard(self, path: Path) -> bool:
        """Return whether files are spread over ``path``: a folder of a shelf in ``entries/``, else of two digits."""
        if path.parent == self.entries_dir:
            return _SHELF_NAME.fullmatch(path.name) is not None
        is_spread = path.parent in (self.artifacts_dir, self.uses_dir, self.signatures_dir)
        return is_spread and _SHARD_NAME.fullmatch(path.name) is not None

    def owns(self, path: Path) -> bool:
        """Return whether a file or folder at ``path`` is part of the layout; what is not is foreign."""
        return (
            path in (self.root, self.vault_file, *self.folders, self.totals_file, self.totals_lock)
            or self.is_shard(path)
            or self.is_staging(path)
            or self.is_events(path)
            or (path.parent == self.quarantine_dir and _QUARANTINE_NAME.fullmatch(path.name) is not None)
            or self.pin_name(path) is not None
            or _digest_if_at(path, self.manifest_file, self.artifact_file, self.use_file) is not None
            or any(key_of(path) for key_of in (self.key_of_lock, self.key_of_lease, self.key_of_signature))
        )


def stands_in(name: str, shard: str) -> bool:
    """Return whether a file of this name belongs into the folder ``shard``, of two digits or of a shelf."""
    if len(shard) == SHELF_DIGITS:
        return name.endswith(shard + MANIFEST_SUFFIX)
    return name.startswith(shard)


def signer_of(signature: Path) -> str:
    """Return the public key id in the name of a signature."""
    return signature.name.split(".")[1]


def digest_or_none(text: str) -> Digest | None:
    try:
        return Digest(text)
    except ValueError:
        return None


def _process_name(host: str, pid: int, random_hex: str, mark: str = "") -> str:
    """``<host>.<pid>.[<mark>.]<16 hexadecimal digits>``; ``mark``: see :mod:`pipevault.files.liveness`."""
    return ".".join(filter(None, (_UNSAFE_IN_NAME.sub("-", host)[:64] or "host", str(pid), mark, random_hex)))


def _digest_if_at(path: Path, *places: Callable[[Digest], Path]) -> Digest | None:
    """The digest that the name of ``path`` begins with, if ``path`` is one of its places."""
    digest = digest_or_none(path.name.partition(".")[0])
    return digest if digest is not None and any(path == place(digest) for place in places) else None
