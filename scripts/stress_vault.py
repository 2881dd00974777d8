#!/usr/bin/env python3
"""Put a vault under load, faults and attack, and print what it did. Needs no torch and no model.

Run: ``.venv/bin/python scripts/stress_vault.py``; ``--quick`` takes well under a minute. Prints a Markdown table, or
JSON with ``--json``. Times are only printed; the exit code is 1 if a promise was broken: a torn or lost entry, a stuck
lock, a damage that was not noticed, a second compilation.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

from figures import Figure, markdown
from pipevault.cache.search import explain_miss
from pipevault.digest import Digest
from pipevault.key import Key
from pipevault.settings import Settings
from pipevault.store.retention.prune import plan_prune
from pipevault.store.stats.summary import compact, count, summary
from pipevault.store.tiers import Tiers
from pipevault.store.vault import Vault
from stress_entries import Entry, end_of, fill, in_child, load, make_entry
from stress_faults import measure_damages, measure_kills
from stress_limits import measure_limits

PROCESSES = 32
ARTIFACT_BYTES = 2_000_000
COMPILE_S = 0.3
LOCK_TIMEOUT_S = 300.0
LOOKUPS = 200
COUNT_PROCESSES = 9
COUNT_CODE = """
import json, sys, time
from pathlib import Path
from pipevault.digest import Digest
from pipevault.store.stats.event_log import count
from pipevault.store.vault import Vault

vault, key, times = Vault.open(Path(sys.argv[1])), Digest(sys.argv[2]), []
for ref in vault.lookup(key).artifacts:
    vault.verified_path(ref)
for _ in range(9):
    started_s = time.perf_counter()
    count(vault.layout, "hit", key=key)
    times.append(1e6 * (time.perf_counter() - started_s))
print(json.dumps([times[0], sorted(times[1:])[4]]))
"""


@dataclass(frozen=True)
class Amounts:
    """How much is done. ``few`` and ``many``: numbers of entries of which the times are compared."""

    kills: int
    damages: int
    few: int
    many: int
    warm_rounds: int


QUICK = Amounts(kills=45, damages=300, few=100, many=1000, warm_rounds=1)
FULL = Amounts(kills=300, damages=2000, few=1000, many=10_000, warm_rounds=5)


def measure_race(folder: Path) -> list[Figure]:
    """As ``cache/session.py`` does on a miss: look up, take the lock, look again, compile, publish, load."""
    vault = Vault.open(folder / "vault")
    entry = _large_entry(folder)
    compiled, loaded = folder / "compiled", folder / "loaded"

    def work() -> None:
        if load(vault, entry.key) is None:
            count(vault.layout, "miss", key=entry.key, reason="absent")
            with vault.lock(entry.key, timeout_s=LOCK_TIMEOUT_S):
                if load(vault, entry.key) is None:
                    time.sleep(COMPILE_S)
                    _append(compiled)
                    count(vault.layout, "compiled", key=entry.key, seconds=COMPILE_S)
                    vault.publish(entry.manifest, entry.files)
        if set((load(vault, entry.key) or {}).values()) != set(entry.data.values()):
            raise AssertionError("other bytes were loaded than those that were published")
        count(vault.layout, "hit", key=entry.key)
        _append(loaded)

    started_s = time.perf_counter()
    codes, _ = _at_once(lambda ready: work())
    duration_s = time.perf_counter() - started_s
    compiles, loads, errors = _lines(compiled), _lines(loaded), sum(code != 0 for code in codes)
    before = summary(vault.layout).total
    compact(vault.layout)
    after = summary(vault.layout).total
    counted = f"{after.hits} hits, {after.missed} misses, {after.compiled} compiled"
    return [
        Figure(f"compiles, {PROCESSES} processes on one cold key", str(compiles), "1", compiles == 1),
        Figure("loads", f"{loads} in {duration_s:.1f} s", str(PROCESSES), loads == PROCESSES),
        Figure("errors", str(errors), "0", errors == 0),
        Figure(
            "counted, before and after folding", counted, f"{PROCESSES} hits", before == after and after.hits == loads
        ),
    ]


def measure_warm(folder: Path, rounds: int) -> list[Figure]:
    """The store's part of a hit: open the vault, look the entry up, verify its artifacts."""
    vault = Vault.open(folder / "vault")
    entry = _large_entry(folder)
    vault.publish(entry.manifest, entry.files)

    def hit(ready: Callable[[], None]) -> dict[str, float]:
        _hit(vault.root, entry)  # the first pays for imports and file caches
        ready()
        wall_s, cpu_s = time.perf_counter(), time.process_time()
        _hit(vault.root, entry)
        return {"wall": time.perf_counter() - wall_s, "cpu": time.process_time() - cpu_s}

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    alone = [answer for _ in range(10) for answer in _at_once(hit, processes=1)[1]]
    with_a_core_each = [answer for _ in range(10) for answer in _at_once(hit, processes=min(cores, PROCESSES))[1]]
    together = [answer for _ in range(rounds) for answer in _at_once(hit)[1]]

    def median_ms(answers: Sequence[dict[str, float]], clock: str) -> float:
        return 1000 * statistics.median(answer[clock] for answer in answers)

    def compared(answers: Sequence[dict[str, float]], clock: str) -> str:
        median, one = median_ms(answers, clock), median_ms(alone, clock)
        return f"{median:.1f} ms, {median / one:.2f} times one alone ({one:.1f} ms)"

    name = f"ready on a warm key, median of {PROCESSES} at once"
    shared = f"; {PROCESSES / cores:.0f} processes share each of {cores} cores" if cores < PROCESSES else ""
    return [
        Figure(f"{name}, CPU time", compared(together, "cpu"), "2 times"),
        Figure(f"{name}, wall clock", compared(together, "wall") + shared, "2 times, with a core for each"),
        Figure(f"the same with {min(cores, PROCESSES)} at once, a core for each", compared(with_a_core_each, "wall")),
    ]


def measure_count(folder: Path) -> list[Figure]:
    """In fresh processes, after what a hit does before it counts."""
    vault = Vault.open(folder / "vault")
    entry = _large_entry(folder)
    vault.publish(entry.manifest, entry.files)
    command = [sys.executable, "-c", COUNT_CODE, str(vault.root), entry.key.hex]
    answers = [json.loads(subprocess.check_output(command)) for _ in range(COUNT_PROCESSES)]
    first_us, later_us = (statistics.median(answer[number] for answer in answers) for number in (0, 1))
    value = f"{first_us:.0f} µs the first time in a process, then {later_us:.0f} µs"
    return [Figure("counting a hit", value, "50 µs")]


def measure_scale(folder: Path, few: int, many: int) -> list[Figure]:
    """Median lookup, ``ls`` in this process and as a command, and a prune plan, with few and with many entries."""
    times: dict[int, dict[str, float]] = {}
    for number in (few, many):
        vault = Vault.open(folder / f"vault{number}")
        keys = fill(vault, number)
        times[number] = _times_ms(vault, keys)
    figures = []
    goals = {
        "lookup": "5 ms",
        "explained miss": "50 ms (4489 ms with 10,000 where every manifest is read)",
        "ls, the first time": "1000 ms",
        "ls, again": "300 ms",
        "prune --dry-run": "1000 ms",
        "rm, one entry": "200 ms",
        "stats": "",
    }
    for name, goal in goals.items():
        growth = times[many][name] / times[few][name]
        value = f"{times[many][name]:.2f} ms; {times[few][name]:.2f} ms with {few}: {growth:.1f} times"
        linear = f", {many // few} times or less" if not name.startswith("ls") else ""
        figures.append(Figure(f"{name}, {many} entries", value, f"{goal}{linear}".removeprefix(", ")))
    return figures


def _times_ms(vault: Vault, keys: Sequence[Digest]) -> dict[str, float]:
    sample = keys[:: max(1, len(keys) // LOOKUPS)]
    there = vault.lookup(keys[0])
    if there is None:
        raise AssertionError("the entry is gone")
    absent = Key({**there.key.factors, "call": {"height": 1}})
    tiers = Tiers(Settings(vault.root))
    with tempfile.TemporaryDirectory(prefix="pipevault-stress-") as cache:
        listings = [_list_ms(vault, cache) for _ in range(4)]
    return {
        "lookup": statistics.median(_duration_ms(lambda key=key: vault.lookup(key)) for key in sample),  # type: ignore[misc]
        "explained miss": statistics.median(_duration_ms(lambda: explain_miss(tiers, absent)) for _ in range(5)),
        "ls, the first time": listings[0],
        "ls, again": min(listings[1:]),
        "prune --dry-run": min(_duration_ms(lambda: plan_prune(vault, max_size=1000)) for _ in range(3)),
        "rm, one entry": _duration_ms(lambda: vault.remove(vault.plan_removal(keys[:1], shown=False))),
        "stats": min(_duration_ms(lambda: summary(vault.layout)) for _ in range(3)),
    }


def _list_ms(vault: Vault, cache: str) -> float:
    """The command with the interpreter's start; it remembers what it read in the user's cache folder."""
    command = [sys.executable, "-m", "pipevault", "ls", "--dir", str(vault.root)]
    environment = {**os.environ, "XDG_CACHE_HOME": cache}
    return _duration_ms(lambda: subprocess.run(command, check=True, capture_output=True, env=environment))


def _duration_ms(function: Callable[[], object]) -> float:
    started_s = time.perf_counter()
    function()
    return 1000 * (time.perf_counter() - started_s)


def _large_entry(folder: Path) -> Entry:
    return make_entry(folder / "source", "large", {f"unet/{n}.pt2": bytes([n]) * ARTIFACT_BYTES for n in range(3)})


def _hit(root: Path, entry: Entry) -> None:
    vault = Vault.open(root)
    manifest = vault.lookup(entry.key)
    if manifest is None:
        raise AssertionError("the entry is gone")
    for ref in manifest.artifacts:
        vault.verified_path(ref)


def _at_once(
    work: Callable[[Callable[[], None]], Any], processes: int = PROCESSES
) -> tuple[list[int], list[dict[str, float]]]:
    """Run ``work(ready)`` in ``processes`` processes; ``ready`` waits until all have called it. Exit codes, answers."""
    barrier = multiprocessing.get_context("fork").Barrier(processes)
    with tempfile.TemporaryDirectory(prefix="pipevault-stress-") as folder:

        def run(number: int) -> None:
            answer = work(lambda: _wait(barrier))
            (Path(folder) / str(number)).write_text(json.dumps(answer))

        pids = [in_child(lambda number=number: run(number)) for number in range(processes)]  # type: ignore[misc]
        codes = [end_of(pid) for pid in pids]
        return codes, [json.loads(path.read_text()) for path in sorted(Path(folder).iterdir())]


def _wait(barrier: Barrier) -> None:
    barrier.wait(LOCK_TIMEOUT_S)


def _append(path: Path) -> None:
    with path.open("ab", buffering=0) as file:
        file.write(b"\n")


def _lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def measure_all(folder: Path, amounts: Amounts, *, seed: int, only: Sequence[str]) -> list[Figure]:
    stages: dict[str, Callable[[Path], list[Figure]]] = {
        "race": measure_race,
        "warm": lambda place: measure_warm(place, amounts.warm_rounds),
        "count": measure_count,
        "kills": lambda place: measure_kills(place, kills=amounts.kills, seed=seed),
        "damages": lambda place: measure_damages(place, damages=amounts.damages, seed=seed),
        "scale": lambda place: measure_scale(place, amounts.few, amounts.many),
        "limits": measure_limits,
    }
    figures: list[Figure] = []
    for name, stage in stages.items():
        if not only or name in only:
            place = folder / name
            place.mkdir()
            started_s = time.perf_counter()
            figures += stage(place)
            print(f"{name}: {time.perf_counter() - started_s:.1f} s", file=sys.stderr)
    return figures


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--quick", action="store_true", help="fewer kills, damages and entries")
    parser.add_argument("--only", action="append", default=[], metavar="STAGE", choices=STAGES, help=", ".join(STAGES))
    parser.add_argument("--seed", type=int, default=0, help="of the random moments, steps and damages (default: 0)")
    parser.add_argument("--dir", type=Path, help="work in a new folder below this one (default: the temporary folder)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args(arguments)
    with contextlib.ExitStack() as stack:
        temporary = tempfile.TemporaryDirectory(prefix="pipevault-stress-", dir=options.dir)
        folder = Path(stack.enter_context(temporary))
        folder.chmod(0o755)  # one stage runs as another user
        os.environ["XDG_STATE_HOME"] = str(folder / "state")
        figures = measure_all(folder, QUICK if options.quick else FULL, seed=options.seed, only=options.only)
    print(json.dumps([asdict(figure) for figure in figures], indent=2) if options.json else markdown(figures))
    return int(any(figure.kept is False for figure in figures))


STAGES = ("race", "warm", "count", "kills", "damages", "scale", "limits")

if __name__ == "__main__":
    sys.exit(main())
