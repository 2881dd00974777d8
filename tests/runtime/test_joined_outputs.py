"""Outputs of single samples become one output of their batch, whatever they are."""

from __future__ import annotations

from collections import OrderedDict, defaultdict, namedtuple
from dataclasses import InitVar, dataclass, field
from enum import Enum
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.configuration_utils import FrozenDict
from diffusers.utils import BaseOutput
from PIL import Image

from helpers.ids import without_address
from pipevault.errors import SettingsError
from pipevault.runtime.joined_outputs import join


@dataclass
class Pictures(BaseOutput):
    images: Any
    nsfw_content_detected: Any = None


@dataclass(frozen=True)
class Frozen:
    images: torch.Tensor
    note: str = ""


@dataclass(frozen=True)
class FrozenSlots:
    __slots__ = ("images",)
    images: list[Any]


@dataclass
class Counted:
    """``count`` comes from the other field."""

    images: list[Any]
    count: int = field(init=False)

    def __post_init__(self) -> None:
        self.count = len(self.images)


@dataclass
class Measured:
    """``shape`` is no field, and comes from one."""

    images: list[Any]

    def __post_init__(self) -> None:
        self.shape = (len(self.images), 3)


@dataclass
class WithInitVar:
    images: list[Any]
    size: InitVar[int]
    area: int = 0

    def __post_init__(self, size: int) -> None:
        self.area = size * size


class Plain:
    def __init__(self, frames: Any) -> None:
        self.frames = frames
        self._hidden = "kept"


class Slotted:
    __slots__ = ("images",)

    def __init__(self, images: Any) -> None:
        self.images = images


class Named(dict[str, Any]):
    """Its items are attributes too."""

    def __init__(self, *items: Any, **named: Any) -> None:
        super().__init__(*items, **named)
        self.__dict__.update(self)


class Frames(list[Any]):
    fps = 0


class Stubborn:
    def __init__(self, images: Any) -> None:
        self.images = images

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self.__dict__:
            raise RuntimeError("once only")
        object.__setattr__(self, name, value)


class FailingError(Exception):
    """An exception's class makes no object by ``object.__new__``."""

    def __init__(self, images: Any) -> None:
        self.images = images


class Colour(Enum):
    RED = 1


Pair = namedtuple("Pair", ["image", "depth"])


def image(value: int) -> Image.Image:
    return Image.new("L", (2, 2), value)


def test_diffusers_outputs() -> None:
    rows = [np.full((1, 2), float(index)) for index in range(3)]
    joined = join([Pictures(row, [False]) for row in rows])
    assert isinstance(joined, Pictures)
    assert joined.images[:, 0].tolist() == [0.0, 1.0, 2.0]
    assert joined["images"] is joined.images
    assert joined.nsfw_content_detected == [False] * 3
    bare = join([Pictures([image(i)]) for i in range(2)])
    assert bare.nsfw_content_detected is None
    assert list(bare.keys()) == ["images"]
    more = [Pictures([image(i)]) for i in range(2)]
    for index, one in enumerate(more):
        one["depth"] = [index]
    assert join(more)["depth"] == [0, 1]


def test_lists_and_tuples() -> None:
    assert join([[[1]], [[2]]]) == [[1], [2]]
    frames = join([Frames([1]), Frames([2])])
    assert (type(frames), list(frames)) == (Frames, [1, 2])
    assert join([(torch.ones(1, 2), None)] * 2)[0].shape == (2, 2)
    pair = join([Pair([i], [i + 10]) for i in range(2)])
    assert isinstance(pair, Pair)
    assert pair == ([0, 1], [10, 11])


def test_tuples_inside_an_output() -> None:
    joined = join([{"layers": (torch.full((1,), i), torch.full((1,), -i)), "size": (512, 512)} for i in (1, 2)])
    assert [layer.tolist() for layer in joined["layers"]] == [[1, 2], [-1, -2]]
    assert joined["size"] == (512, 512)
    pictures = join([{"images": (image(i),)} for i in range(2)])["images"]
    assert isinstance(pictures, tuple)
    assert [one.getpixel((0, 0)) for one in pictures] == [0, 1]


def test_dictionaries_keep_their_kind_and_their_keys() -> None:
    assert join([{1: [1]}, {1: [2]}]) == {1: [1, 2]}
    ordered = join([OrderedDict(b=[i], a=[i]) for i in range(2)])
    assert (type(ordered), list(ordered.items())) == (OrderedDict, [("b", [0, 1]), ("a", [0, 1])])
    default = join([defaultdict(list, a=[i]) for i in range(2)])
    assert (default["a"], default["new"]) == ([0, 1], [])
    frozen = join([FrozenDict(a=[i]) for i in range(2)])
    assert (type(frozen), frozen["a"]) == (FrozenDict, [0, 1])
    named = join([Named(a=[i]) for i in range(2)])
    assert (type(named), named.a, named["a"]) == (Named, [0, 1], [0, 1])


def test_dataclasses() -> None:
    frozen = join([Frozen(torch.full((1,), float(i)), "same") for i in range(2)])
    assert (frozen.images.tolist(), frozen.note) == ([0.0, 1.0], "same")
    assert join([FrozenSlots([i]) for i in range(2)]).images == [0, 1]
    init = join([WithInitVar([i], 4) for i in range(2)])
    assert (init.images, init.area) == ([0, 1], 16)


def test_plain_objects() -> None:
    plain = join([Plain([image(i)]) for i in range(2)])
    assert (type(plain), len(plain.frames), plain._hidden) == (Plain, 2, "kept")
    assert join([Slotted([i]) for i in range(2)]).images == [0, 1]
    assert join([Stubborn([i]) for i in range(2)]).images == [0, 1]


@pytest.mark.parametrize(
    "value",
    ["text", 1, 2.5, None, True, float("nan"), b"x", Colour.RED, image(3), torch.tensor(44100), np.array(2.0), (1, 2)],
    ids=without_address,
)
def test_what_is_the_same_in_all_stays(value: Any) -> None:
    again = value.copy() if isinstance(value, Image.Image) else value
    joined = join([{"images": [0], "value": value}, {"images": [1], "value": again}])
    assert joined["images"] == [0, 1]
    assert joined["value"] is value


@pytest.mark.parametrize(
    ("outputs", "message"),
    [
        ([Frozen(torch.zeros(1), "a"), Frozen(torch.zeros(1), "b")], r"one output: note differs \(str\)"),
        ([{"n": 1}, {"n": "1"}], r"one output: n differs \(int, str\)"),
        ([{"inner": Plain("a")}, {"inner": Plain("b")}], r"one output: inner\.frames differs"),
        ([{"a": [1]}, {"a": [1], "b": [2]}], "one output: the output differs"),
        ([torch.tensor(1.0), torch.tensor(2.0)], "one output: the output differs"),
        ([{"x": torch.zeros(1, 2)}, {"x": torch.zeros(1, 3)}], r"x differs \(Tensor \[1, 2\], Tensor \[1, 3\]\)"),
        ([{"x": np.zeros((1, 2))}, {"x": np.zeros((1, 3))}], r"x differs \(ndarray \[1, 2\], ndarray \[1, 3\]\)"),
        ([(1,), (1, 2)], "one output: the output differs"),
        ([(image(1), 0), (image(2), 0)], r"one output: \[0\] differs \(Image\)"),
        ([{"image": image(1)}, {"image": image(2)}], "one output: image differs"),
        ([{"odd": object()}, {"odd": object()}], "one output: odd differs"),
        ([Counted([1]), Counted([2])], "output is a Counted, and making another one failed .TypeError: it makes count"),
        ([{"x": FailingError([1])}, {"x": FailingError([2])}], "x is a FailingError, and making another one failed"),
    ],
)
def test_what_cannot_be_one_output_is_an_error_that_names_it(outputs: list[Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        join(outputs)


def test_a_dataclass_that_makes_an_attribute_of_its_fields_is_refused() -> None:
    with pytest.raises(SettingsError, match="it makes shape of its other fields"):
        join([Measured(["a"]), Measured(["b"])])
