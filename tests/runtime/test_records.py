"""The record of an output is found for as long as the output lives, whatever the output is."""

from __future__ import annotations

import gc
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1] / "determinism"))
from sample_records import sample_record

from pipevault.errors import SettingsError
from pipevault.runtime import records
from pipevault.runtime.records import attach_record, record_of


def image() -> Image.Image:
    return Image.new("RGB", (2, 2))


class Slotted:
    __slots__ = ("images",)

    def __init__(self, images: Any) -> None:
        self.images = images


class Own:
    def __init__(self) -> None:
        self.text = "nothing to look at"


MAKERS = {
    "a bare list of frames": lambda: [image(), image()],
    "lists of lists": lambda: [[image()], [image()]],
    "a tuple": lambda: ([image()], None),
    "a dictionary": lambda: {"images": np.zeros((1, 2))},
    "a tensor": lambda: torch.zeros(1),
    "an array": lambda: np.zeros(1),
    "an image": image,
    "an object without images": Own,
}


@pytest.mark.parametrize("kind", MAKERS)
def test_each_output_has_its_own_record(kind: str) -> None:
    one, other = (sample_record(created_at=f"2026-01-3{digit}T00:00:00+00:00") for digit in (0, 1))
    first, second = MAKERS[kind](), MAKERS[kind]()
    for output, record in ((first, one), (second, other)):
        before = type(output)
        assert attach_record(output, record, {}) is output
        assert type(output) is before
    assert record_of(first) is one
    assert record_of(second) is other


def test_a_picture_taken_out_of_an_output_has_its_record() -> None:
    output = attach_record({"images": [image(), image()]}, sample_record(), {})
    assert record_of(output["images"][1]) == record_of(output) == record_of(output["images"][:1])


def test_what_was_handed_in_belongs_to_no_generation() -> None:
    given, record = image(), sample_record()
    output = attach_record([given, image()], record, {"image": [given]})
    assert record_of(output) is record
    with pytest.raises(SettingsError, match="Image has no run record"):
        record_of(given)


@pytest.mark.parametrize("output", [[1, 2], "text", Slotted(3), object()], ids=str)
def test_an_output_that_nothing_can_be_remembered_for_has_none(output: Any) -> None:
    attach_record(output, sample_record(), {})
    with pytest.raises(SettingsError, match="has no run record"):
        record_of(output)


def test_records_go_with_their_outputs() -> None:
    gc.collect()
    before, record = len(records._OF_LEAVES), sample_record()
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: attach_record([np.zeros(1), image()], record, {}), range(2_000)))
    gc.collect()
    assert len(records._OF_LEAVES) == before
    with pytest.raises(SettingsError):
        record_of([np.zeros(1)])
