"""The memory that this process may still use."""

from __future__ import annotations

import sys
from contextlib import suppress
from pathlib import Path

_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")


def available_memory_bytes() -> int:
    """Return what the system and the container leave; where neither tells, more than there can be.
    https://docs.kernel.org/admin-guide/cgroup-v2.html#memory-interface-files
    """
    left = [sys.maxsize]
    with suppress(OSError):
        lines = _MEMINFO.read_text("ascii").splitlines()
        left += [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    with suppress(OSError, ValueError):  # no container of that kind, or "max"
        limit, used = ((_CGROUP / name).read_text("ascii").strip() for name in ("memory.max", "memory.current"))
        left.append(max(int(limit) - int(used), 0))
    return min(left)
