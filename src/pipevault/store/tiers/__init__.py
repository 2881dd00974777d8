"""Several vaults, asked in order: baked into a container image, local, shared by a mounted folder.

One that is broken or slow is noted and passed over. A folder other than ``Settings.dir`` may never answer, so whatever
touches it has a deadline (:mod:`~pipevault.store.tiers.deadline`). An entry counts as the setting ``signature`` says;
one that other users own or may write counts only if a trusted key signed it.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from pipevault.digest import Digest
from pipevault.errors import (
    CorruptEntryError,
    LockTimeoutError,
    NewerVaultError,
    NotAVaultError,
    SignatureError,
    UnsafeVaultError,
    VaultError,
    VaultFullError,
    VaultNotWritableError,
)
from pipevault.files.opened import OpenedFile
from pipevault.settings import Settings, Tier
from pipevault.store.inventory import newest_keys
from pipevault.store.layout import Layout
from pipevault.store.locks.leases import Lease
from pipevault.store.manifest import Manifest, read_manifest
from pipevault.store.marker import ensure_vault, foreign_names
from pipevault.store.tiers.deadline import Answer, ask
from pipevault.store.trust.owners import trust_of
from pipevault.store.trust.signature import check_signature
from pipevault.store.trust.signing_keys import PublicKey, load_trusted
from pipevault.store.vault import Vault


@dataclass(frozen=True)
class TierHit:
    """An entry in the folder of ``tier``, whose artifacts are not verified yet. ``origin``: where it was found, another
    tier once it was copied. ``warning`` is what the signature policy ``warn`` has to say. ``signed``: a trusted key is
    known to have signed it, which is looked at only where it matters. ``unowned``: why it counts only then. ``stamp``:
    that of the manifest's file, by which :meth:`Tiers.candidates` knows it again.
    """

    vault: Vault
    manifest: Manifest
    tier: Tier
    origin: Tier
    warning: str = ""
    signed: bool = False
    unowned: UnsafeVaultError | None = None
    stamp: str = ""

    @property
    def key(self) -> Digest:
        return self.manifest.key.digest

    @property
    def path(self) -> Path:
        return self.vault.layout.manifest_file(self.key)


@dataclass(frozen=True)
class Refused:
    """A tier that could not give what it was asked for. ``vault`` is ``None`` if it was not even opened."""

    tier: Tier
    error: VaultError
    vault: Vault | None = None


class Tiers:
    """The vaults of some settings, nearest first. Opens nothing until it is asked, and keeps what it opened.

    What asks a single tier may raise a :class:`~pipevault.errors.VaultError`.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.order = search_order(settings)
        self.own_tier = next(tier for tier in self.order if _same_folder(tier.dir, settings.dir))
        self._vaults: dict[Tier, Vault] = {}
        self._trusted: tuple[PublicKey, ...] | None = None

    def own_vault(self, create: bool) -> Vault | None:
        """Return the vault of ``Settings.dir``; ``None`` where there is none and none is to be made."""
        vault = self._vaults.get(self.own_tier)
        if vault is None or not os.path.exists(vault.layout.vault_file):  # deleted: it must become a vault again
            vault = open_vault(self.settings, create=create)
            if vault is not None:
                self._vaults[self.own_tier] = vault
        return vault

    def own(self) -> Vault | None:
        """Return the vault of ``Settings.dir``, if there is one that can be opened."""
        try:
            return self.own_vault(False)
        except VaultError:
            return None

    def lookup(self, key: Digest) -> TierHit | None:
        """Return the first entry of ``key`` that its tier can give. Raises like :meth:`candidates`."""
        return next((found for found in self.candidates(key) if isinstance(found, TierHit)), None)

    def candidates(self, key: Digest, known: TierHit | None = None) -> Iterator[TierHit | Refused]:
        """Give the entries of ``key``, nearest first, and each tier that could not give what it may have. Each tier is
        asked when its turn comes. ``known``, which an earlier search gave, is given again if it still stands there
        unchanged.

        Raises nothing but :class:`~pipevault.errors.KeyFileError` for ``trusted_keys``, and
        :class:`~pipevault.errors.MissingExtraError` where a signature must be checked and cannot be.
        """
        if any(self.policy(tier) != "off" for tier in self.order):
            self._trusted_keys()
        for tier in self.order:
            try:
                known_here = known if known is not None and known.tier == tier else None
                answer = self._ask(tier, partial(self._look, tier, key, known_here))
            except VaultError as error:
                answer = Refused(tier, error)
            if isinstance(answer, Refused):
                self._vaults.pop(tier, None)  # it is opened again when it is asked next
            if answer is not None:
                yield answer

    def copy_nearer(self, found: TierHit) -> TierHit:
        """Return the entry where it now is: copied to the first writable tier before its own, if that has ``copy``.
        What is copied is verified on the way. While another process copies it, ``found`` is given back.

        :class:`~pipevault.errors.CorruptEntryError`: its bytes are not what the manifest says. After any other
        :class:`~pipevault.errors.VaultError` it can be loaded from where it is.
        """
        nearer = self.order[: self.order.index(found.tier)] if found.tier.copy else ()
        target = next((tier for tier in nearer if self._accepts(tier, found)), None)
        if target is None:
            return found
        copy = partial(self._vouch, found, partial(self._copy, target))
        try:
            self._ask(found.tier, copy, found.manifest.size_bytes)
        except LockTimeoutError:
            return found
        copied = self._ask(target, partial(self._look, target, found.key, None))  # what stands may be somebody else's
        if isinstance(copied, Refused):
            raise copied.error
        return found if copied is None else replace(copied, origin=found.origin)

    def publish(self, manifest: Manifest, files: Mapping[Digest, Path]) -> TierHit:
        """Publish in the vault of ``Settings.dir``, like :meth:`Vault.publish`; what stands there then may be somebody
        else's.
        """

        def publish() -> TierHit:
            vault = self._open_to_write(self.own_tier)
            return TierHit(vault, vault.publish(manifest, files), self.own_tier, self.own_tier)

        return self._ask(self.own_tier, publish)

    def open_artifacts(self, found: TierHit) -> dict[str, OpenedFile]:
        """Open each artifact, by digest; the caller closes them. Raises like :meth:`Vault.open_artifact`."""
        return self._ask(found.tier, partial(self._vouch, found, _opened), found.manifest.size_bytes)

    def hold(self, found: TierHit, *, is_use: bool = True) -> Lease:
        """Keep prunes away from an entry until the lease is released, and note its use unless it ``is_use`` not.
        :class:`~pipevault.errors.CorruptEntryError` if it was removed since it was found.
        """
        return self._ask(found.tier, partial(_hold, found, is_use))

    def limit_size(self, found: TierHit) -> tuple[str, ...]:
        """Make room, as ``max_size`` asks, where ``found`` was written just now (it stays); what went wrong."""
        return self._ask(found.tier, partial(_limit_size, found, self.settings.max_size))

    def quarantine(self, vault: Vault, tier: Tier, path: Path, reason: str) -> Path | None:
        """See :meth:`Vault.quarantine`; ``vault`` is that of an entry or refusal of ``tier``."""
        return self._ask(tier, partial(vault.quarantine, path, reason))

    def is_writable(self, tier: Tier) -> bool:
        """Return whether entries can be published there. Raises what makes the folder unusable."""
        vault = self._ask(tier, partial(self._open, tier))
        return vault is not None and vault.writable

    def policy(self, tier: Tier) -> str:
        return tier.signature or self.settings.signature

    def shelf(self, shelf: Digest) -> tuple[tuple[Digest, ...], tuple[str, ...]]:
        """Return the keys on a shelf of all tiers, nearest first and none twice (see :meth:`Vault.shelf`), and what was
        broken or slow. Raises nothing.
        """
        keys: dict[Digest, None] = {}
        problems: list[str] = []
        for tier in self.order:
            try:
                keys |= dict.fromkeys(self._ask(tier, partial(self._keys, tier, shelf)))
            except VaultError as error:
                self._vaults.pop(tier, None)
                problems.append(f"tier {tier.dir}: {error}")
        return tuple(keys), tuple(problems)

    def newest(self, count: int, shelf: Digest | None = None) -> Iterator[Manifest]:
        """Give the up to ``count`` readable entries of each tier that were published last, or were on ``shelf``."""
        for tier in self.order:
            with suppress(VaultError):  # the search for an entry has said so
                yield from self._ask(tier, partial(self._newest, tier, count, shelf))

    def _ask(self, tier: Tier, question: Callable[[], Answer], size_bytes: int = 0) -> Answer:
        """Ask what touches the folder, with a deadline unless it is the own one; an ``OSError`` gets the folder's name.
        :class:`~pipevault.errors.SlowTierError`.
        """

        def named() -> Answer:
            try:
                return question()
            except (VaultError, LockTimeoutError):  # some of them are OSErrors too
                raise
            except OSError as error:
                text = f"{tier.dir} cannot be read: {error}. Check its mount and permissions."
                raise VaultError(text, tier.dir) from error

        if tier == self.own_tier:
            return named()
        return ask(tier.dir, named, timeout_s=self.settings.tier_timeout_s, size_bytes=size_bytes)

    def _open(self, tier: Tier) -> Vault | None:
        if tier == self.own_tier:
            return self.own_vault(False)
        if (vault := self._vaults.get(tier)) is None:
            vault = self._vaults[tier] = Vault.open(tier.dir, create=False, trust=trust_of(self.settings))
        return vault

    def _open_to_write(self, tier: Tier) -> Vault:
        """Return the vault; that of ``Settings.dir`` is made where none is."""
        vault = self.own_vault(True) if tier == self.own_tier else self._open(tier)
        if vault is None:
            raise VaultNotWritableError(f"{tier.dir} is only read. Give another folder.", tier.dir)
        return vault

    def _check_there(self, tier: Tier, vault: Vault) -> None:
        """Raise if the vault is gone: a mount that went away has no entries and no shelves either."""
        if tier != self.own_tier:  # else it is made again
            ensure_vault(vault.layout, create=False)

    def _keys(self, tier: Tier, shelf: Digest) -> list[Digest]:
        if (vault := self._open(tier)) is None:
            return []
        if not (keys := vault.shelf(shelf)):
            self._check_there(tier, vault)
        return keys

    def _newest(self, tier: Tier, count: int, shelf: Digest | None) -> list[Manifest]:
        """Where there is a deadline, as many as are read in half of the time."""
        if (vault := self._open(tier)) is None:
            return []
        until_s = math.inf if tier == self.own_tier else time.monotonic() + self.settings.tier_timeout_s / 2
        found = []
        for key in newest_keys(vault.layout, count, shelf):
            with suppress(CorruptEntryError, NewerVaultError):  # whoever lists the vault sees it
                if (manifest := read_manifest(vault.layout, key)) is not None:
                    found.append(manifest)
            if time.monotonic() > until_s:
                break
        return found

    def _look(self, tier: Tier, key: Digest, known: TierHit | None) -> TierHit | Refused | None:
        """The entry of ``key``, or why it cannot be used; ``known`` again if it still stands there unchanged."""
        if (vault := self._open(tier)) is None:
            return None
        try:
            if known is not None and known.vault == vault and vault.stands(key, known.stamp):
                found = replace(known, signed=False)  # another policy and other keys may have been in force
            elif (read := vault.read_entry(key)) is not None:
                found = TierHit(vault, read.manifest, tier, tier, unowned=read.unowned, stamp=read.stamp)
            else:
                self._check_there(tier, vault)
                return None
            if found.unowned is not None and not self._have_signed(found):
                raise found.unowned
            warning = self._check_signature(found, self.policy(tier))
        except VaultError as error:
            return Refused(tier, error, vault)
        return replace(found, warning=warning, signed=found.unowned is not None or self.policy(tier) == "require")

    def _accepts(self, tier: Tier, found: TierHit) -> bool:
        """Tell whether a copy of ``found`` can be written there; nothing that may not answer is asked.
        :class:`~pipevault.errors.VaultError`: this very entry is refused.
        """
        vault = self._vaults.get(tier)
        if tier == self.own_tier:
            with suppress(VaultError):  # the search for an entry has said so
                vault = self.own_vault(True)
        if vault is None or not vault.writable:
            return False
        size_bytes, limit = found.manifest.size_bytes, self.settings.max_size
        if limit is not None and size_bytes > limit:
            raise VaultFullError(
                f"{found.key.short} is not copied to {vault.root}: its {size_bytes} bytes exceed max_size, {limit}.",
                vault.root,
            )
        if self.policy(tier) == "require" and not self._have_signed(found):
            # The same words for each entry, so that a load tells it once.
            raise VaultError(f"{tier.dir} takes signed entries only; for a tier without, set copy = false.", tier.dir)
        return True

    def _copy(self, target: Tier, found: TierHit) -> None:
        with ExitStack() as stack:
            opened = {Digest(name): stack.enter_context(file) for name, file in _opened(found).items()}
            files = {digest: file.path for digest, file in opened.items()}

            def publish() -> None:
                vault = self._open_to_write(target)
                try:
                    with vault.lock(found.key, timeout_s=0):  # whoever freezes or copies it is not waited for
                        vault.publish_copy(found.vault.layout, found.manifest, files)
                except CorruptEntryError as error:
                    text = f"An artifact is damaged: the bytes of {error.path} are not what its manifest says."
                    raise CorruptEntryError(text, error.path) from error

            self._ask(target, publish, found.manifest.size_bytes)

    def _vouch(self, found: TierHit, use: Callable[[TierHit], Answer]) -> Answer:
        """Use an entry; of one that is signed it does not matter who owns the artifacts."""
        try:
            return use(found)
        except UnsafeVaultError as error:
            if not self._have_signed(found):
                raise
            return use(replace(found, signed=True, unowned=error))

    def _have_signed(self, found: TierHit) -> bool:
        if not found.signed and self.settings.trusted_keys:
            with suppress(SignatureError):
                self._check_signature(found, "require")
                return True
        return found.signed

    def _check_signature(self, found: TierHit, policy: str) -> str:
        if policy == "off":
            return ""
        trusted = self._trusted_keys()
        return check_signature(found.vault.layout, found.manifest, policy=policy, trusted=trusted) or ""

    def _trusted_keys(self) -> tuple[PublicKey, ...]:
        """The keys of the setting; files that hold some are read once. :class:`~pipevault.errors.KeyFileError`."""
        if self._trusted is None:
            self._trusted = load_trusted(self.settings.trusted_keys)
        return self._trusted


def search_order(settings: Settings) -> tuple[Tier, ...]:
    """Return ``Settings.tiers``; before them ``Settings.dir``, unless it is one of them."""
    if any(_same_folder(tier.dir, settings.dir) for tier in settings.tiers):
        return settings.tiers
    return (Tier(settings.dir), *settings.tiers)


def _same_folder(one: Path, other: Path) -> bool:
    """By name alone: to follow links would mean to touch folders that may not answer."""
    return os.path.normpath(one) == os.path.normpath(other)


def open_vault(settings: Settings, *, create: bool) -> Vault | None:
    """Open the vault of ``settings.dir``; ``None`` if the folder is absent or empty and none should be made. Raises
    like :meth:`Vault.open`.
    """
    try:
        return Vault.of(settings, create=create)
    except NotAVaultError:
        if create:
            raise
        if not foreign_names(Layout(settings.dir)):
            return None
        return Vault.of(settings)  # another process may have made it between the two looks


def _opened(found: TierHit) -> dict[str, OpenedFile]:
    whose_ever = found.signed and found.unowned is not None
    with ExitStack() as stack:
        opened = {
            ref.digest.hex: stack.enter_context(found.vault.open_artifact(ref, signed=whose_ever))
            for ref in {ref.digest: ref for ref in found.manifest.artifacts}.values()
        }
        stack.pop_all()
    return opened


def _hold(found: TierHit, is_use: bool) -> Lease:
    lease = found.vault.lease(found.key)
    # A prune that did not see the lease yet may have been faster.
    if not found.path.exists():
        lease.release()
        raise CorruptEntryError(f"The manifest {found.path} was removed while the entry was being loaded.", found.path)
    if is_use:
        found.vault.record_use(found.key)
    return lease


def _limit_size(found: TierHit, max_size: int | None) -> tuple[str, ...]:
    if max_size is None:
        return ()
    from pipevault.store.retention.prune import enforce_max_size

    report = enforce_max_size(found.vault, found.key, max_size=max_size)
    return () if report is None else report.problems
