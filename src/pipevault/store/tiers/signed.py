"""A store whose entries count as the setting ``signature`` says, and those of other users only if they are signed."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from pipevault.digest import Digest
from pipevault.errors import SignatureError, UnsafeVaultError, VaultError
from pipevault.files.opened import OpenedFile
from pipevault.settings import Settings
from pipevault.store.tiers.interface import EntryStore, Refused, TierHit
from pipevault.store.tiers.wrapper import Answer, Wrapper

if TYPE_CHECKING:
    from pipevault.store.trust.signing_keys import PublicKey


class TrustedKeys:
    """The keys of the setting ``trusted_keys``, read when they are first needed."""

    def __init__(self, settings: Settings) -> None:
        self._given = settings.trusted_keys
        self._loaded: tuple[PublicKey, ...] | None = None

    def load(self) -> tuple[PublicKey, ...]:
        """Return the keys; the files that hold some are read once. :class:`~pipevault.errors.KeyFileError`."""
        if self._loaded is None:
            from pipevault.store.trust.signing_keys import load_trusted

            self._loaded = load_trusted(self._given)
        return self._loaded

    def check(self, found: TierHit, policy: str) -> str:
        """Return the warning, if there is one; :class:`~pipevault.errors.SignatureError`."""
        if policy == "off":
            return ""
        from pipevault.store.trust.signature import check_signature

        return check_signature(found.vault.layout, found.manifest, policy=policy, trusted=self.load()) or ""

    def have_signed(self, found: TierHit) -> bool:
        """Return whether one of them signed the entry, whatever the policy."""
        if not found.signed and self._given:
            with suppress(SignatureError):
                self.check(found, "require")
                return True
        return found.signed


class Signed(Wrapper):
    """Asks a store, and refuses what ``policy`` or its owner speaks against. Whatever opens or copies an entry for its
    signature alone comes through here.
    """

    def __init__(self, store: EntryStore, policy: str, keys: TrustedKeys) -> None:
        super().__init__(store)
        self._policy = policy
        self._keys = keys

    def look(self, key: Digest, known: TierHit | None = None) -> TierHit | Refused | None:
        found = super().look(key, known)
        if not isinstance(found, TierHit):
            return found
        found = replace(found, signed=False)  # another policy and other keys may have been in force for ``known``
        try:
            if found.unowned is not None and not self._keys.have_signed(found):
                raise found.unowned
            warning = self._keys.check(found, self._policy)
        except VaultError as error:
            return Refused(self.tier, error, found.vault)
        return replace(found, warning=warning, signed=found.unowned is not None or self._policy == "require")

    def open(self, found: TierHit) -> dict[str, OpenedFile]:
        return self._vouch(found, super().open)

    def copy(self, found: TierHit, target: EntryStore) -> None:
        self._vouch(found, partial(super().copy, target=target))

    def accepts(self, found: TierHit) -> bool:
        if not self._store.accepts(found):
            return False
        if self._policy == "require" and not self._keys.have_signed(found):
            raise VaultError(  # the same words for each entry, so that a load tells it once
                f"{self.tier.dir} takes signed entries only; for a tier without, set copy = false.", self.tier.dir
            )
        return True

    def _vouch(self, found: TierHit, use: Callable[[TierHit], Answer]) -> Answer:
        """Use an entry; of one that is signed it does not matter who owns the artifacts."""
        try:
            return use(found)
        except UnsafeVaultError as error:
            if not self._keys.have_signed(found):
                raise
            return use(replace(found, signed=True, unowned=error))
