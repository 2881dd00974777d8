"""What a generation of the demo pays for a level, and what it pays whatever it draws."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from figures import Figure
from measure_determinism import SEED, digits, draw


def measure_costs(
    vault: Path, rounds: int, *, frozen: bool, levels: Sequence[str], batch_size: int = 1
) -> list[Figure]:
    """Medians over ``rounds`` in which the levels take turns, so that all see the same load."""
    seconds: dict[str, list[float]] = {level: [] for level in ("off", *levels)}
    pipes = {level: _open(vault, level, frozen=frozen, batch_size=batch_size) for level in seconds}
    prompts = digits(batch_size)
    for pipe in pipes.values():
        for _ in range(2):  # the first makes the guard and hashes the weights
            draw(pipe, prompts, seed=SEED)
    for number in range(rounds):
        for level in list(pipes) if number % 2 == 0 else reversed(pipes):
            started_s = time.perf_counter()
            draw(pipes[level], prompts, seed=SEED)
            seconds[level].append(time.perf_counter() - started_s)
    kind = f"{'frozen' if frozen else 'eager'}, batch {batch_size}, median of {rounds}"
    off_ms = 1000 * statistics.median(seconds["off"])
    figures = [Figure(f"turn, level, guard and record, {kind}", f"{_overhead_ms(pipes[levels[-1]]):.2f} ms", "2 ms")]
    for level in levels:
        pairs = zip(seconds["off"], seconds[level], strict=True)
        share = statistics.median(with_level / off for off, with_level in pairs) - 1
        value = f"{share:+.1%} ({1000 * statistics.median(seconds[level]):.1f} ms, off {off_ms:.1f} ms)"
        figures.append(Figure(f"{level} against off, {kind}", value, "2 %" if level == "repeatable" else ""))
    return figures


def measure_two_threads(vault: Path, rounds: int, *, frozen: bool, batch_size: int = 10) -> Figure:
    """Pictures of two threads with a pipeline each, against those of one: medians over ``rounds`` that take turns."""
    pipes = [_open(vault, "repeatable", frozen=frozen, batch_size=batch_size) for _ in range(2)]
    prompts = digits(batch_size)
    for pipe in pipes * 2:
        draw(pipe, prompts, seed=SEED)
    ratios = []
    for _ in range(rounds):
        alone_s = _seconds(lambda: draw(pipes[0], prompts, seed=SEED))
        with ThreadPoolExecutor(2) as pool:
            together_s = _seconds(lambda: list(pool.map(lambda pipe: draw(pipe, prompts, seed=SEED), pipes)))
        ratios.append(2 * alone_s / together_s)
    kind = f"{'frozen' if frozen else 'eager'}, batch {batch_size}, median of {rounds}"
    return Figure(f"two threads, a pipeline each, against one, {kind}", f"{statistics.median(ratios):.2f} times")


def _seconds(function: Callable[[], object]) -> float:
    started_s = time.perf_counter()
    function()
    return time.perf_counter() - started_s


def _open(vault: Path, level: str, *, frozen: bool, batch_size: int) -> Any:
    from pipevault import PipelineCache
    from pipevault.opening import DEMO_MODEL, open_pipeline

    pipe = open_pipeline(DEMO_MODEL)
    if not frozen:
        return PipelineCache(vault, level=level, on_unfrozen="eager").load(pipe)
    return PipelineCache(vault, level=level).load(pipe, batch_size=batch_size, guidance=True)


def _overhead_ms(pipe: Any) -> float:
    """CPU time of a generation whose method does nothing but draw its noise and return a picture."""
    import torch
    from PIL import Image

    from pipevault.cache.loaded import loaded_state
    from pipevault.runtime.generation import generate

    def method(self: Any, prompt: str = "", generator: Any = None) -> list[Image.Image]:
        torch.randn(1, 4, 8, 8, generator=generator)
        return [Image.new("RGB", (32, 32))]

    times = []
    for seed in range(220):
        started_s = time.process_time()
        generate(pipe, method, ("a seven",), {"seed": seed}, lambda: loaded_state(pipe))
        times.append(1000 * (time.process_time() - started_s))
    return statistics.median(times[20:])
