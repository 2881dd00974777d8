"""Questions about what entries need: a plan needs its graphs. Nothing is written.

A needed entry may be absent: the plan is then a hint that misses. So nothing here fails on one.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping

from pipevault.digest import Digest
from pipevault.store.inventory import FoundManifest, read_found
from pipevault.store.layout import Layout

Needs = Callable[[Digest], Iterable[Digest]]
"""Gives the keys that an entry needs itself; none for an entry that is absent."""


def needs_in(layout: Layout, manifests: Mapping[Digest, FoundManifest] | None = None) -> Needs:
    """Return what answers for the entries of a vault, from ``manifests`` or by reading what is asked for, which may
    raise :class:`~pipevault.errors.VaultError`. A manifest that cannot be understood needs all whose key occurs in it.
    """

    def needs(key: Digest) -> Iterable[Digest]:
        found = read_found(layout, key) if manifests is None else manifests.get(key)
        return () if found is None else sorted(found.needs)

    return needs


def needed_by(keys: Iterable[Digest], needs: Needs) -> dict[Digest, Digest]:
    """Return every entry that one of ``keys`` needs, itself or by way of others, and which one; not ``keys``."""
    roots = dict.fromkeys(keys)
    found: dict[Digest, Digest] = {}
    for root in roots:
        waiting = [root]
        while waiting:
            for key in needs(waiting.pop()):
                if key not in roots and key not in found:
                    found[key] = root
                    waiting.append(key)
    return found


def needed_first(needs: Mapping[Digest, Iterable[Digest]]) -> Iterator[Digest]:
    """Give the keys of ``needs``, each behind those that it needs; else sorted. In a circle the order is any."""
    seen: set[Digest] = set()
    for start in sorted(needs):
        waiting = [(start, False)]
        while waiting:
            key, is_done = waiting.pop()
            if is_done:
                yield key
            elif key not in seen:
                seen.add(key)
                waiting.append((key, True))
                waiting += [(other, False) for other in sorted(needs[key], reverse=True) if other in needs]


def only_needed_by(keys: Collection[Digest], manifests: Mapping[Digest, FoundManifest]) -> set[Digest]:
    """Return the entries that ``keys`` need and nothing else does but what goes with them; not ``keys`` themselves."""
    going = needed_by(keys, lambda key: manifests[key].needs if key in manifests else ()).keys() & manifests.keys()
    while True:
        needed = {
            key for other, found in manifests.items() if other not in keys and other not in going for key in found.needs
        }
        if not going & needed:
            return going
        going -= needed
