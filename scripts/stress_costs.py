"""What a generation of the demo pays for a level, and of that for its record and its guard."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from figures import Figure
from measure_determinism import SEED, digits, draw


def measure_costs(
    vault: Path, rounds: int, *, frozen: bool, levels: Sequence[str], batch_size: int = 1
) -> list[Figure]:
    """Medians over ``rounds`` in which the levels take turns, so that all see the same load."""
    from pipevault.runtime.guard import Guard
    from pipevault.runtime.run_record import Recorder

    seconds: dict[str, list[float]] = {level: [] for level in ("off", *levels)}
    records: list[float] = []
    checks: list[float] = []
    pipes = {level: _open(vault, level, frozen=frozen, batch_size=batch_size) for level in seconds}
    prompts = digits(batch_size)
    for pipe in pipes.values():
        for _ in range(2):  # the first makes the guard and hashes the weights
            draw(pipe, prompts, seed=SEED)
    with _timed(Recorder, "record", records), _timed(Guard, "check", checks):
        for number in range(rounds):
            for level in list(pipes) if number % 2 == 0 else reversed(pipes):
                started_s = time.perf_counter()
                draw(pipes[level], prompts, seed=SEED)
                seconds[level].append(time.perf_counter() - started_s)
    kind = f"{'frozen' if frozen else 'eager'}, batch {batch_size}, median of {rounds}"
    record_ms, guard_ms, off_ms = (1000 * statistics.median(times) for times in (records, checks, seconds["off"]))
    figures = [
        Figure(
            f"record and guard of a generation, {kind}",
            f"{record_ms + guard_ms:.2f} ms ({record_ms:.2f} + {guard_ms:.2f})",
            "2 ms",
        )
    ]
    for level in levels:
        pairs = zip(seconds["off"], seconds[level], strict=True)
        share = statistics.median(with_level / off for off, with_level in pairs) - 1
        value = f"{share:+.1%} ({1000 * statistics.median(seconds[level]):.1f} ms, off {off_ms:.1f} ms)"
        figures.append(Figure(f"{level} against off, {kind}", value, "2 %" if level == "repeatable" else ""))
    return figures


def _open(vault: Path, level: str, *, frozen: bool, batch_size: int) -> Any:
    from pipevault import PipelineCache
    from pipevault.opening import DEMO_MODEL, open_pipeline

    pipe = open_pipeline(DEMO_MODEL)
    if not frozen:
        return PipelineCache(vault, level=level, on_unfrozen="eager").load(pipe)
    return PipelineCache(vault, level=level).load(pipe, batch_size=batch_size, guidance=True)


@contextmanager
def _timed(owner: type, name: str, seconds: list[float]) -> Iterator[None]:
    method: Callable[..., Any] = getattr(owner, name)

    def measured(*arguments: Any, **keywords: Any) -> Any:
        started_s = time.perf_counter()
        try:
            return method(*arguments, **keywords)
        finally:
            seconds.append(time.perf_counter() - started_s)

    setattr(owner, name, measured)
    try:
        yield
    finally:
        setattr(owner, name, method)
