"""Values as plain JSON, and digests of pixels, arrays and tensors."""

from __future__ import annotations

import hashlib
import json
import math
import subprocess
import sys
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from helpers.ids import without_address
from helpers.sample_records import picture
from pipevault.calls.describe import describe, digest_array, pixels_sha256


class Colour(Enum):
    RED = 1


class Flavour(str, Enum):
    SWEET = "sweet"


class Callback:
    def __call__(self) -> None: ...


def callback() -> None: ...


class TestDescribe:
    @pytest.mark.parametrize("value", [None, True, 0, -3, 2**70, 1.5, "text", "", [], {}])
    def test_plain_values_stand_as_they_are(self, value: Any) -> None:
        assert describe(value) == value
        assert type(describe(value)) is type(value)

    @pytest.mark.parametrize(
        ("value", "described"),
        [
            ((1, [2, (3,)]), [1, [2, [3]]]),
            ({"a": {1: (2,)}}, {"a": {"1": [2]}}),
            (np.float32(0.5), 0.5),
            (np.int64(7), 7),
            (np.bool_(True), True),
            (Path("a/b"), "a/b"),
            (math.nan, {"kind": "float", "value": "nan"}),
            (-math.inf, {"kind": "float", "value": "-inf"}),
            (b"ab", {"kind": "bytes", "sha256": hashlib.sha256(b"ab").hexdigest(), "size_bytes": 2}),
            (torch.float16, "torch.float16"),
            (torch.device("cpu"), "cpu"),
            ({3, 1, 2}, [1, 2, 3]),
            (Colour.RED, {"kind": "object", "class": f"{__name__}.Colour.RED"}),
            (Flavour.SWEET, {"kind": "object", "class": f"{__name__}.Flavour.SWEET"}),
            (callback, {"kind": "callable", "name": f"{__name__}.callback"}),
            (Callback, {"kind": "callable", "name": f"{__name__}.Callback"}),
            (Callback(), {"kind": "object", "class": f"{__name__}.Callback"}),
        ],
        ids=without_address,
    )
    def test_other_values(self, value: Any, described: Any) -> None:
        assert describe(value) == described
        json.dumps(describe(value), allow_nan=False)

    def test_image(self) -> None:
        image = picture(size=(8, 4))
        expected = hashlib.sha256(np.asarray(image).tobytes()).hexdigest()
        assert describe([image]) == [{"kind": "image", "sha256": expected, "size": [8, 4], "mode": "RGB"}]

    def test_an_image_with_another_palette(self) -> None:
        one = Image.new("P", (2, 2), 1)
        other = one.copy()
        one.putpalette([0, 0, 0, 1, 1, 1])
        other.putpalette([0, 0, 0, 9, 9, 9])
        assert describe(one) == {"kind": "image", "sha256": pixels_sha256(one), "size": [2, 2], "mode": "P"}
        assert describe(one) != describe(other)

    def test_array(self) -> None:
        array = np.arange(6, dtype=np.float32).reshape(2, 3)
        expected = {"kind": "array", "sha256": hashlib.sha256(array.tobytes()).hexdigest(), "shape": [2, 3]}
        assert describe(array) == {**expected, "dtype": "float32"}
        assert describe(array.astype(">f4")) == describe(array)

    def test_tensor(self) -> None:
        array = np.arange(6, dtype=np.float32).reshape(2, 3)
        assert describe(torch.from_numpy(array)) == {**describe(array), "kind": "tensor"}

    @pytest.mark.parametrize(
        "tensor", [torch.empty(2, device="meta"), torch.eye(2).to_sparse()], ids=["meta", "sparse"]
    )
    def test_tensor_without_bytes(self, tensor: torch.Tensor) -> None:
        assert describe(tensor) == {"kind": "object", "class": "torch.Tensor"}

    def test_generator(self) -> None:
        generator = torch.Generator().manual_seed(42)
        assert describe(generator) == {"kind": "generator", "seed": 42, "device": "cpu", "fresh": True}
        state = generator.get_state()
        torch.rand(1, generator=generator)
        assert describe(generator)["fresh"] is False
        generator.set_state(state)
        describe(generator)
        assert torch.equal(generator.get_state(), state)

    def test_record_does_not_import_torch(self) -> None:
        code = (
            "import sys\nfrom pipevault.evidence.record_files import embed\n"
            "from pipevault.runtime import record\nfrom pipevault.calls import describe\ndescribe.describe(object())\n"
            "print(sorted({'torch', 'numpy', 'PIL', 'skimage', 'av'} & set(sys.modules)))"
        )
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert result.stdout.strip() == "[]"


class TestDigests:
    def test_an_image_and_its_array_have_the_same_pixels(self) -> None:
        image = picture()
        assert pixels_sha256(image) == pixels_sha256(np.asarray(image)) == hashlib.sha256(image.tobytes()).hexdigest()

    def test_memory_layout_does_not_count(self) -> None:
        array = np.asarray(picture(size=(8, 8)))
        assert pixels_sha256(np.asfortranarray(array)) == pixels_sha256(array)
        assert pixels_sha256(array[:, ::-1]) != pixels_sha256(array)
        assert digest_array(array.astype(np.float32)[::2]) == digest_array(array.astype(np.float32)[::2].copy())

    @pytest.mark.parametrize("make", [lambda: np.zeros((2, 2)), lambda: [[1, 2]]])
    def test_pixels_that_are_no_bytes(self, make: Callable[[], Any]) -> None:
        with pytest.raises(TypeError):
            pixels_sha256(make())

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int64, torch.bool, torch.complex64])
    def test_a_tensor_and_its_array(self, dtype: torch.dtype) -> None:
        tensor = torch.arange(12).reshape(3, 4).to(dtype).T
        assert digest_array(tensor) == digest_array(tensor.numpy()) == digest_array(tensor.contiguous())

    def test_bfloat16_scalars_empty_and_lazily_conjugated_tensors(self) -> None:
        assert digest_array(torch.tensor(1.0, dtype=torch.bfloat16)) == hashlib.sha256(b"\x80\x3f").hexdigest()
        assert digest_array(torch.empty(0)) == digest_array(np.empty(0)) == hashlib.sha256(b"").hexdigest()
        lazy = torch.tensor([1 + 2j]).conj()
        assert digest_array(lazy) == digest_array(torch.tensor([1 - 2j]))
        assert digest_array(torch.ones(1, requires_grad=True)) == digest_array(torch.ones(1))

    def test_one_bit(self) -> None:
        array = np.zeros(1000, dtype=np.float32)
        changed = array.copy()
        changed[999] = np.nextafter(np.float32(0), np.float32(1))
        assert digest_array(changed) != digest_array(array)

    @pytest.mark.parametrize("value", [np.array([object()]), torch.empty(1, device="meta")], ids=["objects", "meta"])
    def test_no_bytes(self, value: Any) -> None:
        with pytest.raises(TypeError, match="no bytes"):
            digest_array(value)
