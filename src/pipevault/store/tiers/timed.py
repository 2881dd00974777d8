"""A store that may never answer: what it does not give in time counts as refused, and it is left out for a while."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

from pipevault.digest import Digest
from pipevault.store.manifest import Manifest
from pipevault.store.tiers.deadline import ask
from pipevault.store.tiers.interface import EntryStore
from pipevault.store.tiers.wrapper import Answer, Wrapper


class Timed(Wrapper):
    """Asks a store by :func:`pipevault.store.tiers.deadline.ask` alone, and so raises
    :class:`~pipevault.errors.SlowTierError`.
    """

    def __init__(self, store: EntryStore, timeout_s: float) -> None:
        super().__init__(store)
        self._timeout_s = timeout_s

    def _pass(self, question: Callable[[], Answer], size_bytes: int = 0) -> Answer:
        return ask(self.tier.dir, question, timeout_s=self._timeout_s, size_bytes=size_bytes)

    def newest(self, count: int, shelf: Digest | None = None) -> Iterator[Manifest]:
        """Give as many as are read in half of the time."""
        until_s = time.monotonic() + self._timeout_s / 2

        def read() -> list[Manifest]:
            found = []
            for manifest in self._store.newest(count, shelf):
                found.append(manifest)
                if time.monotonic() > until_s:
                    break
            return found

        return iter(self._pass(read))
