"""Turns of threads: who waits for whom, in which order, and who never waits."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest

from pipevault.determinism.turns import ALONE, Turns, Wanted
from pipevault.errors import DeadlockError, TurnTimeoutError

WAIT_S = 10.0


@pytest.fixture
def turns() -> Turns:
    return Turns()


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(32) as pool:
        yield pool


class Holder:
    """A thread that holds something until it is told to end."""

    def __init__(self, turns: Turns, wanted: Wanted, then: Callable[[], None] = lambda: None) -> None:
        self.inside, self._end = threading.Event(), threading.Event()
        self.errors: list[BaseException] = []

        def hold() -> None:
            try:
                with turns.take(wanted, what="a test", timeout_s=WAIT_S):
                    self.inside.set()
                    self._end.wait(WAIT_S)
                    then()
            except BaseException as error:
                self.errors.append(error)

        self._thread = threading.Thread(target=hold, daemon=True)
        self._thread.start()

    def end(self) -> None:
        self._end.set()
        self._thread.join(WAIT_S)
        assert not self._thread.is_alive()


def is_waiting(holder: Holder) -> bool:
    return not holder.inside.wait(0.1)


def test_one_thread_at_a_time_and_in_the_order_of_asking(turns: Turns) -> None:
    order: list[int] = []
    first = Holder(turns, {"pipe": ALONE})
    assert first.inside.wait(WAIT_S)
    others = []
    for number in range(8):
        others.append(Holder(turns, {"pipe": ALONE}, partial(order.append, number)))
        while len(turns._waiting) <= number:
            time.sleep(0.001)
    first.end()
    for other in others:
        assert other.inside.wait(WAIT_S)
        other.end()
    assert order == list(range(8))
    assert not turns._held
    assert not turns._waiting


def test_those_that_want_the_same_hold_it_together_and_others_wait(turns: Turns) -> None:
    strict, another = Holder(turns, {"switches": "strict"}), Holder(turns, {"switches": "strict"})
    assert strict.inside.wait(WAIT_S)
    assert another.inside.wait(WAIT_S)
    plain = Holder(turns, {"switches": "off"})
    assert is_waiting(plain)
    late = Holder(turns, {"switches": "strict"})
    assert is_waiting(late), "it would go before one that came first"
    strict.end()
    assert is_waiting(plain)
    another.end()
    assert plain.inside.wait(WAIT_S)
    plain.end()
    late.end()


def test_all_that_is_wanted_is_taken_at_once(turns: Turns) -> None:
    """A thread that waits for one thing keeps no other from anybody who came before it."""
    one = Holder(turns, {"a": ALONE})
    assert one.inside.wait(WAIT_S)
    both = Holder(turns, {"a": ALONE, "b": ALONE})
    assert is_waiting(both)
    assert not any("b" in request.wanted for request in turns._held)
    one.end()
    assert both.inside.wait(WAIT_S)
    both.end()


def test_a_thread_may_ask_again_for_what_it_holds(turns: Turns) -> None:
    with turns.take({"pipe": ALONE, "switches": "x"}, what="outer"):
        waiting = Holder(turns, {"pipe": ALONE})
        assert is_waiting(waiting)
        with turns.take({"pipe": ALONE, "other": ALONE}, what="inner", timeout_s=0.5) as waited_s:
            assert waited_s == 0.0
            assert turns.holds("other")
        assert turns.holds("pipe")
        assert not turns.holds("other")
    assert waiting.inside.wait(WAIT_S)
    waiting.end()


def test_a_thread_that_holds_something_does_not_queue_behind_one_that_waits_for_it(turns: Turns) -> None:
    with turns.take({"pipe": ALONE}, what="outer"):
        waiting = Holder(turns, {"pipe": ALONE, "streams": ALONE})
        assert is_waiting(waiting)
        with turns.take({"streams": ALONE}, what="inner", timeout_s=0.5):
            pass
    waiting.end()


def test_waiting_is_measured(turns: Turns) -> None:
    holder = Holder(turns, {"pipe": ALONE})
    assert holder.inside.wait(WAIT_S)
    threading.Timer(0.2, holder.end).start()
    with turns.take({"pipe": ALONE}, what="a call", timeout_s=WAIT_S) as waited_s:
        assert 0.1 < waited_s < WAIT_S


def test_after_the_time_out_nothing_is_left_behind(turns: Turns) -> None:
    holder = Holder(turns, {"pipe": ALONE})
    assert holder.inside.wait(WAIT_S)
    with (
        pytest.raises(TurnTimeoutError, match=r"a call waited 0 s for its turn: thread 'Thread-.*' holds a test"),
        turns.take({"pipe": ALONE}, what="a call", timeout_s=0.05),
    ):
        pass
    assert not turns._waiting
    next_one = Holder(turns, {"pipe": ALONE})
    holder.end()
    assert next_one.inside.wait(WAIT_S)
    next_one.end()


def test_one_that_gives_up_lets_those_behind_it_go_on(turns: Turns) -> None:
    holder = Holder(turns, {"switches": "a"})
    assert holder.inside.wait(WAIT_S)
    with pytest.raises(TurnTimeoutError), turns.take({"switches": "b"}, what="a call", timeout_s=0.05):
        pass
    same = Holder(turns, {"switches": "a"})
    assert same.inside.wait(WAIT_S)
    same.end()
    holder.end()


def test_threads_that_wait_for_one_another_are_told_at_once(turns: Turns) -> None:
    met = threading.Barrier(2)
    started_s = time.monotonic()
    errors: list[BaseException] = []

    def cross(mine: str, other: str) -> None:
        with turns.take({mine: ALONE}, what=f"pipeline {mine}"):
            met.wait(WAIT_S)
            try:
                with turns.take({other: ALONE}, what=f"pipeline {other}", timeout_s=WAIT_S):
                    pass
            except DeadlockError as error:
                errors.append(error)

    threads = [threading.Thread(target=cross, args=pair) for pair in (("a", "b"), ("b", "a"))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT_S)
    assert time.monotonic() - started_s < WAIT_S / 2
    assert len(errors) == 1, "one is told, and the other one goes on"
    assert "would wait for ever" in str(errors[0])


def test_an_error_inside_gives_back_what_was_held(turns: Turns) -> None:
    with pytest.raises(ValueError, match="x"), turns.take({"pipe": ALONE}, what="a call"):
        raise ValueError("x")
    with turns.take({"pipe": ALONE}, what="a call", timeout_s=0.1) as waited_s:
        assert waited_s == 0.0


def test_many_threads_never_meet(turns: Turns, pool: ThreadPoolExecutor) -> None:
    inside: list[int] = []
    switches: list[str] = []

    def work(number: int) -> None:
        level = "ab"[number % 2]
        with turns.take({number % 3: ALONE, "switches": level}, what=f"call {number}", timeout_s=60):
            assert number % 3 not in inside
            assert level not in switches or set(switches) == {level}
            inside.append(number % 3)
            switches.append(level)
            assert len(set(switches)) == 1
            time.sleep(0.0005)
            switches.remove(level)
            inside.remove(number % 3)

    list(pool.map(work, range(600)))
    assert not turns._held
    assert not turns._waiting


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_does_not_wait_for_threads_of_its_parent(turns: Turns) -> None:
    forgotten: list[bool] = []
    turns.on_fork(lambda: forgotten.append(True))
    holder = Holder(turns, {"pipe": ALONE})
    assert holder.inside.wait(WAIT_S)
    with turns.take({"own": ALONE}, what="the parent"):
        if (child := os.fork()) == 0:
            try:
                with turns.take({"pipe": ALONE}, what="the child", timeout_s=1.0):
                    os._exit(0 if turns.holds("own") and forgotten == [True] else 1)
            finally:
                os._exit(2)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert not forgotten
    holder.end()
