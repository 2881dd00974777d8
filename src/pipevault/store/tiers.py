"""Several vaults, searched in order: baked into a container image, local, shared by a mounted folder.

A tier that is broken or slow is told of and passed over. Those other than the vault of ``Settings.dir`` are asked by
:func:`pipevault.store.deadline.ask` alone, for they may never answer.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from pipevault.digest import Digest
from pipevault.errors import (
    CorruptEntryError,
    LockTimeoutError,
    NewerVaultError,
    NotAVaultError,
    UnsafeVaultError,
    VaultError,
    VaultFullError,
)
from pipevault.files.opened import OpenedFile
from pipevault.settings import Settings, Tier
from pipevault.store.deadline import ask
from pipevault.store.inventory import newest_keys
from pipevault.store.layout import SYSTEM_NAMES, Layout
from pipevault.store.manifest import Manifest
from pipevault.store.marker import ensure_vault
from pipevault.store.read import read_manifest
from pipevault.store.trust import trust_of
from pipevault.store.vault import Vault

if TYPE_CHECKING:
    from pipevault.store.leases import Lease
    from pipevault.store.signing_keys import PublicKey

Answer = TypeVar("Answer")


@dataclass(frozen=True)
class Found:
    """An entry, whose artifacts are not verified yet, in the ``vault`` at ``tier``.

    ``origin`` is the tier where it was found, which differs from ``tier`` once it was copied. ``warning`` is what the
    signature policy ``warn`` has to say.
    """

    vault: Vault
    manifest: Manifest
    tier: Tier
    origin: Tier
    warning: str = ""
    signed: bool = False
    """Whether it is trusted for its signature alone: somebody else owns it, or could write to it."""

    @property
    def key(self) -> Digest:
        return self.manifest.key.digest


@dataclass(frozen=True)
class Refused:
    """A tier that could not give what it was asked for. ``vault`` is ``None`` if it was not even opened."""

    tier: Tier
    error: VaultError
    vault: Vault | None = None


class Tiers:
    """The tiers of some settings. Opens nothing until it is asked; a vault that was opened is kept.

    ``own`` opens the vault of ``Settings.dir``: with ``True`` it makes one where none is, else it may give ``None``.
    """

    def __init__(self, settings: Settings, own: Callable[[bool], Vault | None]) -> None:
        self.settings = settings
        self.order = search_order(settings)
        self.problems: tuple[str, ...] = ()
        """What was broken or slow when :meth:`lookup` was last called."""
        self._own = own
        self._vaults: dict[Path, Vault] = {}
        self._trusted: tuple[PublicKey, ...] | None = None

    @classmethod
    def open(cls, settings: Settings) -> Tiers:
        return cls(settings, partial(_open_own, settings))

    def lookup(self, key: Digest) -> Found | None:
        """The first entry of ``key`` that its tier can give. Raises nothing but :class:`~pipevault.errors.KeyFileError`
        for ``trusted_keys``; see :attr:`problems`.
        """
        problems: list[str] = []
        found = None
        for candidate in self.candidates(key):
            if isinstance(candidate, Found):
                found = candidate
                problems += [found.warning] if found.warning else []
                break
            problems.append(problem_text(candidate))
        self.problems = tuple(problems)
        return found

    def candidates(self, key: Digest) -> Iterator[Found | Refused]:
        """The entries of ``key``, nearest first, and each tier that could not give what it may have.

        Each tier is asked when its turn comes, so a caller that takes the first entry asks no tier behind it.
        """
        self._load_trusted()
        for tier in self.order:
            opened: list[Vault] = []
            try:
                found = self._ask(tier, partial(self._look, tier, key, opened))
            except VaultError as error:
                self._vaults.pop(tier.dir, None)
                yield Refused(tier, error, opened[0] if opened else None)
                continue
            if found is not None:
                yield found

    def copy_nearer(self, found: Found) -> Found:
        """The entry where it now is: copied to the first tier before its own that can be written, if it has ``copy``.

        What is copied is verified on the way. While another process copies it, ``found`` is given back. Raises
        :class:`~pipevault.errors.CorruptEntryError` if its bytes are not what the manifest says, else the
        :class:`~pipevault.errors.VaultError` that fits; it can then still be loaded from where it is.
        """
        target = self._nearer(found.tier) if found.tier.copy else None
        if target is None:
            return found
        tier, vault = target
        if self.policy(tier) == "require" != self.policy(found.tier) and not self._is_signed(
            found.vault, found.manifest
        ):
            raise VaultError(  # the same words for each entry, so that a load tells it once
                f"{vault.root} takes signed entries only; for a tier without, set copy = false.", vault.root
            )
        size_bytes, limit = found.manifest.size_bytes, self.settings.max_size
        if limit is not None and size_bytes > limit:
            raise VaultFullError(
                f"{found.key.short} is not copied to {vault.root}: its {size_bytes} bytes exceed max_size, {limit}.",
                vault.root,
            )
        asked = tier if self._is_own(found.tier) else found.tier
        return self._ask(asked, partial(self._copy, found, tier, vault), size_bytes=size_bytes)

    def open_artifacts(self, found: Found) -> dict[str, OpenedFile]:
        """Open each artifact, by digest; the caller closes them. Raises like :meth:`Vault.open_artifact`."""
        return self._ask(found.tier, partial(self._open_all, found), size_bytes=found.manifest.size_bytes)

    def hold(self, found: Found, *, is_use: bool = True) -> Lease:
        """Keep prunes away from an entry until the lease is released, and note its use unless it ``is_use`` not.

        :class:`~pipevault.errors.CorruptEntryError` if it was removed since it was found.
        """
        return self._ask(found.tier, partial(_hold, found, is_use))

    def limit_size(self, found: Found) -> tuple[str, ...]:
        """Make room, as ``max_size`` asks, where ``found`` was written just now (it stays); what went wrong."""
        return self._ask(found.tier, partial(_limit_size, found, self.settings.max_size))

    def quarantine(self, vault: Vault, tier: Tier, path: Path, reason: str) -> Path | None:
        """See :meth:`Vault.quarantine`."""
        return self._ask(tier, lambda: vault.quarantine(path, reason))

    def shelf(self, shelf: Digest) -> tuple[tuple[Digest, ...], tuple[str, ...]]:
        """The keys on a shelf of all tiers, nearest first and none twice, and what was broken or slow.

        Only names are listed; see :meth:`Vault.shelf`. A tier that is broken or slow is passed over. Raises nothing.
        """
        keys: dict[Digest, None] = {}
        problems: list[str] = []
        for tier in self.order:
            try:
                keys |= dict.fromkeys(self._ask(tier, partial(self._on_shelf, tier, shelf)))
            except VaultError as error:
                self._vaults.pop(tier.dir, None)
                problems.append(problem_text(Refused(tier, error)))
        return tuple(keys), tuple(problems)

    def newest(self, count: int, shelf: Digest | None = None) -> Iterator[Manifest]:
        """The up to ``count`` readable entries of each tier that were published last, or were on ``shelf``, tier by
        tier.
        """
        for tier in self.order:
            try:
                yield from self._ask(tier, partial(self._newest, tier, count, shelf))
            except VaultError:  # the search for an entry has told of it
                continue

    def policy(self, tier: Tier) -> str:
        """The signature policy in force there."""
        return tier.signature or self.settings.signature

    @property
    def own_tier(self) -> Tier:
        """The tier of ``Settings.dir``."""
        return next(tier for tier in self.order if self._is_own(tier))

    def own(self) -> Vault | None:
        """The vault of ``Settings.dir``, if there is one that can be opened."""
        try:
            return self._own(False)
        except VaultError:
            return None

    def open_tier(self, tier: Tier) -> Vault | None:
        """The vault of a tier; ``None`` if it is the one of ``Settings.dir`` and not made yet. :class:`VaultError`."""
        return self._ask(tier, partial(self._open, tier))

    def _look(self, tier: Tier, key: Digest, opened: list[Vault]) -> Found | None:
        """``opened`` gets the vault, also if its entry is refused."""
        vault = self._open(tier)
        if vault is None:
            return None
        opened.append(vault)
        manifest, unowned = vault.read_entry(key)
        if manifest is None:
            if unowned is not None:
                raise unowned
            if not self._is_own(tier):
                ensure_vault(vault.layout, create=False)  # a mount that went away has no entries either
            return None
        if unowned is not None and not self._is_signed(vault, manifest):
            raise unowned
        warning = self._check_signature(vault, manifest, tier)
        return Found(vault, manifest, tier, tier, warning, signed=unowned is not None)

    def _copy(self, found: Found, tier: Tier, vault: Vault) -> Found:
        self._check_signature(found.vault, found.manifest, tier)
        with ExitStack() as stack:
            opened = self._open_all(found)
            for file in opened.values():
                stack.enter_context(file)
            return self._publish_copy(found, tier, vault, {Digest(name): file.path for name, file in opened.items()})

    def _publish_copy(self, found: Found, tier: Tier, vault: Vault, files: dict[Digest, Path]) -> Found:
        from pipevault.store.copying import copy_entry

        try:
            with vault.lock(found.key, timeout_s=0):
                manifest = copy_entry(found.vault.layout, vault, found.manifest, files)
        except LockTimeoutError:
            return found
        except CorruptEntryError as error:
            raise CorruptEntryError(
                f"An artifact is damaged: the bytes of {error.path} are not what its manifest says.", error.path
            ) from error
        copied = self._look(tier, manifest.key.digest, [])  # what stands there may be somebody else's
        return found if copied is None else replace(copied, origin=found.origin)

    def _on_shelf(self, tier: Tier, shelf: Digest) -> list[Digest]:
        vault = self._open(tier)
        if vault is None:
            return []
        keys = vault.shelf(shelf)
        if not keys and not self._is_own(tier):
            ensure_vault(vault.layout, create=False)  # a mount that went away has no shelves either
        return keys

    def _newest(self, tier: Tier, count: int, shelf: Digest | None) -> list[Manifest]:
        until_s = math.inf if self._is_own(tier) else time.monotonic() + self.settings.tier_timeout_s / 2
        vault = self._open(tier)
        found: list[Manifest] = []
        if vault is None:
            return found
        for key in newest_keys(vault.layout, count, shelf):
            with suppress(CorruptEntryError, NewerVaultError):  # whoever lists the vault is told of it
                found += [manifest] if (manifest := read_manifest(vault.layout, key)) else []
            if time.monotonic() > until_s:
                break
        return found

    def _is_own(self, tier: Tier) -> bool:
        return _same_folder(tier.dir, self.settings.dir)

    def _ask(self, tier: Tier, question: Callable[[], Answer], *, size_bytes: int = 0) -> Answer:
        try:
            if self._is_own(tier):
                return question()
            return ask(tier.dir, question, timeout_s=self.settings.tier_timeout_s, size_bytes=size_bytes)
        except VaultError:  # some of them are OSErrors too
            raise
        except OSError as error:
            raise VaultError(
                f"{tier.dir} cannot be read: {error}. Check its mount and permissions.", tier.dir
            ) from error

    def _open(self, tier: Tier) -> Vault | None:
        if self._is_own(tier):
            return self._own(False)
        if tier.dir not in self._vaults:
            self._vaults[tier.dir] = Vault.open(tier.dir, create=False, trust=trust_of(self.settings))
        return self._vaults[tier.dir]

    def _nearer(self, tier: Tier) -> tuple[Tier, Vault] | None:
        """The first vault before ``tier`` that can be written; the own one is made for it."""
        for nearer in self.order[: self.order.index(tier)]:
            try:
                vault = self._own(True) if self._is_own(nearer) else self._vaults.get(nearer.dir)
            except VaultError:  # the search for an entry has told of it
                continue
            if vault is not None and vault.writable:
                return nearer, vault
        return None

    def _load_trusted(self) -> None:
        if self._trusted is None and any(self.policy(tier) != "off" for tier in self.order):
            self._trusted = self._read_trusted()

    def _read_trusted(self) -> tuple[PublicKey, ...]:
        from pipevault.store.signing_keys import load_trusted

        return load_trusted(self.settings.trusted_keys)

    def _open_all(self, found: Found) -> dict[str, OpenedFile]:
        try:
            return _opened(found, signed=found.signed)
        except UnsafeVaultError:
            if not self._is_signed(found.vault, found.manifest):
                raise
            return _opened(found, signed=True)

    def _is_signed(self, vault: Vault, manifest: Manifest) -> bool:
        """Whether a trusted key signed it, whatever the policy."""
        if not self.settings.trusted_keys:
            return False
        from pipevault.store.signature import check_signature

        if self._trusted is None:
            self._trusted = self._read_trusted()
        return check_signature(vault.layout, manifest, policy="warn", trusted=self._trusted) is None

    def _check_signature(self, vault: Vault, manifest: Manifest, tier: Tier) -> str:
        """The warning, if there is one; :class:`~pipevault.errors.SignatureError`."""
        policy = self.policy(tier)
        if policy == "off":
            return ""
        from pipevault.store.signature import check_signature

        return check_signature(vault.layout, manifest, policy=policy, trusted=self._trusted or ()) or ""


def search_order(settings: Settings) -> tuple[Tier, ...]:
    """``Settings.tiers``; before them ``Settings.dir``, unless it is one of them."""
    if any(_same_folder(tier.dir, settings.dir) for tier in settings.tiers):
        return settings.tiers
    return (Tier(settings.dir), *settings.tiers)


def open_vault(settings: Settings, *, create: bool) -> Vault | None:
    """The vault of ``settings.dir``; ``None`` if the folder is absent or empty and none should be made. Raises like
    :meth:`Vault.open`.
    """
    try:
        return Vault.of(settings, create=create)
    except NotAVaultError:
        if create:
            raise
        if _is_unmade(settings.dir):
            return None
        # Another process may have made it between the two looks.
        return Vault.of(settings)


def _is_unmade(root: Path) -> bool:
    """Whether nothing is there, or only what a creation that has not come to its end has made."""
    try:
        return set(os.listdir(root)) <= SYSTEM_NAMES | {Layout(root).tmp_dir.name}
    except FileNotFoundError:
        return True
    except NotADirectoryError:
        return False


def problem_text(refused: Refused) -> str:
    return f"tier {refused.tier.dir}: {refused.error}"


def _same_folder(one: Path, other: Path) -> bool:
    """By name alone: to follow links would mean to touch folders that may not answer."""
    return os.path.normpath(one) == os.path.normpath(other)


def _open_own(settings: Settings, create: bool) -> Vault | None:
    return open_vault(settings, create=create)


def _hold(found: Found, is_use: bool) -> Lease:
    lease = found.vault.lease(found.key)
    path = found.vault.layout.manifest_file(found.key)
    # A prune that did not see the lease yet may have been faster.
    if not path.exists():
        lease.release()
        raise CorruptEntryError(f"The manifest {path} was removed while the entry was being loaded.", path)
    if is_use:
        found.vault.record_use(found.key)
    return lease


def _opened(found: Found, *, signed: bool) -> dict[str, OpenedFile]:
    refs = {ref.digest: ref for ref in found.manifest.artifacts}
    with ExitStack() as stack:
        opened = {
            digest.hex: stack.enter_context(found.vault.open_artifact(ref, signed=signed))
            for digest, ref in refs.items()
        }
        stack.pop_all()
    return opened


def _limit_size(found: Found, max_size: int | None) -> tuple[str, ...]:
    if max_size is None:
        return ()
    from pipevault.store.prune import enforce_max_size

    report = enforce_max_size(found.vault, found.key, max_size=max_size)
    return () if report is None else report.problems
