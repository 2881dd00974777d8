"""Which calls of an eager run are held, and what is made of them."""

from __future__ import annotations

from contextlib import suppress

import torch
from torch import nn

from pipevault.cache.capture import MAX_HELD, MAX_SIZES, Capture
from pipevault.graphs.state import PartOptions, PartState


class Part(nn.Module):
    def forward(self, x: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        return x * scale


def states(*names: str) -> dict[str, PartState]:
    made = {name: PartState(Part(), PartOptions(policy="off")) for name in names}
    for name, state in made.items():
        state.name = name
    return made


def call(state: PartState, *shape: int, scale: float = 1.0) -> None:
    state.call((torch.ones(shape),), {"scale": scale})


def sizes(capture: Capture, *, ranges: bool = False) -> list[list[tuple[int, ...]]]:
    tasks = capture.tasks(ranges=ranges)
    return [[tuple(one.args[0].shape) for one in (task.call, *task.others)] for task in tasks]


def test_one_call_of_each_signature_is_held_with_copies_of_its_arguments() -> None:
    parts, capture = states("a", "b"), Capture()
    given = torch.ones(2, 3)
    with capture.run(parts):
        parts["a"].call((given,), {})
        given.zero_()
        parts["a"].call((given,), {})
        call(parts["a"], 2, 4)
        call(parts["b"], 2, 3)
    call(parts["b"], 9)
    tasks = capture.tasks(ranges=False)
    assert [task.call.state.name for task in tasks] == ["a", "a", "b"]
    assert torch.equal(tasks[0].call.args[0], torch.ones(2, 3))
    assert all(task.call.is_as_then for task in tasks)


def test_a_range_begins_with_the_largest_call_of_the_first_run() -> None:
    parts, capture = states("a"), Capture()
    with capture.run(parts):
        call(parts["a"], 4, 8)
    with capture.run(parts, {"height"}):
        call(parts["a"], 4, 16)
    assert sizes(capture) == [[(4, 8)], [(4, 16)]]
    assert sizes(capture, ranges=True) == [[(4, 8), (4, 16)]]
    [task] = capture.tasks(ranges=True)
    assert [one.causes for one in task.sized()] == [{"height"}]


def test_sizes_of_one_are_apart() -> None:
    parts, capture = states("a"), Capture()
    with capture.run(parts):
        for shape in ((4, 8), (4, 6), (1, 8), (1, 6), (4, 1)):
            call(parts["a"], *shape)
    assert sizes(capture, ranges=True) == [[(4, 8), (4, 6)], [(1, 8), (1, 6)], [(4, 1)]]


def test_many_calls_of_one_run_are_a_range_and_few_of_them_are_held() -> None:
    parts, capture = states("a"), Capture()
    with capture.run(parts):
        for length in (5, 3, 9, 7, 2, 8, 4, 6, 5, 3):
            call(parts["a"], 4, length)
    [held] = sizes(capture)
    assert len(held) == MAX_HELD
    assert (held[0], held[-1]) == ((4, 9), (4, 2)), "the largest comes first, and the smallest is there"
    few = Capture()
    with few.run(parts):
        for length in range(2, 2 + MAX_SIZES):
            call(parts["a"], 4, length)
    assert all(len(task) == 1 for task in sizes(few))


def test_a_run_that_failed_is_forgotten() -> None:
    parts, capture = states("a"), Capture()
    with capture.run(parts):
        call(parts["a"], 4, 8)
    with suppress(ValueError), capture.run(parts, {"height"}):
        call(parts["a"], 4, 5)
        raise ValueError("no such size")
    with capture.run(parts, {"height"}):
        call(parts["a"], 4, 9)
        call(parts["a"], 4, 7)
    assert sizes(capture) == [[(4, 8)], [(4, 9)], [(4, 7)]]


def test_a_call_whose_weights_have_moved_since_is_not_as_then() -> None:
    state = PartState(nn.Linear(3, 3), PartOptions(policy="off"))
    capture = Capture()
    with capture.run({"a": state}):
        state.call((torch.ones(2, 3),), {})
    [task] = capture.tasks(ranges=False)
    assert task.call.is_as_then
    with torch.autocast("cpu", torch.bfloat16):
        assert not task.call.is_as_then
    state.module.to(torch.float64)
    assert not task.call.is_as_then


def test_a_plain_call_is_made_once_and_what_it_returned_is_held() -> None:
    parts, capture = states("a"), Capture()
    with torch.no_grad(), capture.run(parts):
        returned = parts["a"].call((torch.ones(2, 3),), {"scale": 2.0})
        returned.zero_()  # as a scheduler may do
    [task] = capture.tasks(ranges=False)
    assert task.call.still_seen is not None
    assert torch.equal(task.call.still_seen.output, torch.full((2, 3), 2.0))
    vars(parts["a"].module)["flag"] = True
    assert task.call.still_seen is None, "the part is another one now"


def test_each_size_of_a_range_was_seen() -> None:
    parts, capture = states("a"), Capture()
    with torch.no_grad(), capture.run(parts):
        call(parts["a"], 4, 8)
    with torch.no_grad(), capture.run(parts, {"height"}):
        call(parts["a"], 4, 16)
    [task] = capture.tasks(ranges=True)
    [other] = task.sized()
    assert other.seen is not None
    assert tuple(other.seen.output.shape) == (4, 16)


class Filling(nn.Module):
    """Keeps what it was given last, and returns it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.last = x
        return x


def test_a_call_that_leaves_something_is_the_callers_own() -> None:
    state = PartState(Filling(), PartOptions(policy="off"))
    capture, given = Capture(), torch.ones(3)
    with torch.no_grad(), capture.run({"a": state}):
        assert state.call((given,), {}) is given
    assert state.module.last is given, "not a copy of it"
    [task] = capture.tasks(ranges=False)
    assert task.call.seen is None
