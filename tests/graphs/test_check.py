from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from pipevault.graphs.check import TOLERANCES, compare_trees


def test_equal_outputs_pass_with_distance_zero() -> None:
    tree = {"a": torch.ones(3), "b": (None, 2, "x")}
    result = compare_trees(tree, {"a": torch.ones(3), "b": (None, 2, "x")})
    assert result.passed
    assert result.distance == 0


@pytest.mark.parametrize("dtype", list(TOLERANCES))
def test_the_tolerance_of_a_dtype_is_a_share_of_the_largest_value(dtype: torch.dtype) -> None:
    eager = torch.tensor([0.0, 100.0], dtype=dtype)
    inside = eager + torch.tensor([100.0 * TOLERANCES[dtype].part * 0.5, 0.0], dtype=dtype)
    outside = eager + torch.tensor([100.0 * TOLERANCES[dtype].part * 2.0, 0.0], dtype=dtype)
    assert compare_trees(eager, inside).passed
    assert not compare_trees(eager, outside).passed


@pytest.mark.parametrize(
    ("eager", "frozen", "reason"),
    [
        (torch.ones(2), torch.tensor([1.0, float("nan")]), "the graph returns values that are not finite"),
        (torch.tensor([1.0, float("inf")]), torch.ones(2), "eager code returns values that are not finite"),
        (torch.ones(2), torch.ones(3), "eager code returns torch.float32[2]"),
        (torch.ones(2), torch.ones(2).half(), "the graph torch.float16[2]"),
        (torch.tensor([1, 2]), torch.tensor([1, 3]), "values differ"),
        ((torch.ones(2), 1), (torch.ones(2), 2), "eager code returns 1, the graph 2"),
        ([torch.ones(2)] * 2, [torch.ones(2)], "eager code returns 2 values, the graph 1"),
    ],
)
def test_each_kind_of_difference_is_named(eager: object, frozen: object, reason: str) -> None:
    result = compare_trees(eager, frozen)
    assert not result.passed
    assert reason in result.failure


def test_images_and_arrays_are_compared_as_pixels() -> None:
    black, white = Image.new("RGB", (4, 4)), Image.new("RGB", (4, 4), "white")
    assert compare_trees([black], [black.copy()]).passed
    assert not compare_trees([black], [white]).passed
    assert not compare_trees(np.zeros(3), np.ones(3)).passed
