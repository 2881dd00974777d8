"""Leases: entries that a live process has loaded, which no pruning removes.

A lease is the file ``leases/<key digest>.<host>.<pid>.<16 hex digits>``. It is made in a staging folder, locked with
``flock`` and only then renamed to its place, so that it never stands there unlocked while its process lives. Canonical
JSON: ``{"lease_version":1,"process":<identity of the process>,"since":"2025-01-31T12:00:00+00:00"}``.

A forked child inherits the lock: the lease counts until both have ended, or the process that took it released it.

Whether the process lives is decided in this order:

1. The lock is held: it lives.
2. The process can be told to live or to be dead (this host, see :mod:`pipevault.store.liveness`): that decides, for the
   lock may have been granted to everyone.
3. Else it lives while the file was changed less than :data:`LEASE_LIMIT_S` ago, in either direction of the clock. So a
   process whose lease others cannot judge must refresh it: :meth:`Lease.refresh`.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipevault.digest import Digest, canonical_json
from pipevault.errors import VaultError
from pipevault.store.atomic import make_folder, vault_errors, write_file
from pipevault.store.layout import Layout
from pipevault.store.leftovers import Leftover
from pipevault.store.liveness import ProcessIdentity
from pipevault.store.manifest import now_utc
from pipevault.store.staging import staging_folder

LEASE_VERSION = 1
LEASE_LIMIT_S = 7 * 86_400.0
"""How long a lease counts that cannot be judged, such as one of another host, after its last refresh."""
REFRESH_INTERVAL_S = 3600.0


@dataclass
class Lease:
    """What keeps an entry. ``problem`` says why there is none; the entry may then be removed while it is in use.

    It ends with :meth:`release` or with the process, and belongs to the process that took it: in a forked child,
    :meth:`release` does nothing.
    """

    key: Digest
    path: Path | None = None
    problem: str = ""
    _descriptor: int | None = field(default=None, repr=False)
    _pid: int = field(default_factory=os.getpid, repr=False)
    _refreshed_s: float = field(default_factory=time.monotonic, repr=False)

    @property
    def held(self) -> bool:
        return self._descriptor is not None and self._pid == os.getpid()

    def refresh(self) -> None:
        """Renew it if the last time is over :data:`REFRESH_INTERVAL_S` ago. Never raises, and costs next to nothing."""
        if self.held and self.path is not None and time.monotonic() - self._refreshed_s >= REFRESH_INTERVAL_S:
            self._refreshed_s = time.monotonic()
            with suppress(OSError):
                os.utime(self.path)

    def release(self) -> None:
        """Give it up; a second time does nothing. Never raises."""
        if not self.held or self._descriptor is None:
            return
        descriptor, self._descriptor = self._descriptor, None
        with suppress(OSError):
            if self.path is not None:
                self.path.unlink()
        # Closing instead of LOCK_UN: a forked child shares the lock, and the file is gone anyway.
        with suppress(OSError):
            os.close(descriptor)


@dataclass(frozen=True)
class FoundLease:
    """A lease file. ``holder``: ``process 4711 on worker-3``; ``alive``: whether it counts."""

    path: Path
    key: Digest
    holder: str
    alive: bool


def take_lease(layout: Layout, key: Digest, *, writable: bool = True) -> Lease:
    """Keep the entry ``key`` while this process lives. Never raises: without a lease :attr:`Lease.problem` says why.

    Look the entry up *after* this: what was removed before the lease is no longer there, what was not stays.
    """
    if not writable:
        return Lease(key, problem="the vault cannot be written")
    try:
        make_folder(layout.leases_dir)
        with staging_folder(layout) as folder:
            return _take(layout, key, folder)
    except (VaultError, OSError) as error:
        return Lease(key, problem=str(error))


def find_leases(layout: Layout, *, now_s: float | None = None) -> list[FoundLease]:
    """Every lease file, sorted; nothing is changed. :class:`VaultError`: the folder cannot be read."""
    now_s = time.time() if now_s is None else now_s
    with vault_errors(layout.leases_dir, "listed"):
        try:
            names = sorted(os.listdir(layout.leases_dir))
        except FileNotFoundError:
            return []
    found = (_judge(layout, layout.leases_dir / name, now_s) for name in names)
    return [lease for lease in found if lease is not None]


def leased_keys(layout: Layout) -> set[Digest]:
    """The keys that a live process holds. Raises like :func:`find_leases`."""
    return {lease.key for lease in find_leases(layout) if lease.alive}


def find_dead_leases(layout: Layout) -> list[Leftover]:
    """The leases that do not count. Raises like :func:`find_leases`."""
    dead = [lease.path for lease in find_leases(layout) if not lease.alive]
    return [Leftover(path, _size_bytes(path), "the process that took the lease has ended") for path in dead]


def remove_dead_leases(layout: Layout) -> list[Leftover]:
    """Remove them; what was removed. What this user may not remove stays. Raises like :func:`find_leases`."""
    removed = []
    for lease in find_dead_leases(layout):
        with suppress(OSError):
            lease.path.unlink()
            removed.append(lease)
    return removed


def describe_leases(leases: Sequence[FoundLease]) -> str:
    """``process 4711 on worker-3 and 2 more``."""
    more = f" and {len(leases) - 1} more" if len(leases) > 1 else ""
    return f"{leases[0].holder}{more}"


def _take(layout: Layout, key: Digest, folder: Path) -> Lease:
    name = {"host": socket.gethostname(), "pid": os.getpid(), "random_hex": secrets.token_hex(8)}
    path = layout.lease_file(key, **name)  # type: ignore[arg-type]
    staged = folder / path.name
    document = {"lease_version": LEASE_VERSION, "process": ProcessIdentity.current().to_json(), "since": now_utc()}
    write_file(staged, canonical_json(document))
    # Of write access: network file systems grant an exclusive lock only then.
    descriptor = os.open(staged, os.O_RDWR | getattr(os, "O_CLOEXEC", 0))
    try:
        _try_lock(descriptor, exclusive=True)
        os.rename(staged, path)
    except BaseException:  # whatever it was goes on; only the descriptor must not leak
        os.close(descriptor)
        raise
    return Lease(key, path, _descriptor=descriptor)


def _judge(layout: Layout, path: Path, now_s: float) -> FoundLease | None:
    """``None`` if it is no lease, or is gone."""
    key = layout.key_of_lease(path)
    if key is None:
        return None
    host, pid, _ = path.name.partition(".")[2].split(".")
    holder = f"process {pid} on {host}"
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
    except FileNotFoundError:
        return None
    except OSError:
        return FoundLease(path, key, holder, True)
    try:
        is_held = _try_lock(descriptor, exclusive=False) is False
        alive: bool | None = True if is_held else _is_alive(_read(descriptor))
        if alive is None:
            alive = abs(now_s - os.fstat(descriptor).st_mtime) < LEASE_LIMIT_S
    except OSError:
        alive = True
    finally:
        os.close(descriptor)
    return FoundLease(path, key, holder, alive)


def _size_bytes(path: Path) -> int:
    try:
        return path.lstat().st_size
    except OSError:
        return 0


def _read(descriptor: int) -> Any:
    try:
        return json.loads(os.read(descriptor, 1 << 16))
    except (ValueError, RecursionError):
        return None


def _is_alive(document: Any) -> bool | None:
    """``None`` where it cannot be told."""
    try:
        identity = ProcessIdentity.from_json(document["process"])
    except (ValueError, TypeError, LookupError):
        return None
    return identity.is_alive()


def _try_lock(descriptor: int, *, exclusive: bool) -> bool | None:
    """``False``: another holds it; ``None``: there are no locks here."""
    try:
        import fcntl
    except ImportError:  # Windows
        return None
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True
