"""Every path of a vault, and back: which key or digest a path names. Pure; touches no file.

``cache_layout.md`` draws the tree.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from pipevault.digest import Digest
from pipevault.key import SHELF_DIGITS

MANIFEST_SUFFIX = ".json"
QUARANTINE_TIME = "%Y%m%dT%H%M%SZ"
SYSTEM_NAMES = frozenset({"lost+found"})
"""Names of what a fresh file system holds of its own."""
PIN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")

_UNSAFE_IN_NAME = re.compile(r"[^A-Za-z0-9_-]")
_PROCESS = r"[A-Za-z0-9_-]+\.\d{1,10}(?:\.(?P<mark>[0-9a-f]{24}))?\.[0-9a-f]{16}"
_SPREAD = r"(?P<two>[0-9a-f]{2})/(?P<digest>(?P=two)[0-9a-f]{62})"
_FORMS = {
    "manifest": r"entries/(?P<shelf>[0-9a-f]{16})/(?P<digest>[0-9a-f]{48}(?P=shelf))\.json",
    "artifact": rf"artifacts/{_SPREAD}",
    "use": rf"uses/{_SPREAD}",
    "signature": rf"signatures/{_SPREAD}\.[0-9a-f]{{16}}\.json",
    "shard": r"entries/[0-9a-f]{16}|(?:artifacts|uses|signatures)/[0-9a-f]{2}",
    "lock": r"locks/(?P<digest>[0-9a-f]{64})\.(?:lock|guard|holder\.json)",
    "lease": r"leases/(?P<digest>[0-9a-f]{64})\.[A-Za-z0-9_-]+\.\d+\.[0-9a-f]{16}",
    "staging": rf"tmp/{_PROCESS}",
    "events": rf"events/{_PROCESS}\.jsonl",
    "pin": rf"pins/(?P<name>{PIN_NAME.pattern})\.json",
    "quarantined": r"quarantine/\d{8}T\d{6}Z-[0-9a-f]{8}-[^/]+",
}
"""The paths below the vault's folder whose names tell something."""


class _Place:
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
        return self._digest(path, "manifest")

    def digest_of_artifact(self, path: Path) -> Digest | None:
        return self._digest(path, "artifact")

    def key_of_lock(self, path: Path) -> Digest | None:
        """Return the key to whose lock, holder note or guard ``path`` belongs, or ``None``."""
        return self._digest(path, "lock")

    def key_of_lease(self, path: Path) -> Digest | None:
        return self._digest(path, "lease")

    def key_of_signature(self, path: Path) -> Digest | None:
        return self._digest(path, "signature")

    def pin_name(self, path: Path) -> str | None:
        found = self._read(path, "pin")
        return found["name"] if found else None

    def is_staging(self, path: Path) -> bool:
        return self._read(path, "staging") is not None

    def is_marked_staging(self, path: Path) -> bool:
        """Return whether ``path`` is a staging folder with a mark in its name, as earlier releases made it."""
        found = self._read(path, "staging")
        return found is not None and found["mark"] is not None

    def is_events(self, path: Path) -> bool:
        return self._read(path, "events") is not None

    def is_shard(self, path: Path) -> bool:
        return self._read(path, "shard") is not None

    def owns(self, path: Path) -> bool:
        """Return whether a file or folder at ``path`` is part of the layout; what is not is foreign."""
        fixed = (self.root, self.vault_file, *self.folders, self.totals_file, self.totals_lock)
        return path in fixed or self._read(path, *_FORMS) is not None

    def _digest(self, path: Path, form: str) -> Digest | None:
        found = self._read(path, form)
        return Digest(found["digest"]) if found else None

    def _read(self, path: Path, *forms: str) -> re.Match[str] | None:
        text, start = os.fspath(path), os.path.join(self.root, "")
        if not text.startswith(start):
            return None
        return next((found for form in forms if (found := re.compile(_FORMS[form]).fullmatch(text, len(start)))), None)


def stands_in(name: str, shard: str) -> bool:
    """Return whether a file of this name belongs into the folder ``shard``, of two digits or of a shelf."""
    if len(shard) == SHELF_DIGITS:
        return name.endswith(shard + MANIFEST_SUFFIX)
    return name.startswith(shard)


def signer_of(signature: Path) -> str:
    return signature.name.split(".")[1]


def digest_or_none(text: str) -> Digest | None:
    try:
        return Digest(text)
    except ValueError:
        return None


def _process_name(host: str, pid: int, random_hex: str, mark: str = "") -> str:
    """``<host>.<pid>.[<mark>.]<16 hexadecimal digits>``; ``mark``: see :mod:`pipevault.files.liveness`."""
    return ".".join(filter(None, (_UNSAFE_IN_NAME.sub("-", host)[:64] or "host", str(pid), mark, random_hex)))
