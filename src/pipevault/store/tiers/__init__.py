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
from pipevault.store.layout import SYSTEM_NAMES, Layout
from pipevault.store.locks.leases import Lease
from pipevault.store.manifest import Manifest, read_manifest
from pipevault.store.marker import ensure_vault
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
        """The file of the manifest."""
        return self.vault.layout.manifest_file(self.key)


@dataclass(frozen=True)
class Refused:
    """A tier that could not give what it was asked for. ``vault`` is ``None`` if it was not even opened."""

    tier: Tier
    error: VaultError
    vault: Vault | None = None

    @property
    def text(self) -> str:
        return f"tier {self.tier.dir}: {self.error}"


class _Folder:
    """The vault of ``tier``, kept once it is opened. ``own``, given for that of ``Settings.dir``, opens it, without a
    deadline.
    """

    def __init__(self, tier: Tier, settings: Settings, own: Callable[[bool], Vault | None] | None) -> None:
        self.tier = tier
        self.policy = tier.signature or settings.signature
        self.own = own
        self.vault: Vault | None = None
        self._settings = settings

    def ask(self, question: Callable[[], Answer], size_bytes: int = 0) -> Answer:
        """Ask what touches the folder; an error of the file system gets the name of the place.
        :class:`~pipevault.errors.SlowTierError`.
        """

        def named() -> Answer:
            try:
                return question()
            except (VaultError, LockTimeoutError):  # some of them are OSErrors too
                raise
            except OSError as error:
                text = f"{self.tier.dir} cannot be read: {error}. Check its mount and permissions."
                raise VaultError(text, self.tier.dir) from error

        if self.own is not None:
            return named()
        return ask(self.tier.dir, named, timeout_s=self._settings.tier_timeout_s, size_bytes=size_bytes)

    def open(self) -> Vault | None:
        if self.own is not None:
            return self.own(False)
        if self.vault is None:
            self.vault = Vault.open(self.tier.dir, create=False, trust=trust_of(self._settings))
        return self.vault

    def open_to_write(self) -> Vault:
        """Return the vault; that of ``Settings.dir`` is made where none is."""
        vault = self.open() if self.own is None else self.own(True)
        if vault is None:
            raise VaultNotWritableError(f"{self.tier.dir} is only read. Give another folder.", self.tier.dir)
        return vault

    def check_there(self, vault: Vault) -> None:
        """Raise if the vault is gone: a mount that went away has no entries and no shelves either."""
        if self.own is None:  # else it is made again
            ensure_vault(vault.layout, create=False)

    def keys(self, shelf: Digest) -> list[Digest]:
        if (vault := self.open()) is None:
            return []
        keys = vault.shelf(shelf)
        if not keys:
            self.check_there(vault)
        return keys

    def newest(self, count: int, shelf: Digest | None) -> list[Manifest]:
        """Return the up to ``count`` readable entries that were published last, or were on ``shelf``; where there is a
        deadline as many as are read in half of the time.
        """
        if (vault := self.open()) is None:
            return []
        until_s = math.inf if self.own is not None else time.monotonic() + self._settings.tier_timeout_s / 2
        found = []
        for key in newest_keys(vault.layout, count, shelf):
            with suppress(CorruptEntryError, NewerVaultError):  # whoever lists the vault sees it
                if (manifest := read_manifest(vault.layout, key)) is not None:
                    found.append(manifest)
            if time.monotonic() > until_s:
                break
        return found


class Tiers:
    """The vaults of some settings, nearest first. Opens nothing until it is asked. What asks a single tier may raise a
    :class:`~pipevault.errors.VaultError`.

    ``own`` opens the vault of ``Settings.dir``: with ``True`` it makes one where none is, else it may give ``None``.
    """

    def __init__(self, settings: Settings, own: Callable[[bool], Vault | None]) -> None:
        self.settings = settings
        self.order = search_order(settings)
        self.own_tier = next(tier for tier in self.order if _same_folder(tier.dir, settings.dir))
        self._own = own
        self._folders = {
            tier: _Folder(tier, settings, own if _same_folder(tier.dir, settings.dir) else None) for tier in self.order
        }
        self._trusted: tuple[PublicKey, ...] | None = None

    @classmethod
    def open(cls, settings: Settings) -> Tiers:
        return cls(settings, lambda create: open_vault(settings, create=create))

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
        if any(folder.policy != "off" for folder in self._folders.values()):
            self._trusted_keys()
        for tier, folder in self._folders.items():
            try:
                known_here = known if known is not None and known.tier == tier else None
                answer = folder.ask(partial(self._look, folder, key, known_here))
            except VaultError as error:
                answer = Refused(tier, error)
            if isinstance(answer, Refused):
                folder.vault = None  # it is opened again when it is asked next
            if answer is not None:
                yield answer

    def copy_nearer(self, found: TierHit) -> TierHit:
        """Return the entry where it now is: copied to the first writable tier before its own, if that has ``copy``.
        What is copied is verified on the way. While another process copies it, ``found`` is given back.

        :class:`~pipevault.errors.CorruptEntryError`: its bytes are not what the manifest says. After any other
        :class:`~pipevault.errors.VaultError` it can be loaded from where it is.
        """
        nearer = self.order[: self.order.index(found.tier)] if found.tier.copy else ()
        target = next((folder for tier in nearer if self._accepts(folder := self._folders[tier], found)), None)
        if target is None:
            return found
        copy = partial(self._vouch, found, partial(self._copy, target))
        try:
            self._folders[found.tier].ask(copy, found.manifest.size_bytes)
        except LockTimeoutError:
            return found
        copied = target.ask(partial(self._look, target, found.key, None))  # what stands there may be somebody else's
        if isinstance(copied, Refused):
            raise copied.error
        return found if copied is None else replace(copied, origin=found.origin)

    def publish(self, manifest: Manifest, files: Mapping[Digest, Path]) -> TierHit:
        """Publish in the vault of ``Settings.dir``, like :meth:`Vault.publish`; what stands there then may be somebody
        else's.
        """
        folder = self._folders[self.own_tier]

        def publish() -> TierHit:
            vault = folder.open_to_write()
            return TierHit(vault, vault.publish(manifest, files), folder.tier, folder.tier)

        return folder.ask(publish)

    def open_artifacts(self, found: TierHit) -> dict[str, OpenedFile]:
        """Open each artifact, by digest; the caller closes them. Raises like :meth:`Vault.open_artifact`."""
        return self._folders[found.tier].ask(partial(self._vouch, found, _opened), found.manifest.size_bytes)

    def hold(self, found: TierHit, *, is_use: bool = True) -> Lease:
        """Keep prunes away from an entry until the lease is released, and note its use unless it ``is_use`` not.
        :class:`~pipevault.errors.CorruptEntryError` if it was removed since it was found.
        """
        return self._folders[found.tier].ask(partial(_hold, found, is_use))

    def limit_size(self, found: TierHit) -> tuple[str, ...]:
        """Make room, as ``max_size`` asks, where ``found`` was written just now (it stays); what went wrong."""
        return self._folders[found.tier].ask(partial(_limit_size, found, self.settings.max_size))

    def quarantine(self, vault: Vault, tier: Tier, path: Path, reason: str) -> Path | None:
        """See :meth:`Vault.quarantine`; ``vault`` is that of an entry or refusal of ``tier``."""
        return self._folders[tier].ask(partial(vault.quarantine, path, reason))

    def is_writable(self, tier: Tier) -> bool:
        """Return whether entries can be published there. Raises what makes the folder unusable."""
        vault = self._folders[tier].ask(self._folders[tier].open)
        return vault is not None and vault.writable

    def policy(self, tier: Tier) -> str:
        """Return the signature policy in force there."""
        return self._folders[tier].policy

    def shelf(self, shelf: Digest) -> tuple[tuple[Digest, ...], tuple[str, ...]]:
        """Return the keys on a shelf of all tiers, nearest first and none twice (see :meth:`Vault.shelf`), and what was
        broken or slow. Raises nothing.
        """
        keys: dict[Digest, None] = {}
        problems: list[str] = []
        for tier, folder in self._folders.items():
            try:
                keys |= dict.fromkeys(folder.ask(partial(folder.keys, shelf)))
            except VaultError as error:
                folder.vault = None
                problems.append(Refused(tier, error).text)
        return tuple(keys), tuple(problems)

    def newest(self, count: int, shelf: Digest | None = None) -> Iterator[Manifest]:
        """Give the up to ``count`` readable entries of each tier that were published last, or were on ``shelf``."""
        for folder in self._folders.values():
            with suppress(VaultError):  # the search for an entry has said so
                yield from folder.ask(partial(folder.newest, count, shelf))

    def own(self) -> Vault | None:
        """Return the vault of ``Settings.dir``, if there is one that can be opened."""
        try:
            return self._own(False)
        except VaultError:
            return None

    def _look(self, folder: _Folder, key: Digest, known: TierHit | None) -> TierHit | Refused | None:
        """The entry of ``key``, or why it cannot be used; ``known`` again if it still stands there unchanged."""
        if (vault := folder.open()) is None:
            return None
        try:
            if known is not None and known.vault == vault and vault.stands(key, known.stamp):
                found = replace(known, signed=False)  # another policy and other keys may have been in force
            elif (read := vault.read_entry(key)) is not None:
                found = TierHit(vault, read.manifest, folder.tier, folder.tier, unowned=read.unowned, stamp=read.stamp)
            else:
                folder.check_there(vault)
                return None
            if found.unowned is not None and not self._have_signed(found):
                raise found.unowned
            warning = self._check_signature(found, folder.policy)
        except VaultError as error:
            return Refused(folder.tier, error, vault)
        return replace(found, warning=warning, signed=found.unowned is not None or folder.policy == "require")

    def _accepts(self, folder: _Folder, found: TierHit) -> bool:
        """Tell whether a copy of ``found`` can be written there; nothing that may not answer is asked.
        :class:`~pipevault.errors.VaultError`: this very entry is refused.
        """
        vault = folder.vault
        if folder.own is not None:
            with suppress(VaultError):  # the search for an entry has said so
                vault = folder.own(True)
        if vault is None or not vault.writable:
            return False
        size_bytes, limit = found.manifest.size_bytes, self.settings.max_size
        if limit is not None and size_bytes > limit:
            raise VaultFullError(
                f"{found.key.short} is not copied to {vault.root}: its {size_bytes} bytes exceed max_size, {limit}.",
                vault.root,
            )
        if folder.policy == "require" and not self._have_signed(found):
            place = folder.tier.dir  # the same words for each entry, so that a load tells it once
            raise VaultError(f"{place} takes signed entries only; for a tier without, set copy = false.", place)
        return True

    def _copy(self, target: _Folder, found: TierHit) -> None:
        with ExitStack() as stack:
            opened = {Digest(name): stack.enter_context(file) for name, file in _opened(found).items()}
            files = {digest: file.path for digest, file in opened.items()}

            def publish() -> None:
                vault = target.open_to_write()
                try:
                    with vault.lock(found.key, timeout_s=0):
                        vault.publish_copy(found.vault.layout, found.manifest, files)
                except CorruptEntryError as error:
                    text = f"An artifact is damaged: the bytes of {error.path} are not what its manifest says."
                    raise CorruptEntryError(text, error.path) from error

            target.ask(publish, found.manifest.size_bytes)

    def _vouch(self, found: TierHit, use: Callable[[TierHit], Answer]) -> Answer:
        """Use an entry; of one that is signed it does not matter who owns the artifacts."""
        try:
            return use(found)
        except UnsafeVaultError as error:
            if not self._have_signed(found):
                raise
            return use(replace(found, signed=True, unowned=error))

    def _have_signed(self, found: TierHit) -> bool:
        """Tell whether a trusted key signed the entry, whatever the policy."""
        if not found.signed and self.settings.trusted_keys:
            with suppress(SignatureError):
                self._check_signature(found, "require")
                return True
        return found.signed

    def _check_signature(self, found: TierHit, policy: str) -> str:
        """Return the warning, if there is one; :class:`~pipevault.errors.SignatureError`."""
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
        if _is_unmade(settings.dir):
            return None
        # Another process may have made it between the two looks.
        return Vault.of(settings)


def _is_unmade(root: Path) -> bool:
    """Tell whether nothing is there, or only what a creation that has not come to its end has made."""
    try:
        return set(os.listdir(root)) <= SYSTEM_NAMES | {Layout(root).tmp_dir.name}
    except FileNotFoundError:
        return True
    except NotADirectoryError:
        return False


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
