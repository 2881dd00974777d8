"""Leases: entries that a live process has loaded, which no pruning removes.

A lease is the empty file ``leases/<key digest>.<host>.<pid>.<16 hex digits>``, claimed by the process and its forked
children (:mod:`pipevault.files.claims`). Whoever may not write the vault has none: what it opened stays usable, and
what it opens later may be gone, which is a miss.
"""

from __future__ import annotations

import os
import secrets
import socket
from collections import defaultdict
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from pipevault.digest import Digest
from pipevault.errors import VaultError
from pipevault.files.atomic import make_folder
from pipevault.files.claims import Claim, abandoned, claim_file
from pipevault.store.layout import Layout
from pipevault.store.places import children


@dataclass
class Lease:
    """A hold on an entry, which ends with :meth:`release` or with the process that took it. Where it is not ``held``,
    the entry may be removed while it is in use.
    """

    key: Digest
    _claim: Claim | None = field(default=None, repr=False)

    @property
    def path(self) -> Path | None:
        return self._claim.path if self._claim else None

    @property
    def held(self) -> bool:
        return self._claim is not None and self._claim.held

    def release(self) -> None:
        if self._claim is not None:
            self._claim.release()


def take_lease(layout: Layout, key: Digest, *, writable: bool = True) -> Lease:
    """Keep the entry ``key`` while this process lives, if the vault can be written. Never raises.

    Look the entry up *after* this: what was removed before the lease is no longer there, what was not stays.
    """
    claim = None
    with suppress(VaultError, OSError):
        if writable:
            make_folder(layout.leases_dir)
        while writable and claim is None:
            host, pid = socket.gethostname(), os.getpid()
            claim = claim_file(layout.lease_file(key, host=host, pid=pid, random_hex=secrets.token_hex(8)))
    return Lease(key, claim)


def live_leases(layout: Layout) -> dict[Digest, list[str]]:
    """Return the holders of each lease that counts, such as ``process 4711 on worker-3``, by key; nothing is changed.
    :class:`VaultError`: the folder cannot be read.
    """
    holders: dict[Digest, list[str]] = defaultdict(list)
    for path in children(layout.leases_dir):
        if (key := layout.key_of_lease(path)) is not None:
            with abandoned(path) as is_free:
                if not is_free and os.path.lexists(path):
                    host, pid, _ = path.name.partition(".")[2].split(".")
                    holders[key].append(f"process {pid} on {host}")
    return holders
