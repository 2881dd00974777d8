"""A store of entries, which is what the search through the tiers asks.

A folder is one kind (:mod:`~pipevault.store.tiers.folder`). How long a store may take
(:mod:`~pipevault.store.tiers.timed`) and which of its entries count (:mod:`~pipevault.store.tiers.signed`) is decided
by wrappers around any kind. Native code is loaded from files, so any other store fetches what it gives to a
local one, laid out like a vault.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from pipevault.digest import Digest
from pipevault.errors import CorruptEntryError, UnsafeVaultError, VaultError, VaultNotWritableError
from pipevault.files.opened import OpenedFile
from pipevault.settings import Tier
from pipevault.store.locks.leases import Lease
from pipevault.store.manifest import Manifest
from pipevault.store.vault import Vault


@dataclass(frozen=True)
class TierHit:
    """An entry, whose artifacts are not verified yet, in the store at ``tier``.

    ``vault`` is the folder that has its files, or to which they are fetched. ``origin`` is the tier where it was found,
    which differs from ``tier`` once it was copied. ``warning`` is what the signature policy ``warn`` has to say.
    ``signed``: a trusted key is known to have signed it, which is looked at only where it matters. ``unowned``: why it
    counts only then: somebody else owns it, or could write to it. ``stamp`` is that of the manifest's file, by which
    :meth:`EntryStore.look` knows it again.
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


class EntryStore(ABC):
    """Entries in one place, ``tier``. What is implemented here does for a store that is only read.

    Every method may raise a :class:`~pipevault.errors.VaultError` or an ``OSError`` if the place cannot be used.
    """

    def __init__(self, tier: Tier) -> None:
        self.tier = tier

    @abstractmethod
    def look(self, key: Digest, known: TierHit | None = None) -> TierHit | Refused | None:
        """Return the entry of ``key``, or why it cannot be used; ``None`` if there is none.

        ``known``, which an earlier look gave, is given again if it still stands there unchanged.
        """

    @abstractmethod
    def keys(self, shelf: Digest) -> list[Digest]:
        """Return the keys on a shelf, sorted. Only names are listed; see :meth:`Vault.shelf`."""

    def newest(self, count: int, shelf: Digest | None = None) -> Iterator[Manifest]:
        """Give the up to ``count`` readable entries that were published last, or were on ``shelf``."""
        return iter(())

    def open(self, found: TierHit) -> dict[str, OpenedFile]:
        """Open each artifact, verified, by digest; the caller closes them. Raises like :meth:`Vault.open_artifact`."""
        refs = {ref.digest: ref for ref in found.manifest.artifacts}
        whose_ever = found.signed and found.unowned is not None
        with ExitStack() as stack:
            opened = {
                digest.hex: stack.enter_context(found.vault.open_artifact(ref, signed=whose_ever))
                for digest, ref in refs.items()
            }
            stack.pop_all()
        return opened

    def is_writable(self) -> bool:
        """Return whether entries can be published here. Raises what makes the store unusable."""
        return False

    def accepts(self, found: TierHit) -> bool:
        """Return whether a copy of ``found`` can be written here; nothing that may not answer is asked.

        :class:`~pipevault.errors.VaultError`: this very entry is refused.
        """
        return False

    def publish(self, manifest: Manifest, files: Mapping[Digest, Path], source: TierHit | None = None) -> TierHit:
        """Publish an entry, like :meth:`Vault.publish`. What stands here then may be somebody else's.

        ``source``: it is a copy of this entry, so its signatures go with it, and whoever freezes or copies the same
        one is not waited for: :class:`~pipevault.errors.LockTimeoutError`.
        """
        raise VaultNotWritableError(f"{self.tier.dir} is only read. Give another folder.", self.tier.dir)

    def copy(self, found: TierHit, target: EntryStore) -> None:
        """Publish an entry of this store in ``target``; its artifacts are verified on the way."""
        with ExitStack() as stack:
            opened = {Digest(name): stack.enter_context(file) for name, file in self.open(found).items()}
            target.publish(found.manifest, {digest: file.path for digest, file in opened.items()}, found)

    def hold(self, found: TierHit, *, is_use: bool = True) -> Lease:
        """Keep prunes away from an entry until the lease is released, and note its use unless it ``is_use`` not.

        :class:`~pipevault.errors.CorruptEntryError` if it was removed since it was found.
        """
        lease = found.vault.lease(found.key)
        # A prune that did not see the lease yet may have been faster.
        if not found.path.exists():
            lease.release()
            text = f"The manifest {found.path} was removed while the entry was being loaded."
            raise CorruptEntryError(text, found.path)
        if is_use:
            found.vault.record_use(found.key)
        return lease

    def limit_size(self, found: TierHit) -> tuple[str, ...]:
        """Make room, as ``max_size`` asks, where ``found`` was written just now (it stays); what went wrong."""
        return ()

    def set_aside(self, vault: Vault, path: Path, reason: str) -> Path | None:
        """See :meth:`Vault.quarantine`; ``vault`` is that of the answer to :meth:`look`."""
        return vault.quarantine(path, reason)

    def forget(self) -> None:  # noqa: B027
        """Open the store again when it is asked next: it gave an error."""
