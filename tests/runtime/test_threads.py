"""Loaded pipelines in several threads: each call has its own seed, and the program keeps its streams and switches."""

from __future__ import annotations

import asyncio
import logging
import os
import random
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch._inductor import config as inductor_config

import pipevault
from helpers.loaded import Paused, load
from pipevault.cache.loaded import loaded_state
from pipevault.determinism.layers import capture, moved
from pipevault.determinism.switches import FLAGS
from pipevault.errors import BadCallError, TurnTimeoutError

WAIT_S = 20.0
LEVELS = ("off", "repeatable", "strict")


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(8) as pool:
        yield pool


def switches() -> dict[str, Any]:
    return {name: flag.state() for name, flag in FLAGS.items()}


def plain(seed: int, **arguments: Any) -> torch.Tensor:
    return Paused()(generator=pipevault.generators(seed, 1)[0], **arguments)


class Do:
    """A callback. All of them are of one kind, whatever they do, so that a call with one is known after the first."""

    def __init__(self, action: Callable[[], Any] = lambda: None) -> None:
        self._action = action

    def __call__(self) -> None:
        self._action()


class Gate(Do):
    """Holds the first call that passes until it is opened; later ones go through."""

    def __init__(self) -> None:
        super().__init__(self._pass)
        self.reached, self._open = threading.Event(), threading.Event()

    def _pass(self) -> None:
        if not self.reached.is_set():
            self.reached.set()
            assert self._open.wait(WAIT_S)

    def open(self) -> None:
        self._open.set()

    @classmethod
    def opened(cls) -> Gate:
        gate = cls()
        gate.open()
        return gate


@pytest.mark.parametrize("level", LEVELS)
def test_calls_of_one_pipeline_keep_their_seeds(tmp_path: Path, pool: ThreadPoolExecutor, level: str) -> None:
    pipe = load(Paused(), tmp_path, level=level)
    wanted = {seed: plain(seed) for seed in range(24)}
    before, flags = capture(), switches()
    outputs = dict(zip(wanted, pool.map(lambda seed: pipe(seed=seed), wanted), strict=True))
    assert not moved(before, capture())
    assert switches() == flags
    for seed, output in outputs.items():
        assert torch.equal(output, wanted[seed])
        record = pipevault.record_of(output)
        assert record.seeds["root"] == seed
        assert record.level["achieved"] == level


def test_waiting_is_in_the_record_apart_from_drawing(tmp_path: Path, pool: ThreadPoolExecutor) -> None:
    pipe, gate = load(Paused(), tmp_path), Gate()
    first = pool.submit(pipe, seed=1, pause=gate)
    assert gate.reached.wait(WAIT_S)
    second = pool.submit(pipe, seed=2)
    threading.Timer(0.3, gate.open).start()
    waited, drawn = (pipevault.record_of(second.result(WAIT_S)).seconds[name] for name in ("waiting", "drawing"))
    assert waited >= 0.2
    assert drawn < waited
    assert pipevault.record_of(first.result(WAIT_S)).seconds["waiting"] < 0.2


def test_pipelines_run_beside_one_another_once_they_are_known_to_draw_from_generators_alone(
    tmp_path: Path, pool: ThreadPoolExecutor
) -> None:
    one, other = load(Paused(), tmp_path), load(Paused(), tmp_path)
    met = threading.Barrier(2)
    for pipe in (one, other):
        pipe(seed=1, num_inference_steps=1, pause=Do())
    before = capture()
    calls = [
        pool.submit(pipe, seed=seed, num_inference_steps=1, pause=Do(lambda: met.wait(WAIT_S)))
        for seed, pipe in ((1, one), (2, other))
    ]
    pictures = [call.result(WAIT_S) for call in calls]
    assert torch.equal(pictures[0], plain(1, num_inference_steps=1))
    assert torch.equal(pictures[1], plain(2, num_inference_steps=1))
    assert not moved(before, capture())


def test_pipelines_that_share_a_component_take_turns(tmp_path: Path, pool: ThreadPoolExecutor) -> None:
    one: Any = Paused()
    other: Any = Paused()
    gate, inside = Gate(), threading.Event()
    one.scheduler = other.scheduler = type("Scheduler", (), {})()
    for pipe in (one, other):
        load(pipe, tmp_path)(seed=1, pause=Gate.opened())
        pipe(seed=1, pause=Do())
    first = pool.submit(one, seed=1, pause=gate)
    assert gate.reached.wait(WAIT_S)
    second = pool.submit(other, seed=2, pause=Do(inside.set))
    assert not inside.wait(0.3)
    gate.open()
    assert torch.equal(first.result(WAIT_S), plain(1))
    assert pipevault.record_of(second.result(WAIT_S)).seconds["waiting"] > 0


def test_a_level_waits_for_one_that_excludes_it_and_times_out(tmp_path: Path, pool: ThreadPoolExecutor) -> None:
    strict = load(Paused(), tmp_path, level="strict")
    off = load(Paused(), tmp_path, level="off", turn_timeout_s=0.1)
    for pipe in (strict, off):
        pipe(seed=1, pause=Do())
    gate, flags = Gate(), switches()
    first = pool.submit(strict, seed=1, pause=gate)
    assert gate.reached.wait(WAIT_S)
    with pytest.raises(TurnTimeoutError, match=r"Paused at level off waited 0 s for its turn: .* at level strict"):
        off(seed=2, pause=Do())
    gate.open()
    assert torch.equal(first.result(WAIT_S), plain(1))
    assert torch.equal(off(seed=2, pause=Do()), plain(2))
    assert switches() == flags


def test_off_never_runs_under_the_switches_of_strict(tmp_path: Path, pool: ThreadPoolExecutor) -> None:
    seen: list[bool] = []
    pipes = {level: load(Paused(), tmp_path, level=level) for level in LEVELS}

    def call(number: int) -> None:
        level = LEVELS[number % 3]

        def look() -> None:
            seen.append(torch.are_deterministic_algorithms_enabled() == (level == "strict"))

        record = pipevault.record_of(pipes[level](seed=number, pause=Do(look)))
        assert (record.level["achieved"], record.level["notes"]) == (level, [])

    list(pool.map(call, range(60)))
    assert len(seen) == 180
    assert all(seen)
    assert not torch.are_deterministic_algorithms_enabled()


def test_a_switch_that_something_else_sets_meanwhile_is_told_of(tmp_path: Path) -> None:
    pipe = load(Paused(), tmp_path, level="strict")

    def disturb() -> None:
        torch.use_deterministic_algorithms(False)

    record = pipevault.record_of(pipe(seed=1, pause=disturb))
    assert record.level["achieved"] == "repeatable"
    assert "deterministic_algorithms was set to 'off' while the level was held" in record.level["notes"][0]


def test_a_call_inside_a_call_is_part_of_it(tmp_path: Path) -> None:
    pipe = load(Paused(), tmp_path)
    inner: list[torch.Tensor] = []

    def again() -> None:
        if not inner:
            inner.append(torch.empty(0))
            inner[0] = pipe(generator=torch.Generator().manual_seed(5))

    output = pipe(seed=1, pause=again)
    assert torch.equal(output, plain(1))
    assert torch.equal(inner[0], Paused()(generator=torch.Generator().manual_seed(5)))
    with pytest.raises(pipevault.errors.SettingsError, match="no run record"):
        pipevault.record_of(inner[0])
    with pytest.raises(TypeError, match="seed"):
        pipe(seed=1, pause=lambda: pipe(seed=2))


def test_a_call_of_another_pipeline_inside_a_call_has_its_own_record(tmp_path: Path) -> None:
    outer, inner = load(Paused(), tmp_path), load(Paused(), tmp_path)
    found: list[torch.Tensor] = []
    output = outer(seed=1, num_inference_steps=1, pause=lambda: found.append(inner(seed=2)))
    assert torch.equal(output, plain(1, num_inference_steps=1))
    assert torch.equal(found[0], plain(2))
    assert pipevault.record_of(found[0]).seeds["root"] == 2


def test_threads_of_asyncio_have_the_level_of_the_block_around_them(tmp_path: Path) -> None:
    pipe = load(Paused(), tmp_path)
    seen: list[bool] = []

    async def serve() -> list[torch.Tensor]:
        calls = [asyncio.to_thread(pipe, seed=seed, pause=lambda: seen.append(is_strict())) for seed in range(6)]
        return list(await asyncio.gather(*calls))

    def is_strict() -> bool:
        return torch.are_deterministic_algorithms_enabled()

    outputs = asyncio.run(serve())
    assert not any(seen)
    with pipevault.level("strict"):
        outputs += asyncio.run(serve())
        assert is_strict()
    assert seen == [False] * 18 + [True] * 18
    assert not is_strict()
    for output, seed in zip(outputs, [*range(6), *range(6)], strict=True):
        assert torch.equal(output, plain(seed))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_goes_on_alone(tmp_path: Path, pool: ThreadPoolExecutor) -> None:
    """A generation of a thread that the child does not have keeps neither a turn, nor a switch, nor a stream."""
    strict, gate = load(Paused(), tmp_path, level="strict"), Gate()
    before = capture()
    first = pool.submit(strict, seed=1, pause=gate)
    assert gate.reached.wait(WAIT_S)
    assert torch.are_deterministic_algorithms_enabled()
    if (child := os.fork()) == 0:
        try:
            is_clean = not torch.are_deterministic_algorithms_enabled() and not moved(before, capture())
            pipe = load(Paused(), tmp_path)
            os._exit(0 if is_clean and torch.equal(pipe(seed=3), plain(3)) else 1)
        finally:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    gate.open()
    assert torch.equal(first.result(WAIT_S), plain(1))


class Undecided(Paused):
    """Draws from torch's own stream when it is told to, which no argument shows."""

    draws = False

    def __call__(self, prompt: str = "", generator: Any = None) -> torch.Tensor:  # type: ignore[override]
        latents = super().__call__(prompt, generator=generator)
        return latents + torch.randn(8, 8) if self.draws else latents


def test_one_that_draws_all_the_same_is_noticed_and_drawn_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pipe = load(Undecided(), tmp_path)
    pipe(seed=1)
    pipe.draws = True
    before = capture()
    with caplog.at_level(logging.WARNING, "pipevault"):
        first = pipe(seed=1)
    assert "it is drawn again alone" in caplog.text
    assert not moved(before, capture())
    torch.rand(3)
    assert torch.equal(pipe(seed=1), first)
    assert "drew from a global generator (torch), which was seeded" in pipevault.record_of(first).level["notes"][0]


def test_what_the_program_draws_meanwhile_is_not_taken_back(tmp_path: Path) -> None:
    """A thread of the program moved the stream, and the call is drawn again for nothing; the stream stays there."""
    pipe = load(Paused(), tmp_path)
    pipe(seed=1, pause=Do())
    drawn, wanted = [False], plain(1)

    def draw_once() -> None:
        if not drawn[0]:
            drawn[0] = True
            torch.rand(1)

    torch.manual_seed(3)
    assert torch.equal(pipe(seed=1, pause=Do(draw_once)), wanted)
    after = torch.get_rng_state()
    torch.manual_seed(3)
    torch.rand(1)
    assert torch.equal(after, torch.get_rng_state())


class FromEverything(Paused):
    def __call__(self, prompt: str = "", generator: Any = None) -> torch.Tensor:  # type: ignore[override]
        latents = super().__call__(prompt, generator=generator)
        return latents + torch.randn(8, 8) + random.random() + float(np.random.rand())


def test_streams_of_pipelines_that_draw_from_all_of_them_are_kept_apart(
    tmp_path: Path, pool: ThreadPoolExecutor
) -> None:
    pipes = [load(FromEverything(), tmp_path) for _ in range(3)]
    wanted = [pipes[0](seed=seed) for seed in range(4)]
    assert not torch.equal(wanted[0], wanted[1])
    before = capture()
    outputs = list(pool.map(lambda number: pipes[number % 3](seed=number % 4), range(48)))
    assert all(torch.equal(output, wanted[number % 4]) for number, output in enumerate(outputs))
    assert not moved(before, capture())


def test_unloading_and_loading_wait_for_the_call_that_runs(tmp_path: Path, pool: ThreadPoolExecutor) -> None:
    pipe, gate = load(Paused(), tmp_path), Gate()
    first = pool.submit(pipe, seed=1, pause=gate)
    assert gate.reached.wait(WAIT_S)
    unloading = pool.submit(pipevault.unload, pipe)
    waiting = pool.submit(pipe, generator=torch.Generator().manual_seed(5))
    gate.open()
    assert torch.equal(first.result(WAIT_S), plain(1))
    assert unloading.result(WAIT_S) is pipe
    assert torch.equal(waiting.result(WAIT_S), Paused()(generator=torch.Generator().manual_seed(5)))
    assert loaded_state(pipe) is None


def test_an_error_in_a_call_lets_the_next_one_go_on(tmp_path: Path, pool: ThreadPoolExecutor) -> None:
    pipe = load(Paused(), tmp_path, level="strict")

    def fail() -> None:
        raise ValueError("stop")

    before, flags = capture(), switches()
    calls: list[Callable[[], Any]] = [lambda: pipe(seed=1, pause=fail), lambda: pipe(seed=1, nonsense=2)]
    errors: list[tuple[type[Exception], ...]] = [(ValueError,), (TypeError, BadCallError)]
    for call, error in zip(calls, errors, strict=True):
        with pytest.raises(error):
            pool.submit(call).result(WAIT_S)
    assert torch.equal(pool.submit(pipe, seed=1).result(WAIT_S), plain(1))
    assert not moved(before, capture())
    assert switches() == flags


def test_each_thread_has_the_deterministic_mode_of_inductor_at_strict(tmp_path: Path, pool: ThreadPoolExecutor) -> None:
    """torch keeps Inductor's options for each thread."""
    pipes = [load(Paused(), tmp_path, level="strict") for _ in range(2)]
    for pipe in pipes:
        pipe(seed=1, pause=Do())
    met, seen = threading.Barrier(2), []

    def look() -> None:
        met.wait(WAIT_S)
        seen.append(inductor_config.deterministic)

    for call in [pool.submit(pipe, seed=1, pause=Do(look)) for pipe in pipes]:
        call.result(WAIT_S)
    assert seen == [True] * 6
    assert not any(pool.map(lambda _: inductor_config.deterministic, range(8)))
