"""A store around another one: what it does not change passes through it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TypeVar

from pipevault.digest import Digest
from pipevault.errors import LockTimeoutError, VaultError
from pipevault.files.opened import OpenedFile
from pipevault.store.locks.leases import Lease
from pipevault.store.manifest import Manifest
from pipevault.store.tiers.interface import EntryStore, Refused, TierHit
from pipevault.store.vault import Vault

Answer = TypeVar("Answer")


class Wrapper(EntryStore):
    """A store around another, to which it passes every question, by way of :meth:`_pass` what touches its place.

    An error of the file system becomes a :class:`~pipevault.errors.VaultError` with the name of the place.
    """

    def __init__(self, store: EntryStore) -> None:
        super().__init__(store.tier)
        self._store = store

    def _pass(self, question: Callable[[], Answer], size_bytes: int = 0) -> Answer:
        try:
            return question()
        except (VaultError, LockTimeoutError):  # some of them are OSErrors too
            raise
        except OSError as error:
            text = f"{self.tier.dir} cannot be read: {error}. Check its mount and permissions."
            raise VaultError(text, self.tier.dir) from error

    def look(self, key: Digest, known: TierHit | None = None) -> TierHit | Refused | None:
        return self._pass(partial(self._store.look, key, known))

    def keys(self, shelf: Digest) -> list[Digest]:
        return self._pass(partial(self._store.keys, shelf))

    def newest(self, count: int, shelf: Digest | None = None) -> Iterator[Manifest]:
        return self._pass(partial(self._store.newest, count, shelf))

    def open(self, found: TierHit) -> dict[str, OpenedFile]:
        return self._pass(partial(self._store.open, found), found.manifest.size_bytes)

    def is_writable(self) -> bool:
        return self._pass(self._store.is_writable)

    def accepts(self, found: TierHit) -> bool:
        return self._store.accepts(found)

    def publish(self, manifest: Manifest, files: Mapping[Digest, Path], source: TierHit | None = None) -> TierHit:
        return self._pass(partial(self._store.publish, manifest, files, source), manifest.size_bytes)

    def copy(self, found: TierHit, target: EntryStore) -> None:
        return self._pass(partial(self._store.copy, found, target), found.manifest.size_bytes)

    def hold(self, found: TierHit, *, is_use: bool = True) -> Lease:
        return self._pass(partial(self._store.hold, found, is_use=is_use))

    def limit_size(self, found: TierHit) -> tuple[str, ...]:
        return self._pass(partial(self._store.limit_size, found))

    def set_aside(self, vault: Vault, path: Path, reason: str) -> Path | None:
        return self._pass(partial(self._store.set_aside, vault, path, reason))

    def forget(self) -> None:
        self._store.forget()
