"""Every picture, array and value that a pipeline can return is found, digested, and joined with others of its batch."""

from __future__ import annotations

from collections import OrderedDict, namedtuple
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.utils import BaseOutput
from PIL import Image

from pipevault.determinism.describe import digest_array, pixels_sha256
from pipevault.determinism.outputs import digests, join, leaves
from pipevault.errors import SettingsError

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


def test_an_output_that_nobody_can_walk_through_is_told_of() -> None:
    deep: list[Any] = [picture(0)]
    for _ in range(10_000):
        deep = [deep]
    assert "RecursionError" in digests(deep)["undigested"]["output"]


class Broken:
    __slots__ = ()


@pytest.mark.parametrize(
    "value",
    [np.array([object()]), torch.zeros(2, device="meta"), torch.eye(2).to_sparse(), Broken(), print, 3 + 4j],
    ids=["objects", "meta", "sparse", "slots", "function", "complex"],
)
def test_what_has_no_digest_is_told_of_and_raises_nothing(value: Any) -> None:
    found = digests({"images": [picture(0)], "odd": value})
    assert found["pixels"] == [pixels_sha256(picture(0))]
    assert list(found["undigested"]) == ["odd"]
    assert found["undigested"]["odd"]


def test_outputs_of_single_samples_become_one_of_a_batch() -> None:
    rows = [np.full((1, 2), float(index)) for index in range(3)]
    joined = join([Pictures(row, [False]) for row in rows])
    assert isinstance(joined, Pictures)
    assert joined.images[:, 0].tolist() == [0.0, 1.0, 2.0]
    assert joined.nsfw_content_detected == [False] * 3
    assert join([Pictures([picture(i)]) for i in range(2)]).nsfw_content_detected is None
    assert join([(torch.ones(1, 2), None)] * 2)[0].shape == (2, 2)
    assert join([[[1]], [[2]]]) == [[1], [2]]
    assert join([{"a": torch.ones(1)}, {"a": torch.zeros(1)}])["a"].tolist() == [1.0, 0.0]
    pair = join([Pair([i], [i + 10]) for i in range(2)])
    assert isinstance(pair, Pair)
    assert pair == ([0, 1], [10, 11])
    frozen = join([Frozen(torch.full((1,), float(i)), "same") for i in range(2)])
    assert (frozen.images.tolist(), frozen.note, frozen.made) == ([0.0, 1.0], "same", 3)
    plain = join([Plain([picture(i)]) for i in range(2)])
    assert type(plain) is Plain
    assert len(plain.frames) == 2


@pytest.mark.parametrize(
    ("outputs", "place"),
    [
        ([Frozen(torch.zeros(1), "a"), Frozen(torch.zeros(1), "b")], "note"),
        ([{"n": 1}, {"n": "1"}], "n"),
        ([torch.tensor(1.0), torch.tensor(2.0)], "the output"),
        ([(1,), (1, 2)], "the output"),
    ],
)
def test_what_cannot_be_one_output_is_an_error_that_names_it(outputs: list[Any], place: str) -> None:
    with pytest.raises(SettingsError, match=f"one output: {place} differs"):
        join(outputs)
