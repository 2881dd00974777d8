"""Calls as functions of their leaves; nothing is compiled."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

from helpers.graph_parts import subject_of
from pipevault.errors import CannotFreezeError
from pipevault.graphs.program import (
    Program,
    Results,
    free_numbers,
    is_degenerate,
    number_tensor,
    second_value,
    varied_leaves,
    with_number_tensors,
)
from pipevault.graphs.signature import describe_call

X = torch.linspace(-1, 1, 12).reshape(3, 4)
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


class Calling(nn.Module):
    def __init__(self, body: Callable[..., Any]) -> None:
        super().__init__()
        self.last: Any = None
        self.__dict__["body"] = body

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.body(*args, **kwargs)


def free(body: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Any]:
    """The numbers of a call that only enter arithmetic."""
    subject, call = subject_of(Calling(body)), describe_call(args, kwargs)
    indices = free_numbers(Program(call.signature), subject.module, subject.eager, call, CPU)
    return [call.leaves[index] for index in indices]


def look(x: torch.Tensor, n: Any) -> torch.Tensor:
    return x * 2 if n == 3 else x


class TestFreeNumbers:
    @pytest.mark.parametrize(
        ("body", "number"),
        [
            (lambda x, n: x * n, 0.5),
            (lambda x, n: x + torch.sin(n * torch.ones(2, 1, 1)), 7),
            (lambda x, n: x / (n + 1.5), 2),
            (lambda x, n: x.half() * n, 0.3),
            (lambda x, n: x.double() * n, 1 / 3),
            (lambda x, n: torch.lerp(x, x + 1, n), 0.5),
            (lambda x, n: {"y": x * n, "n": n}, 0.5),
            (lambda x, n: x * (n if torch.is_tensor(n) else torch.tensor([n], dtype=x.dtype)), 5),
            (lambda x, n: x.long() * n, 0.5),
            (lambda x, n: x, 3),
        ],
    )
    def test_what_only_enters_arithmetic(self, body: Callable[..., Any], number: Any) -> None:
        assert free(body, X, number) == [number]

    @pytest.mark.parametrize(
        ("body", "number"),
        [
            (lambda x, n: x if n > 0.2 else -x, 0.5),
            (look, 3),
            (lambda x, n: x.reshape(n, -1), 3),
            (lambda x, n: x[n], 1),
            (lambda x, n: x[:, :n], 2),
            (lambda x, n: x * sum(range(n)), 4),
            (lambda x, n: torch.ones(n), 4),
            (lambda x, n: x * float(n), 0.5),
            (lambda x, n: (x, n * 2), 0.5),
            (lambda x, n: (x, f"{n}"), 0.5),
            (lambda x, n: x.sum(dim=n), 0),
            (lambda x, n: x.half().sum() * n, 0.1),
            (lambda x, n: x * {0.5: 2.0}[n], 0.5),
            (lambda x, n: x if isinstance(n, float) else x + 1, 0.5),
        ],
    )
    def test_what_steers_the_code_or_the_result(self, body: Callable[..., Any], number: Any) -> None:
        assert free(body, X, number) == []

    def test_each_number_is_judged_by_itself(self) -> None:
        assert free(lambda x, a, b, c: (x * a).reshape(b, -1) + c, X, 0.5, 3, 7) == [0.5, 7]

    def test_no_numbers(self) -> None:
        assert free(lambda x: x, X) == []

    def test_a_branch_that_the_second_value_alone_takes_steers(self) -> None:
        # 3 + 1 is the second value: at 3 itself both branches are equal
        assert free(lambda x, n: x * 2 if n == 4 else x * 2.5 if n == 3 else x, X, 3) == []


def test_second_values_are_other_values_of_the_type() -> None:
    for number in (0, 1, -3, 0.5, 0.0, 1e6, 7):
        other = second_value(number)
        assert type(other) is type(number)
        assert other != number


def test_number_tensors_promote_as_python_numbers_do() -> None:
    for x in (X.half(), X.bfloat16(), X, X.double()):
        assert (x * number_tensor(0.1, [x], CPU)).dtype == (x * 0.1).dtype
        assert (x * number_tensor(2, [x], CPU)).dtype == (x * 2).dtype
    double = number_tensor(0.1, [X.double()], CPU)
    assert double.item() == 0.1
    assert with_number_tensors([X, 1, 0.5], [2], CPU)[1] == 1


class TestVariedLeaves:
    def test_they_have_the_same_shapes_and_other_values(self) -> None:
        leaves: list[Any] = [X, X.half(), torch.arange(4), 0.25, 3, torch.tensor(5), X.t()]
        before, state = [leaf.clone() if torch.is_tensor(leaf) else leaf for leaf in leaves], torch.get_rng_state()
        varied = varied_leaves(leaves, [3, 4])
        for leaf, other in zip(leaves, varied, strict=True):
            if isinstance(leaf, torch.Tensor):
                assert isinstance(other, torch.Tensor)
                assert (leaf.shape, leaf.dtype, leaf.stride()) == (other.shape, other.dtype, other.stride())
                assert other.data_ptr() != leaf.data_ptr()
                assert bool((leaf == other).all()) is (leaf.dim() == 0)
            else:
                assert type(leaf) is type(other)
                assert leaf != other
        assert torch.equal(torch.get_rng_state(), state)
        assert all(torch.equal(a, b) if torch.is_tensor(a) else a == b for a, b in zip(before, leaves, strict=True))

    def test_they_are_the_same_each_time(self) -> None:
        assert torch.equal(varied_leaves([X], ())[0], varied_leaves([X], ())[0])  # type: ignore[arg-type]

    def test_an_input_of_one_value_is_no_longer_one(self) -> None:
        (varied,) = varied_leaves([torch.zeros(2, 3)], ())
        assert not is_degenerate([varied])

    def test_numbers_that_are_not_named_stay(self) -> None:
        assert varied_leaves([0.25, 3, 0.5], [1]) == [0.25, 4, 0.5]

    def test_indices_stay_indices(self) -> None:
        (varied,) = varied_leaves([torch.tensor([[0, 5, 9]])], ())
        assert sorted(varied.flatten().tolist()) == [0, 5, 9]


@pytest.mark.parametrize(
    ("leaf", "degenerate"),
    [
        (torch.zeros(2, 3), True),
        (torch.full((2, 3), -1.0), True),
        (torch.eye(2), False),
        (torch.zeros(3), False),
        (torch.zeros(1, 1), False),
        (torch.zeros(2, 3, dtype=torch.int64), False),
        (1.0, False),
    ],
)
def test_an_input_that_holds_one_number_only_is_degenerate(leaf: Any, degenerate: bool) -> None:
    assert is_degenerate([leaf]) is degenerate


class TestRunning:
    def test_written_arguments_and_state_are_in_the_result_and_state_is_as_it_was(self) -> None:
        def body(x: torch.Tensor, cache: list[Any], scale: float) -> torch.Tensor:
            cache.append(x)
            module.last = x * scale
            return x + 1

        module = Calling(body)
        subject = subject_of(module)
        given: list[Any] = []
        call = describe_call((X, given), {"scale": 2.0}, {":last": None})
        result = Program(call.signature, (1,)).run(module, subject.eager, call.leaves)
        assert set(result) == {"output", "arguments", "state"}
        assert torch.equal(result["output"], X + 1)
        assert result["arguments"]["1"][0] is X
        assert torch.equal(result["state"][":last"], X * 2)
        assert module.last is None
        assert given == []

    def test_state_is_as_it_was_when_the_part_raises(self) -> None:
        def body(x: torch.Tensor) -> None:
            module.last = x
            raise KeyError

        module = Calling(body)
        call = describe_call((X,), {}, {":last": 1})
        with pytest.raises(KeyError):
            Program(call.signature).run(module, subject_of(module).eager, [X, 5])
        assert module.last is None

    def test_overrides_are_given_beside_the_arguments(self) -> None:
        module = Calling(lambda x, use_cache=True: (x, use_cache))
        call = describe_call((X,), {})
        result = Program(call.signature, overrides={"use_cache": False}).run(module, subject_of(module).eager, [X])
        assert result["output"][1] is False


class TestResults:
    def test_leaves_of_the_call_are_told_from_new_tensors_and_constants(self) -> None:
        number = number_tensor(0.5, [X], CPU)
        result = {"output": {"y": X + 1, "x": X, "n": number, "none": None, "text": "a", "size": 3}}
        results = Results.of(result, [X, number])
        kinds = dict(zip(["y", "x", "n", "none", "text", "size"], results.leaves, strict=True))
        assert kinds == {
            "y": ("tensor",),
            "x": ("leaf", 0),
            "n": ("leaf", 1),
            "none": ("value", None),
            "text": ("value", "a"),
            "size": ("value", 3),
        }
        assert [tensor is result["output"]["y"] for tensor in results.tensors(result)] == [True]

    def test_a_leaf_of_another_kind_is_refused(self) -> None:
        with pytest.raises(CannotFreezeError, match=r"it returns a builtins\.object"):
            Results.of({"output": object()}, [])

    def test_a_trace_that_returns_something_else_is_refused(self) -> None:
        results = Results.of({"output": (X + 1, X + 2)}, [])
        with pytest.raises(CannotFreezeError, match="3 values instead of 2"):
            results.tensors({"output": (X, X, X)})
        with pytest.raises(CannotFreezeError, match="values of other kinds"):
            results.tensors({"output": (X, 2)})
