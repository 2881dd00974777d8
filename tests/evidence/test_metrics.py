"""Distances between outputs, and heat maps."""

from __future__ import annotations

import builtins
import json
import math
from typing import Any

import numpy as np
import pytest
from PIL import Image

from helpers.sample_records import picture
from pipevault.errors import MissingExtraError, NotComparableError
from pipevault.evidence.metrics import distance, heat_map

pytest.importorskip("skimage")


def changed(image: Image.Image, *, at: tuple[int, int] = (5, 9), channel: int = 1, by: int = 1) -> Image.Image:
    array = np.array(image)
    x, y = at
    array[y, x, channel] = (int(array[y, x, channel]) + by) % 256
    return Image.fromarray(array)


class TestDistance:
    def test_of_equal_images(self) -> None:
        found = distance(picture(), picture())
        assert (found.differing_share, found.max_abs, found.mean_abs, found.psnr_db) == (0, 0, 0, math.inf)
        assert found.ssim == pytest.approx(1)
        assert found.equal

    def test_of_one_value_that_differs_by_one(self) -> None:
        base = Image.new("RGB", (32, 32), (10, 20, 30))
        found = distance(base, changed(base))
        assert found.differing_share == 1 / 1024
        assert (found.max_abs, found.mean_abs) == (1, 1 / 3072)
        assert found.psnr_db == pytest.approx(10 * math.log10(255**2 * 3072))
        assert found.ssim is not None
        assert 0.99 < found.ssim < 1
        assert not found.equal

    def test_a_pixel_counts_once_however_many_channels_differ(self) -> None:
        base = Image.new("RGB", (32, 32))
        once = changed(base, channel=0)
        assert distance(base, changed(once, channel=2)).differing_share == 1 / 1024

    def test_does_not_wrap_around(self) -> None:
        found = distance(Image.new("L", (8, 8), 0), Image.new("L", (8, 8), 255))
        assert (found.max_abs, found.mean_abs, found.psnr_db) == (255, 255, 0)

    def test_is_symmetric(self) -> None:
        one, other = picture(1), picture(2)
        there, back = distance(one, other), distance(other, one)
        assert there.ssim == pytest.approx(back.ssim)
        assert there.psnr_db == pytest.approx(back.psnr_db)
        assert (there.differing_share, there.max_abs) == (back.differing_share, back.max_abs)

    def test_agrees_with_scikit_image(self) -> None:
        metrics: Any = pytest.importorskip("skimage.metrics")
        one, other = np.asarray(picture(1)), np.asarray(picture(2))
        found = distance(one, other)
        assert found.psnr_db == pytest.approx(metrics.peak_signal_noise_ratio(one, other))
        assert found.ssim == pytest.approx(metrics.structural_similarity(one, other, channel_axis=-1))

    def test_images_and_arrays_are_the_same(self) -> None:
        assert distance(picture(1), picture(2)) == distance(np.asarray(picture(1)), np.asarray(picture(2)))

    @pytest.mark.parametrize("size", [(32, 32), (8, 8), (7, 9), (6, 6), (3, 40)])
    def test_ssim_of_small_images(self, size: tuple[int, int]) -> None:
        found = distance(picture(1, size=size), picture(2, size=size))
        assert found.ssim is not None
        assert -1 <= found.ssim < 0.9

    def test_ssim_of_images_that_are_too_small(self) -> None:
        assert distance(picture(1, size=(2, 32)), picture(2, size=(2, 32))).ssim is None

    @pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
    def test_floats_have_a_range_of_one(self, dtype: Any) -> None:
        whole, half = np.ones((8, 8, 3), dtype), np.full((8, 8, 3), 0.5, dtype)
        found = distance(whole, half)
        assert (found.max_abs, found.mean_abs) == (0.5, 0.5)
        assert found.psnr_db == pytest.approx(20 * math.log10(2))

    def test_the_least_float_that_differs_is_seen(self) -> None:
        one = np.zeros((1, 4, 8, 8), np.float32)
        other = one.copy()
        other[0, 0, 0, 0] = np.nextafter(np.float32(0), np.float32(1))
        found = distance(one, other)
        assert found.differing_share == 1 / 256
        assert not found.equal

    def test_latents_are_no_image(self) -> None:
        assert distance(np.zeros((1, 4, 8, 8)), np.zeros((1, 4, 8, 8))).ssim is None

    def test_frames_of_a_video(self) -> None:
        one = np.stack([np.asarray(picture(index)) for index in range(3)])
        other = one.copy()
        other[1] = np.asarray(picture(9))
        found = distance(one, other)
        assert found.differing_share == pytest.approx(1 / 3, rel=0.01)
        single = distance(one[1], other[1]).ssim
        assert single is not None
        assert found.ssim == pytest.approx((2 + single) / 3)

    def test_nan_is_equal_to_itself_and_far_from_all_else(self) -> None:
        one = np.zeros((8, 8))
        one[0, 0] = np.nan
        assert distance(one, one.copy()).equal
        found = distance(one, np.zeros((8, 8)))
        assert (found.differing_share, found.max_abs, found.psnr_db) == (1 / 64, math.inf, -math.inf)
        assert found.ssim is None

    def test_infinities(self) -> None:
        up, down = np.full((4, 4), np.inf), np.full((4, 4), -np.inf)
        assert distance(up, up).equal
        assert distance(up, down).max_abs == math.inf

    def test_json_of_it(self) -> None:
        document = distance(picture(), picture()).to_json()
        assert document["psnr_db"] == "inf"
        assert json.loads(json.dumps(document, allow_nan=False)) == document

    @pytest.mark.parametrize(
        ("a", "b", "message"),
        [
            (picture(), picture(size=(16, 16)), "shape"),
            (picture(), picture(mode="L"), "shape"),
            (np.zeros((4, 4), np.uint8), np.zeros((4, 4), np.float32), "uint8 and float32"),
            (np.zeros((4, 4), np.int64), np.zeros((4, 4), np.int64), "int64"),
            (np.zeros((0, 4)), np.zeros((0, 4)), "nothing"),
        ],
        ids=["size", "mode", "dtypes", "integers", "empty"],
    )
    def test_what_cannot_be_compared(self, a: Any, b: Any, message: str) -> None:
        with pytest.raises(NotComparableError, match=message):
            distance(a, b)

    def test_without_scikit_image(self, monkeypatch: pytest.MonkeyPatch) -> None:
        real = builtins.__import__

        def refuse(module: str, *arguments: Any, **keywords: Any) -> Any:
            if module.partition(".")[0] == "skimage":
                raise ModuleNotFoundError("No module named 'skimage'")
            return real(module, *arguments, **keywords)

        monkeypatch.setattr(builtins, "__import__", refuse)
        with pytest.raises(MissingExtraError, match=r"pipevault\[report\]") as caught:
            distance(picture(), picture())
        assert caught.value.extra == "report"


class TestHeatMap:
    def test_black_where_equal_and_bright_where_not(self) -> None:
        base = Image.new("RGB", (32, 32), (10, 20, 30))
        found = heat_map(base, changed(base, at=(5, 9)))
        assert (found.size, found.mode) == ((32, 32), "RGB")
        lit = np.argwhere(np.asarray(found).any(axis=-1))
        assert lit.tolist() == [[9, 5]]
        assert found.getpixel((5, 9)) == (255, 255, 255)

    def test_of_equal_images_is_black(self) -> None:
        assert not np.asarray(heat_map(picture(), picture())).any()

    def test_a_full_scale_makes_maps_comparable(self) -> None:
        base = Image.new("RGB", (4, 4))
        faint = heat_map(base, changed(base, at=(0, 0), by=10), full_scale=255.0)
        strong = heat_map(base, changed(base, at=(0, 0), by=200), full_scale=255.0)
        assert 0 < np.asarray(faint).sum() < np.asarray(strong).sum()

    def test_brighter_with_the_difference(self) -> None:
        ramp = np.arange(256, dtype=np.uint8).reshape(16, 16)
        light = np.asarray(heat_map(np.zeros((16, 16), np.uint8), ramp)).astype(int).sum(axis=-1).ravel()
        assert (np.diff(light) > 0).all()

    def test_floats_and_nan(self) -> None:
        one, other = np.zeros((4, 4, 3)), np.zeros((4, 4, 3))
        other[0, 0, 0], other[1, 1, 1] = 0.5, np.nan
        found = heat_map(one, other)
        assert found.getpixel((0, 0)) == found.getpixel((1, 1)) == (255, 255, 255)

    def test_needs_a_picture(self) -> None:
        with pytest.raises(NotComparableError, match="heat map"):
            heat_map(np.zeros((2, 2, 2, 2, 2)), np.zeros((2, 2, 2, 2, 2)))
        with pytest.raises(NotComparableError):
            heat_map(picture(), picture(size=(4, 4)))
