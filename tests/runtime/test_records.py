"""The record of an output is found for as long as the output lives, whatever the output is."""

from __future__ import annotations

import gc
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from helpers.ids import without_address
from helpers.sample_records import fields, sample_record
from pipevault.calls.outputs import digests
from pipevault.errors import SettingsError
from pipevault.runtime import records
from pipevault.runtime.records import attach_record, origin_of, record_of


def image() -> Image.Image:
    return Image.new("RGB", (2, 2))


class Slotted:
    __slots__ = ("images",)

    def __init__(self, images: Any) -> None:
        self.images = images


@dataclass(frozen=True)
class Frozen:
    images: list[Any]


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


@pytest.mark.parametrize("output", [[1, 2], "text", Slotted(3), object()], ids=without_address)
def test_an_output_that_nothing_can_be_remembered_for_has_none(output: Any) -> None:
    attach_record(output, sample_record(), {})
    with pytest.raises(SettingsError, match="has no run record"):
        record_of(output)


def test_what_was_put_together_from_two_generations_has_no_one_record() -> None:
    first = attach_record([image()], sample_record(), {})
    second = attach_record([image()], sample_record(), {})
    with pytest.raises(SettingsError, match="put together from what 2 generations returned"):
        record_of([first[0], second[0]])
    assert record_of(first) is not record_of(second)


def test_an_object_with_slots_and_one_that_is_frozen_are_found() -> None:
    for output in (Slotted([image()]), Frozen([image()])):
        record = sample_record()
        attach_record(output, record, {})
        assert record_of(output) is record


def test_a_copy_has_no_record_and_is_told_apart() -> None:
    output = attach_record([image()], sample_record(), {})
    with pytest.raises(SettingsError, match=r"Image has no run record.* not a copy"):
        record_of(output[0].copy())
    with pytest.raises(SettingsError, match="holds no image, array or tensor that tells it from any other str"):
        record_of("text")


def test_a_pipeline_that_returns_itself_is_left_alone() -> None:
    class Pipeline:
        def __call__(self) -> Any:
            return self

    pipe = Pipeline()
    assert attach_record(pipe(), sample_record(), {}) is pipe
    assert vars(pipe) == {}


def test_a_leaf_knows_which_digests_are_its_own() -> None:
    meta = torch.zeros(2, device="meta")
    output: dict[str, Any] = {"odd": meta, "rgb": [image(), image()], "depth": np.zeros((2, 3))}
    found = {**fields()["results"], **digests(output)}
    attach_record(output, sample_record(results=found), {})
    assert [origin.positions[0].index for leaf in output["rgb"] if (origin := origin_of(leaf))] == [0, 1]
    depth = origin_of(output["depth"])
    assert depth is not None
    assert [(one.index, one.number, one.count) for one in depth.positions] == [(2, 0, 2), (3, 1, 2)]
    odd = origin_of(meta)
    assert odd is not None
    assert odd.positions[0].index is None


def test_an_identity_that_is_given_to_another_object_has_no_record() -> None:
    one, other = image(), image()
    attach_record(one, sample_record(), {})
    records._OF_LEAVES[id(other)] = records._OF_LEAVES[id(one)]  # as if the callback came late
    with pytest.raises(SettingsError):
        record_of(other)


def test_nothing_is_kept_alive() -> None:
    gc.collect()
    before, record = len(records._OF_LEAVES), sample_record()

    def draw(_: int) -> None:
        output = attach_record([np.zeros(1), image(), (torch.zeros(1),)], record, {"image": image()})
        assert record_of(output) is record

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(draw, range(10_000)))
    gc.collect()
    assert len(records._OF_LEAVES) == before
    leaf = np.zeros(1)
    attach_record([leaf], record, {})
    reference = weakref.ref(leaf)
    del leaf
    assert reference() is None
    with pytest.raises(SettingsError):
        record_of([np.zeros(1)])


def test_an_output_lives_no_longer_for_its_record() -> None:
    record = sample_record()
    output = attach_record(Own(), record, {})
    references = weakref.ref(output), weakref.ref(record)
    del output, record
    gc.collect()
    assert [reference() for reference in references] == [None, None]
