"""Threads that call a few pipelines at several levels at once: right bytes, and nothing of the program is moved."""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from figures import Figure

TESTS = Path(__file__).resolve().parents[1] / "tests"
sys.path[:0] = [str(TESTS), str(TESTS / "runtime")]

from helpers.loaded import Paused  # type: ignore[import-not-found, unused-ignore]  # noqa: E402

THREADS = 64
LEVELS = ("off", "repeatable", "strict", "repeatable")
SEEDS = 20
LONGEST_WAIT_S = 0.002
TIMEOUT_S = 1200.0


class Wait:
    """A step callback. All are of one kind, whatever they wait, so that a call with one is known after the first."""

    def __init__(self, seconds: Sequence[float]) -> None:
        self._seconds = list(seconds)

    def __call__(self) -> None:
        if self._seconds:
            time.sleep(self._seconds.pop())


@dataclass(frozen=True)
class Seen:
    """One call. ``right``: whether its bytes are those of its seed, for one that has a seed."""

    right: bool | None
    recorded: bool


def measure_threads(folder: Path, *, calls: int, frozen: bool, seed: int) -> list[Figure]:
    """Half of the calls beside some that draw from the program's own streams, half beside none."""
    from pipevault import PipelineCache

    policy = "compile" if frozen else "eager"
    caches = [PipelineCache(folder / "vault", level=level, on_unfrozen=policy) for level in LEVELS]
    pipes = [cache.load(Paused(), batch_size=1 if frozen else None) for cache in caches]
    wanted = [[_alone(pipe, number, frozen=frozen) for number in range(SEEDS)] for pipe in pipes]
    figures = []
    for name, sources in (("", ("seed", "seed", "generator")), (", some global", ("seed", "generator", "global"))):
        figures += _measure(pipes, wanted, sources, name=name, calls=calls // 2, seed=seed)
    return figures


def _alone(pipe: Any, seed: int, *, frozen: bool) -> torch.Tensor:
    """Return what one thread draws; where nothing is frozen, without pipevault."""
    from pipevault import generators

    [generator] = generators(seed, 1)
    drawn: torch.Tensor = pipe(seed=seed) if frozen else Paused()(generator=generator)
    return drawn


def _measure(
    pipes: Sequence[Any],
    wanted: Sequence[Sequence[torch.Tensor]],
    sources: Sequence[str],
    *,
    name: str,
    calls: int,
    seed: int,
) -> list[Figure]:
    from pipevault.determinism.layers import capture, moved

    before, switches = capture(), _switches()
    plans = [random.Random(f"{seed} {number}") for number in range(calls)]
    started_s = time.perf_counter()
    with ThreadPoolExecutor(THREADS) as pool:
        found = [pool.submit(_call, pipes, wanted, sources, chance) for chance in plans]
        seen = [each.result(TIMEOUT_S) for each in found]
    duration_s = time.perf_counter() - started_s
    promised = [each.right for each in seen if each.right is not None]
    wrong, unrecorded = promised.count(False), sum(not each.recorded for each in seen)
    changed = {key for key, state in _switches().items() if state != switches[key]}
    figures = [
        Figure(
            f"{calls} calls of {len(pipes)} pipelines from {THREADS} threads{name}: with other bytes",
            f"{wrong} of {len(promised)} in {duration_s:.1f} s",
            "0",
            wrong == 0,
        ),
        Figure(f"records with another seed or level{name}", str(unrecorded), "0", unrecorded == 0),
        Figure(f"switches left changed{name}", ", ".join(sorted(changed)) or "none", "none", not changed),
    ]
    if "global" not in sources:
        streams = moved(before, capture())
        figures.append(Figure("random streams moved", ", ".join(streams) or "none", "none", not streams))
    return figures


def _call(
    pipes: Sequence[Any], wanted: Sequence[Sequence[torch.Tensor]], sources: Sequence[str], chance: random.Random
) -> Seen:
    from pipevault import generators, record_of

    index, seed, source = chance.randrange(len(pipes)), chance.randrange(SEEDS), chance.choice(sources)
    pause = Wait([chance.uniform(0, LONGEST_WAIT_S) for _ in range(3)])
    arguments: dict[str, Callable[[], dict[str, Any]]] = {
        "seed": lambda: {"seed": seed},
        "generator": lambda: {"generator": generators(seed, 1)[0]},
        "global": dict,
    }
    output = pipes[index](pause=pause, **arguments[source]())
    record = record_of(output)
    is_held = record.level["achieved"] == LEVELS[index] and not record.level["notes"]
    is_seed = source != "seed" or record.seeds["root"] == seed
    right = None if source == "global" else torch.equal(output, wanted[index][seed])
    return Seen(right, is_held and is_seed)


def _switches() -> dict[str, Any]:
    from pipevault.determinism.switches import FLAGS

    return {name: flag.state() for name, flag in FLAGS.items()}
