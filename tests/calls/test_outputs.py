"""Every picture, array and value that a pipeline can return is found and digested."""

from __future__ import annotations

import re
from collections import OrderedDict, namedtuple
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.utils import BaseOutput
from PIL import Image

from helpers.ids import without_address
from helpers.sample_records import fields
from pipevault.calls.describe import digest_array, pixels_sha256
from pipevault.calls.outputs import as_array, digests, leaves, of_first_field, samples
from pipevault.runtime.record import RunRecord

MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "I;16", "I", "F")


@dataclass
class Pictures(BaseOutput):
    images: Any
    nsfw_content_detected: Any = None


@dataclass(frozen=True)
class Frozen:
    images: torch.Tensor
    note: str = ""
    made: int = field(default=3, init=False)


Pair = namedtuple("Pair", ["image", "depth"])


class Plain:
    def __init__(self, frames: Any) -> None:
        self.frames = frames
        self._hidden = object()

    def show(self) -> None: ...


def picture(value: int, mode: str = "RGB", size: tuple[int, int] = (4, 2)) -> Image.Image:
    if mode == "I;16":
        return Image.fromarray(np.full(size[::-1], value, np.uint16))
    if mode == "P":
        made = Image.new("P", size, value % 2)
        made.putpalette([0, 0, 0, 255, 255, 255])
        return made
    return Image.new(
        mode,
        size,
        float(value) if mode == "F" else value if mode in "1LI" else (value,) * len(Image.new(mode, (1, 1)).getbands()),
    )


def different(value: int) -> list[Any]:
    """An output of each kind, other for another ``value``."""
    array = np.full((2, 3), value, np.float32)
    return [
        Pictures([picture(value)]),
        Pictures(array),
        [picture(value)],
        [[picture(0), picture(0)], [picture(0), picture(value)]],
        (picture(value), None),
        Pair(picture(0), picture(value, "I;16")),
        {"frames": [[torch.full((2,), value)]]},
        OrderedDict(text=f"answer {value}"),
        Frozen(torch.full((1, 2), float(value))),
        Frozen(torch.zeros(1), note=str(value)),
        Plain([picture(value)]),
        Plain(Plain(np.array([value, 2], np.complex64))),
        torch.full((2, 2), value, dtype=torch.bfloat16),
        torch.tensor(value),
        np.array(value),
        np.float32(value),
        {"audio": np.full((1, 2, 8), value, np.int16), "sampling_rate": 44100},
        [1, 2.5, value],
        f"text {value}",
        [float("nan"), value],
    ]


@pytest.mark.parametrize("index", range(len(different(1))))
def test_another_value_anywhere_is_another_digest(index: int) -> None:
    one, again, other = different(1)[index], different(1)[index], different(2)[index]
    assert digests(one) == digests(again)
    assert digests(one) != digests(other)
    assert not digests(one)["undigested"]


@pytest.mark.parametrize("mode", MODES)
def test_images_of_every_mode_have_a_digest(mode: str) -> None:
    one, other = picture(0, mode), picture(1, mode)
    assert pixels_sha256(one) == pixels_sha256(picture(0, mode)) != pixels_sha256(other)
    assert digests([one])["pixels"] == [pixels_sha256(one)]


def test_a_palette_counts_and_so_does_a_shape_where_bytes_do_not_tell() -> None:
    one, other = picture(1, "P"), picture(1, "P")
    other.putpalette([0, 0, 0, 255, 0, 0])
    assert pixels_sha256(one) != pixels_sha256(other)
    assert pixels_sha256(picture(1, "I;16", (4, 2))) != pixels_sha256(picture(1, "I;16", (2, 4)))


def test_digests_of_bytes_are_those_of_the_pixels_alone() -> None:
    array = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
    assert digests(Pictures([Image.fromarray(array)]))["pixels"] == [digest_array(array)]
    assert digests(Pictures(np.stack([array, array])))["pixels"] == [digest_array(array)] * 2


def test_places_say_where_something_is() -> None:
    output = {"frames": [[picture(0), picture(1)]], "text": ["a"], "none": None, "inner": Plain(np.zeros(1))}
    assert [place for place, _ in leaves(output)] == ["frames[0][0]", "frames[0][1]", "text[0]", "inner.frames"]


def test_an_output_that_holds_itself_ends() -> None:
    output: dict[str, Any] = {"image": picture(0)}
    output["self"] = output
    output["list"] = [output]
    assert len(digests(output)["pixels"]) == 1


def test_a_sound_is_one_sample() -> None:
    sound = np.zeros(48_000, np.float32)
    assert digests(sound)["pixels"] == [digest_array(sound)]
    assert len(digests({"audios": np.stack([sound, sound])})["pixels"]) == 2
    assert len(digests(torch.zeros(5_000, 2))["pixels"]) == 1


class Empty:
    __slots__ = ()


class Secretive:
    def __init__(self) -> None:
        self._images = [picture(0)]


class BrokenMapping(dict[str, Any]):
    def items(self) -> Any:
        raise RuntimeError("not now")


def closed_file(path: Path) -> Image.Image:
    picture(0).save(path)
    image = Image.open(path)
    image.close()
    return image


NO_DIGEST = {
    "objects": (lambda: np.array([picture(0), "text"], dtype=object), "An array of Python objects has no bytes"),
    "meta": (lambda: torch.zeros(2, device="meta"), r"on meta has no bytes"),
    "sparse": (lambda: torch.eye(2).to_sparse(), r"A tensor of layout torch.sparse_coo on cpu has no bytes"),
    "slots": (Empty, "test_outputs.Empty has no digest"),
    "private": (Secretive, "test_outputs.Secretive has no digest"),
    "function": (lambda: print, "builtin_function_or_method has no digest"),
    "module": (lambda: torch.nn.Linear(1, 1), "Linear has no digest"),
    "complex": (lambda: 3 + 4j, "builtins.complex has no digest"),
    "set": (lambda: {object()}, "builtins.set has no digest"),
    "half a letter": (lambda: "\ud800", "surrogates"),
    "more digits than Python writes": (lambda: 10**5000, "digits"),
    "mapping that raises": (BrokenMapping, "not now"),
}


@pytest.mark.parametrize("kind", NO_DIGEST)
def test_what_has_no_digest_is_told_of_and_raises_nothing(kind: str) -> None:
    make, reason = NO_DIGEST[kind]
    found = digests({"images": [picture(0)], "odd": make()})  # type: ignore[no-untyped-call]
    assert found["pixels"] == [pixels_sha256(picture(0))]
    assert list(found["undigested"]) == ["odd"]
    assert re.search(reason, found["undigested"]["odd"])
    assert RunRecord(**{**fields(), "results": {**fields()["results"], **found}})


def test_an_image_whose_file_was_closed_is_told_of(tmp_path: Path) -> None:
    assert list(digests([closed_file(tmp_path / "a.png")])["undigested"]) == ["[0]"]


def test_any_name_can_stand_in_a_record() -> None:
    meta = torch.zeros(1, device="meta")
    found = digests({"\ud800": "text", "a\udfff": meta, "": meta, 1.5: meta, (1, object()): meta, Colour.RED: meta})
    assert list(found["undigested"]) == ["['a\\udfff']", "['']", "[1.5]", "['tuple 4']", "RED"]
    assert found["values"]
    assert RunRecord(**{**fields(), "results": {**fields()["results"], **found}})


def test_lists_deeper_than_python_can_call() -> None:
    output: Any = [picture(0)]
    for _ in range(5000):
        output = [output]
    assert len(digests(output)["pixels"]) == 1


class Frames(list[Any]):
    """A list with attributes of its own."""


def named_frames(frames: list[Any]) -> Frames:
    made = Frames(frames)
    made.fps = 8  # type: ignore[attr-defined]
    return made


class Slotted:
    __slots__ = ("images",)

    def __init__(self, images: Any) -> None:
        self.images = images


class Colour(Enum):
    RED = 1
    BLUE = 2


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (Frames([picture(0)]), Frames([picture(1)])),
        (named_frames([picture(0)]), named_frames([picture(1)])),
        (Slotted([picture(0)]), Slotted([picture(1)])),
        ({"colour": Colour.RED}, {"colour": Colour.BLUE}),
        ({"path": Path("a")}, {"path": Path("b")}),
        ({1: "a", "1": "b"}, {1: "b", "1": "a"}),
        ({"a": {"b": "x"}, "a.b": "y"}, {"a": {"b": "y"}, "a.b": "x"}),
        ({"n": float("nan")}, {"n": "nan"}),
        ({"n": 1}, {"n": True}),
        ({"n": b"a"}, {"n": bytearray(b"b")}),
        ([[1], 2], [1, [2]]),
    ],
    ids=without_address,
)
def test_values_and_the_containers_that_they_are_in(one: Any, other: Any) -> None:
    assert digests(one) != digests(other)
    assert not digests(one)["undigested"]


def test_an_attribute_that_is_no_field_counts() -> None:
    one, other = Pictures([picture(0)]), Pictures([picture(0)])
    other.depth = [picture(1)]
    assert len(digests(other)["pixels"]) == len(digests(one)["pixels"]) + 1
    named = Pictures({"images": [picture(0)]})
    assert len(digests(named)["pixels"]) == 1, "diffusers gives such an output its items twice"


@pytest.mark.parametrize("transparency", [None, 1, b"\x00\x80"])
def test_a_palette_image_has_its_digest_after_a_png_too(tmp_path: Path, transparency: Any) -> None:
    image = picture(1, "P")
    image.putpalette([9, 9, 9, 1, 2, 3, *[7] * 90])  # more colours than are used
    plain = pixels_sha256(image)
    if transparency is not None:
        image.info["transparency"] = transparency
        assert pixels_sha256(image) != plain
    image.save(tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as read:
        assert read.mode == "P"
        assert pixels_sha256(read) == pixels_sha256(image)


def test_indices_that_stand_for_the_same_colours_are_not_those_of_another_image() -> None:
    grey, palette = Image.new("L", (4, 2), 1), picture(1, "P")
    assert pixels_sha256(grey) != pixels_sha256(palette)


def test_the_order_of_bytes_is_no_difference() -> None:
    values = np.arange(8, dtype=np.uint16).reshape(2, 4) * 999
    little = Image.frombytes("I;16", (4, 2), values.astype("<u2").tobytes())
    big = Image.frombytes("I;16B", (4, 2), values.astype(">u2").tobytes())
    assert pixels_sha256(little) == pixels_sha256(big)


def test_samples_know_their_digest_and_their_place_in_the_batch() -> None:
    output = {
        "odd": torch.zeros(2, device="meta"),
        "rgb": [picture(0), picture(1)],
        "depth": np.zeros((2, 3, 3)),
        "frames": [[picture(2)], [picture(3), picture(4)]],
    }
    found = digests(output)
    placed = [
        (str(one.place), one.position.index, one.position.number, one.position.count)
        for one in samples(output, found["undigested"])
        if one.place.field != "odd"
    ]
    assert placed == [
        ("rgb[0]", 0, 0, 2),
        ("rgb[1]", 1, 1, 2),
        ("depth", 2, 0, 2),
        ("depth", 3, 1, 2),
        ("frames[0][0]", 4, 0, 2),
        ("frames[1][0]", 5, 1, 2),
        ("frames[1][1]", 6, 1, 2),
    ]
    assert [one.position.index for one in samples(output, found["undigested"])][:2] == [None, 0]
    frames = samples(output)[-1]
    assert pixels_sha256(frames.value) == found["pixels"][6]


def test_the_items_of_what_a_pipeline_returned_as_a_tuple_are_fields() -> None:
    output = ([picture(0), picture(1)], [False, False])
    assert [(one.place.field, one.position.number) for one in samples(output)] == [("0", 0), ("0", 1)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn, torch.complex64, torch.int64, torch.bool])
def test_tensors_as_numpy_has_them(dtype: torch.dtype) -> None:
    tensor = torch.tensor([0.0, 1.0]).to(dtype)
    assert as_array(tensor.requires_grad_(dtype.is_floating_point)).tolist() == tensor.tolist()


def test_a_palette_as_an_array_is_its_colours() -> None:
    assert as_array(picture(1, "P"))[0, 0].tolist() == [255, 255, 255, 255]


def test_the_samples_of_the_first_field_and_what_they_hold() -> None:
    output = {"seconds": 1.5, "images": [picture(0), picture(1)], "depth": torch.zeros(2, 4, dtype=torch.bfloat16)}
    found = samples(output)
    assert [str(one.place) for one in of_first_field(found)] == ["images[0]", "images[1]"]
    assert found[1].content is output["images"][1]
    assert (found[3].content.shape, found[3].content.dtype) == ((4,), np.float32)
    assert of_first_field([]) == []
