"""The leases of a loaded pipeline: they end with it, so that a prune may remove what is no longer used."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipevault.store.locks.leases import Lease


class HeldLeases:
    """The leases of one pipeline, released on request, when it is collected, or when the interpreter ends.

    A copy, by ``copy.deepcopy`` or by pickling, holds none: copies of a loaded pipeline are eager.
    """

    def __init__(self, leases: list[Lease] | None = None) -> None:
        """``leases`` may grow: graphs are opened when they are first used."""
        self._leases = leases if leases is not None else []
        self._finalizer = weakref.finalize(self, _release, self._leases)

    def release(self) -> None:
        self._finalizer()

    def __deepcopy__(self, memo: dict[int, Any]) -> HeldLeases:
        return HeldLeases()

    def __reduce__(self) -> tuple[Any, ...]:
        return HeldLeases, ()


def _release(leases: Sequence[Lease]) -> None:
    for lease in leases:
        lease.release()
