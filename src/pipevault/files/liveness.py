"""The identity of a process: a waiter tells by it that the holder of a lock is dead though a child keeps the lock.

A process number means nothing on another host, after a reboot, in another pid namespace (a container), or once it is
used again. So an identity holds the host name, the kernel's boot id, the namespaces that numbers and start times are
counted in, the number, and the start time in clock ticks since boot (``/proc/<pid>/stat``, field 22).

In names of files it is a pid and a ``mark``, 24 hexadecimal digits: 16 of the SHA-256 of the canonical JSON of
``[host, boot id, namespaces]``, then the start time modulo 2^32.
Source: https://man7.org/linux/man-pages/man5/proc_pid_stat.5.html
"""

from __future__ import annotations

import os
import socket
import sys
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any

import msgspec

from pipevault.digest import digest_json

_PROC = Path("/proc")


@dataclass(frozen=True)
class ProcessIdentity:
    """One process among all that ever ran. ``started``: clock ticks since boot; ``None``: not known."""

    host: str
    pid: Annotated[int, msgspec.Meta(ge=1)]
    boot_id: str | None = None
    namespaces: str | None = None
    """Inodes of the pid and the time namespace: ``4026531836.4026531834``."""
    started: Annotated[int, msgspec.Meta(ge=0)] | None = None

    @classmethod
    def current(cls) -> ProcessIdentity:
        return _current(os.getpid())

    @classmethod
    def from_json(cls, document: Any) -> ProcessIdentity:
        """Read what :meth:`to_json` made; ``ValueError`` for anything else. Unknown fields are ignored."""
        return msgspec.convert(document, cls)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def mark(self) -> str:
        place = digest_json(self._place).hex[:16]
        return f"{place}{(self.started or 0) % (1 << 32):08x}"

    def is_alive(self) -> bool | None:
        """Return whether the process runs; ``None`` where that cannot be told from here: it is of another host, boot or
        pid namespace, or the kernel hides it (``hidepid``). A zombie is dead: the system has freed its locks.
        """
        here = ProcessIdentity.current()
        can_look = here.boot_id is not None or sys.platform != "linux"  # else another pid namespace may be meant
        if self.pid <= 0 or self._place != here._place or not can_look:
            return None
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        except PermissionError:  # another user's
            pass
        except OverflowError:
            return None
        status = _status(_PROC / str(self.pid))
        if status is None or self.started is None:
            return None
        found_start, is_running = status
        return is_running and found_start == self.started

    @property
    def _place(self) -> list[str | None]:
        return [self.host, self.boot_id, self.namespaces]


@lru_cache(maxsize=1)
def _current(pid: int) -> ProcessIdentity:
    host = socket.gethostname()
    try:
        if os.readlink(_PROC / "self") != str(pid):  # /proc of another pid namespace: its numbers are not ours
            return ProcessIdentity(host, pid)
        boot_id = (_PROC / "sys/kernel/random/boot_id").read_text("ascii").strip()
        namespaces = f"{os.stat(_PROC / 'self/ns/pid').st_ino}.{_time_namespace()}"
    except (OSError, ValueError):  # no /proc, or a masked one
        return ProcessIdentity(host, pid)
    status = _status(_PROC / "self")
    return ProcessIdentity(host, pid, boot_id, namespaces, status[0] if status else None)


def _time_namespace() -> int:
    """Start times are shifted in a time namespace; 0 where the kernel has none."""
    try:
        return os.stat(_PROC / "self/ns/time").st_ino
    except OSError:
        return 0


def _status(folder: Path) -> tuple[int, bool] | None:
    """Read the start time in clock ticks and whether the process runs; ``None`` if it cannot be read."""
    try:
        text = (folder / "stat").read_text("ascii", errors="replace")
        # The name of the program, in brackets, may hold anything.
        fields = text.rpartition(")")[2].split()
        state, threads, start = fields[0], int(fields[17]), int(fields[19])
    except (OSError, ValueError, IndexError):
        return None
    # The first thread may end before the others; then only its first thread is a zombie.
    return start, state not in "ZXx" or threads > 1
