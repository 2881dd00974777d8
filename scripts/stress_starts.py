"""Containers that start, load and are killed: how many files they leave, and whether the vault stays below its limit.

Each start is a process, where this user may make them in namespaces of its own (number 1, another host name), so that
nothing but its locks tells whether it lives. It leases graphs, half way through one freezing, and ends by SIGKILL.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from figures import Figure, markdown
from pipevault.store.locks.leases import live_leases
from pipevault.store.retention.prune import enforce_max_size, vault_size_bytes
from pipevault.store.vault import Vault
from stress_entries import Entry, end_of, in_child, small_entry

ENTRIES = 40
LEASES = 4
PUBLISH_EACH = 20
MAX_SIZE = 100_000
_MOST_FILES = 150
_NEW_HOST_NAME, _NEW_PIDS = 0x04000000, 0x20000000


def measure_starts(folder: Path, starts: int) -> list[Figure]:
    """``starts`` containers, one after the other, of which one in twenty publishes an entry under ``max_size``."""
    vault = Vault.open(folder / "vault")
    entries = [small_entry(folder / "source", f"entry {number}") for number in range(ENTRIES)]
    most, largest, above = dict.fromkeys(("leases", "tmp", "locks"), 0), 0, 0
    started_s = time.perf_counter()
    isolated = _can_isolate()
    for number in range(starts):
        if number % PUBLISH_EACH == 0:
            entry = entries[number // PUBLISH_EACH % ENTRIES]
            vault.publish(entry.manifest, entry.files)
            report = enforce_max_size(vault, entry.key, max_size=MAX_SIZE)
            above = max(above, report.left_bytes if report else 0)
            largest = max(largest, vault_size_bytes(vault.layout))
        _start_and_kill(vault.root, [entries[(number + step) % ENTRIES] for step in range(LEASES)], isolated, number)
        for name in most:
            place = vault.root / name
            most[name] = max(most[name], len(os.listdir(place)) if place.exists() else 0)
    elapsed_s = time.perf_counter() - started_s
    held = live_leases(vault.layout).keys()
    where = "in namespaces of their own" if isolated else "in this namespace"
    return [
        Figure("container starts, killed", f"{starts} {where} ({elapsed_s:.0f} s)"),
        *(
            Figure(f"files in {name}/, most", str(number), f"{_MOST_FILES}", number <= _MOST_FILES)
            for name, number in most.items()
        ),
        Figure("entries held by dead containers", str(len(held)), "0", not held),
        Figure(
            "size of the vault, largest", f"{largest} bytes", f"{MAX_SIZE} bytes", largest <= MAX_SIZE and not above
        ),
    ]


def _start_and_kill(root: Path, leased: Sequence[Entry], isolated: bool, number: int) -> None:
    reader, writer = os.pipe()

    def container() -> None:
        vault = Vault.open(root)
        leases = [vault.lease(entry.key) for entry in leased]
        with vault.lock(leased[0].key, timeout_s=60), vault.staging() as staging:
            (staging / "half").write_bytes(b"x" * 1000)
            os.write(writer, bytes([all(lease.held for lease in leases)]))
            signal.pause()

    def start() -> None:
        if isolated:
            ctypes.CDLL(None).unshare(_NEW_PIDS | _NEW_HOST_NAME)
            socket.sethostname(f"container-{number}")
        pid = in_child(container)
        try:
            if os.read(reader, 1) != b"\1":
                raise RuntimeError("an entry could not be leased")
        finally:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)

    try:
        if end_of(in_child(start)) != 0:
            raise RuntimeError("a container did not start as it should; see above")
    finally:
        os.close(reader)
        os.close(writer)


def _can_isolate() -> bool:
    def run() -> None:
        if sys.platform != "linux" or ctypes.CDLL(None).unshare(_NEW_PIDS | _NEW_HOST_NAME) != 0:
            os._exit(1)

    return end_of(in_child(run)) == 0


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--starts", type=int, default=20_000, help="default: 20000")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="pipevault-stress-") as folder:
        figures = measure_starts(Path(folder), options.starts)
    print(json.dumps([asdict(figure) for figure in figures], indent=2) if options.json else markdown(figures))
    return int(any(figure.kept is False for figure in figures))


if __name__ == "__main__":
    sys.exit(main())
