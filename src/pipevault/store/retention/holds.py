"""Holds on entries, which keep them from being removed: pins, leases of live processes, and what such entries need."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from pipevault.digest import Digest
from pipevault.store.inventory import FoundManifest
from pipevault.store.layout import Layout
from pipevault.store.locks.leases import FoundLease, describe_leases, find_leases
from pipevault.store.needs import needed_by, needs_in
from pipevault.store.retention.pins import pins


@dataclass(frozen=True)
class Hold:
    """A reason to keep the entry ``key``: the entry ``holder``, itself or one that needs it, is ``pinned as prod`` or
    ``in use by process 4711 on worker-3``.
    """

    key: Digest
    holder: Digest
    cause: str
    remedy: str

    @property
    def reason(self) -> str:
        """``pinned as prod``, or ``needed by 7c2b5a1ac012, which is pinned as prod``."""
        return self.cause if self.key == self.holder else f"needed by {self.holder.short}, which is {self.cause}"


def find_holds(
    layout: Layout, manifests: Mapping[Digest, FoundManifest] | None = None, *, ignore_leases: bool = False
) -> dict[Digest, Hold]:
    """Return what keeps each entry that is kept. ``manifests``: those of the vault, if they were read already.

    :class:`~pipevault.errors.PinError`: a pin cannot be read; :class:`~pipevault.errors.VaultError`: a folder or a
    manifest cannot.
    """
    found: dict[Digest, Hold] = {}
    leases: dict[Digest, list[FoundLease]] = {}
    for lease in () if ignore_leases else find_leases(layout):
        if lease.alive:
            leases.setdefault(lease.key, []).append(lease)
    for key, held in leases.items():
        remedy = "Stop it first, or remove the entry all the same with --force."
        found[key] = Hold(key, key, f"in use by {describe_leases(held)}", remedy)
    names: dict[Digest, list[str]] = {}
    for name, key in pins(layout).items():
        names.setdefault(key, []).append(name)
    for key, pinned in names.items():
        found[key] = Hold(key, key, f"pinned as {', '.join(pinned)}", f"Unpin it first: pipevault unpin {pinned[0]}")
    for key, holder in needed_by(found, needs_in(layout, manifests)).items():
        found[key] = Hold(key, holder, found[holder].cause, found[holder].remedy)
    return found
