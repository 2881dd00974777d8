"""What of an output the frozen graphs of a pipeline have to give again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pipevault.cache.rehearsal import compare_outputs


@dataclass
class Slotted:
    __slots__ = ("images",)
    images: Any


def grey(value: int) -> Image.Image:
    return Image.new("L", (4, 2), value)


def depth(value: int, mode: str = "I;16") -> Image.Image:
    return Image.new(mode, (4, 2), value)


def palette(*colours: int) -> Image.Image:
    image = Image.new("P", (4, 2), 1)
    image.putpalette(colours)
    return image


@pytest.mark.parametrize(
    ("eager", "frozen", "far"),
    [
        ([grey(200)], [grey(201)], [grey(220)]),
        ([depth(60_000)], [depth(60_001)], [depth(50_000)]),
        ([depth(60_000, "I")], [depth(60_001, "I")], [depth(50_000, "I")]),
        (np.full((1, 8), 20_000, np.int16), np.full((1, 8), 20_001, np.int16), np.full((1, 8), 10_000, np.int16)),
        (torch.full((1, 8), 200).byte(), torch.full((1, 8), 201).byte(), torch.full((1, 8), 100).byte()),
        ({"score": 0.5}, {"score": 0.5000001}, {"score": 0.6}),
        ({"score": np.float32(0.5)}, {"score": np.float32(0.5000001)}, {"score": np.float32(0.6)}),
        (Slotted(torch.ones(2)), Slotted(torch.ones(2) * 1.0001), Slotted(torch.zeros(2))),
        ([palette(0, 0, 0, 9, 9, 9)], [palette(1, 1, 1, 9, 9, 9)], [palette(0, 0, 0, 200, 9, 9)]),
        (torch.ones(2).bfloat16(), torch.ones(2).bfloat16(), torch.zeros(2).bfloat16()),
        (np.ones(2, ">f4"), np.ones(2, ">f4"), np.zeros(2, ">f4")),
    ],
    ids=["L", "I;16", "I", "sound", "bytes", "float", "numpy float", "slots", "palette", "bfloat16", "big-endian"],
)
def test_a_graph_may_round_to_the_next_value_and_not_to_another(eager: Any, frozen: Any, far: Any) -> None:
    assert compare_outputs(eager, frozen, 1e-2).passed
    assert not compare_outputs(eager, far, 1e-2).passed


@pytest.mark.parametrize(
    ("eager", "frozen"),
    [
        ({"text": "a"}, {"text": "b"}),
        ({"flags": [True]}, {"flags": [False]}),
        ({"ids": torch.tensor([1, 2])}, {"ids": torch.tensor([1, 3])}),
        ({"names": np.array(["a"])}, {"names": np.array(["b"])}),
        ({"images": [grey(1)]}, {"images": [grey(1), grey(1)]}),
        ({"images": [[grey(1)], [grey(1)]]}, {"images": [[grey(1), grey(1)]]}),
        ({"images": [grey(1)]}, {"depth": [grey(1)]}),
    ],
    ids=["text", "flags", "integers", "array of text", "count", "nesting", "names"],
)
def test_what_is_no_measure_is_the_same(eager: Any, frozen: Any) -> None:
    assert compare_outputs(eager, eager, 1e-2).passed
    result = compare_outputs(eager, frozen, 1e-2)
    assert not result.passed
    assert len(result.failure) < 300


def test_objects_that_tell_nothing_of_themselves_are_no_difference() -> None:
    nan = float("nan")
    eager = {"images": [grey(1)], "timer": object(), "meta": torch.zeros(1, device="meta"), "score": nan}
    frozen = {"images": [grey(1)], "timer": object(), "meta": torch.ones(1, device="meta"), "score": nan}
    assert compare_outputs(eager, frozen, 1e-2).passed
