"""Several stores, asked in order: vaults baked into a container image, local, shared by a mounted folder.

One that is broken or slow is noted and passed over. Those other than the vault of ``Settings.dir`` are
:class:`~pipevault.store.tiers.timed.Timed`, for they may never answer.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from pipevault.digest import Digest
from pipevault.errors import LockTimeoutError, VaultError
from pipevault.files.opened import OpenedFile
from pipevault.settings import Settings, Tier
from pipevault.store.manifest import Manifest
from pipevault.store.tiers.folder import Folder, OwnFolder, open_vault
from pipevault.store.tiers.interface import EntryStore, Refused, TierHit
from pipevault.store.tiers.signed import Signed, TrustedKeys
from pipevault.store.tiers.timed import Timed
from pipevault.store.vault import Vault

if TYPE_CHECKING:
    from pipevault.store.locks.leases import Lease

__all__ = ["Refused", "TierHit", "Tiers", "open_vault", "search_order"]


class Tiers:
    """The stores of some settings, nearest first. Opens nothing until it is asked.

    ``own`` opens the vault of ``Settings.dir``: with ``True`` it makes one where none is, else it may give ``None``.
    ``kind`` makes the store of any other tier.
    """

    def __init__(
        self,
        settings: Settings,
        own: Callable[[bool], Vault | None],
        kind: Callable[[Tier, Settings], EntryStore] = Folder,
    ) -> None:
        self.settings = settings
        self.order = search_order(settings)
        self.problems: tuple[str, ...] = ()
        """The tiers that were broken or slow when :meth:`lookup` was last called."""
        self._own = own
        self._keys = TrustedKeys(settings)
        self._stores = {tier: self._store(tier, kind) for tier in self.order}

    @classmethod
    def open(cls, settings: Settings) -> Tiers:
        return cls(settings, lambda create: open_vault(settings, create=create))

    def lookup(self, key: Digest) -> TierHit | None:
        """Return the first entry of ``key`` that its tier can give; see :attr:`problems`.

        Raises nothing but :class:`~pipevault.errors.KeyFileError` for ``trusted_keys``, and
        :class:`~pipevault.errors.MissingExtraError` where a signature must be checked and cannot be.
        """
        problems: list[str] = []
        found = None
        for candidate in self.candidates(key):
            if isinstance(candidate, TierHit):
                found = candidate
                problems += [found.warning] if found.warning else []
                break
            problems.append(candidate.text)
        self.problems = tuple(problems)
        return found

    def candidates(self, key: Digest, known: TierHit | None = None) -> Iterator[TierHit | Refused]:
        """Give the entries of ``key``, nearest first, and each tier that could not give what it may have.

        Each tier is asked when its turn comes, so a caller that takes the first entry asks no tier behind it.
        ``known``, which an earlier search gave, is given again if it still stands there unchanged.
        """
        if any(self.policy(tier) != "off" for tier in self.order):
            self._keys.load()
        for tier, store in self._stores.items():
            try:
                answer = store.look(key, known if known is not None and known.tier == tier else None)
            except VaultError as error:
                answer = Refused(tier, error)
            if isinstance(answer, Refused):
                store.forget()
            if answer is not None:
                yield answer

    def copy_nearer(self, found: TierHit) -> TierHit:
        """Return the entry where it now is: copied to the first writable tier before its own, if that has ``copy``.

        What is copied is verified on the way. While another process copies it, ``found`` is given back. Raises
        :class:`~pipevault.errors.CorruptEntryError` if its bytes are not what the manifest says, else the
        :class:`~pipevault.errors.VaultError` that fits; it can then still be loaded from where it is.
        """
        nearer = self.order[: self.order.index(found.tier)] if found.tier.copy else ()
        target = next((store for tier in nearer if (store := self._stores[tier]).accepts(found)), None)
        if target is None:
            return found
        try:
            self._stores[found.tier].copy(found, target)
        except LockTimeoutError:
            return found
        copied = target.look(found.key)  # what stands there may be somebody else's
        if isinstance(copied, Refused):
            raise copied.error
        return found if copied is None else replace(copied, origin=found.origin)

    def publish(self, manifest: Manifest, files: Mapping[Digest, Path]) -> TierHit:
        """Publish an entry in the vault of ``Settings.dir``. See :meth:`Vault.publish`."""
        return self._stores[self.own_tier].publish(manifest, files)

    def open_artifacts(self, found: TierHit) -> dict[str, OpenedFile]:
        """See :meth:`EntryStore.open`."""
        return self._stores[found.tier].open(found)

    def hold(self, found: TierHit, *, is_use: bool = True) -> Lease:
        """See :meth:`EntryStore.hold`."""
        return self._stores[found.tier].hold(found, is_use=is_use)

    def limit_size(self, found: TierHit) -> tuple[str, ...]:
        """See :meth:`EntryStore.limit_size`."""
        return self._stores[found.tier].limit_size(found)

    def quarantine(self, vault: Vault, tier: Tier, path: Path, reason: str) -> Path | None:
        """See :meth:`EntryStore.set_aside`."""
        return self._stores[tier].set_aside(vault, path, reason)

    def is_writable(self, tier: Tier) -> bool:
        """See :meth:`EntryStore.is_writable`."""
        return self._stores[tier].is_writable()

    def shelf(self, shelf: Digest) -> tuple[tuple[Digest, ...], tuple[str, ...]]:
        """Return the keys on a shelf of all tiers, nearest first and none twice, and what was broken or slow.

        Only names are listed; see :meth:`Vault.shelf`. A tier that is broken or slow is passed over. Raises nothing.
        """
        keys: dict[Digest, None] = {}
        problems: list[str] = []
        for tier, store in self._stores.items():
            try:
                keys |= dict.fromkeys(store.keys(shelf))
            except VaultError as error:
                store.forget()
                problems.append(Refused(tier, error).text)
        return tuple(keys), tuple(problems)

    def newest(self, count: int, shelf: Digest | None = None) -> Iterator[Manifest]:
        """Give the up to ``count`` readable entries of each tier, tier by tier, that were published last, or were on
        ``shelf``.
        """
        for store in self._stores.values():
            with suppress(VaultError):  # the search for an entry has said so
                yield from store.newest(count, shelf)

    def policy(self, tier: Tier) -> str:
        """Return the signature policy in force there."""
        return tier.signature or self.settings.signature

    @property
    def own_tier(self) -> Tier:
        """The tier of ``Settings.dir``."""
        return next(tier for tier in self.order if _same_folder(tier.dir, self.settings.dir))

    def own(self) -> Vault | None:
        """Return the vault of ``Settings.dir``, if there is one that can be opened."""
        try:
            return self._own(False)
        except VaultError:
            return None

    def _store(self, tier: Tier, kind: Callable[[Tier, Settings], EntryStore]) -> EntryStore:
        if _same_folder(tier.dir, self.settings.dir):
            return Signed(OwnFolder(tier, self.settings, self._own), self.policy(tier), self._keys)
        store = Signed(kind(tier, self.settings), self.policy(tier), self._keys)
        return Timed(store, self.settings.tier_timeout_s)


def search_order(settings: Settings) -> tuple[Tier, ...]:
    """Return ``Settings.tiers``; before them ``Settings.dir``, unless it is one of them."""
    if any(_same_folder(tier.dir, settings.dir) for tier in settings.tiers):
        return settings.tiers
    return (Tier(settings.dir), *settings.tiers)


def _same_folder(one: Path, other: Path) -> bool:
    """By name alone: to follow links would mean to touch folders that may not answer."""
    return os.path.normpath(one) == os.path.normpath(other)
