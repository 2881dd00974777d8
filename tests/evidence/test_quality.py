"""Scores of pictures and what moves them, against values worked out by hand."""

from __future__ import annotations

import math
import sys
from importlib.resources import files
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from helpers.pipelines import tokenizer
from pipevault.demo import MODEL_DIR
from pipevault.demo.classifier import confidences, recognise
from pipevault.errors import MissingExtraError, SettingsError
from pipevault.evidence import quality
from pipevault.evidence.metrics import contrast, luma, reduced_luma, sharpness
from pipevault.evidence.quality import SCORES
from pipevault.evidence.sweep.result import paired_shift, seed_effects, variance_shares

TABLES = st.integers(1, 5).flatmap(
    lambda rows: st.integers(1, 5).flatmap(
        lambda columns: st.lists(
            st.lists(st.floats(-1e3, 1e3), min_size=columns, max_size=columns), min_size=rows, max_size=rows
        )
    )
)


def grey(values: Any) -> Image.Image:
    return Image.fromarray(np.asarray(values, dtype=np.uint8))


def noise(seed: int, side_px: int = 32) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (side_px, side_px, 3), dtype=np.uint8))


class TestPictureScores:
    def test_luma_weighs_the_channels_by_bt_601(self) -> None:
        colours = Image.fromarray(np.array([[[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255]]], dtype=np.uint8))
        np.testing.assert_allclose(luma(colours), [[0.299, 0.587, 0.114, 1.0]])

    def test_sharpness_of_a_dot_by_hand(self) -> None:
        dot = np.zeros((5, 5))
        dot[2, 2] = 255
        # Laplacian: -4 at the dot, 1 at its four neighbours, 0 at the other 20; the mean is 0.
        assert sharpness(grey(dot)) == pytest.approx((16 + 4) / 25)

    def test_sharpness_sees_no_edge_at_the_border(self) -> None:
        assert sharpness(grey(np.full((4, 6), 200))) == 0.0
        assert sharpness(grey([[200]])) == 0.0

    def test_sharpness_stays_in_its_range_and_reaches_it(self) -> None:
        board = np.indices((64, 64)).sum(axis=0) % 2 * 255
        assert 14 < sharpness(grey(board)) <= 16

    def test_a_blurred_picture_is_less_sharp_and_has_less_contrast(self) -> None:
        picture = noise(1)
        blurred = picture.resize((8, 8), Image.Resampling.BOX).resize((32, 32), Image.Resampling.BILINEAR)
        assert sharpness(blurred) < sharpness(picture) / 10
        assert contrast(blurred) < contrast(picture)

    def test_contrast_by_hand(self) -> None:
        assert contrast(grey([[0, 255], [255, 0]])) == pytest.approx(0.5)
        assert contrast(grey([[0, 0, 0, 255]])) == pytest.approx(math.sqrt(3) / 4)
        assert contrast(grey([[7, 7]])) == 0.0

    def test_transparency_is_ignored(self) -> None:
        picture = noise(2)
        clear = picture.copy()
        clear.putalpha(0)
        assert contrast(clear) == contrast(picture)

    def test_pictures_are_averaged_over_blocks_for_ssim_as_wang_advises(self) -> None:
        picture = noise(3, 513)
        reduced = reduced_luma(picture)
        assert reduced.shape == (256, 256)
        assert reduced[0, 0] == pytest.approx(luma(picture)[:2, :2].mean())
        assert reduced_luma(noise(3, 32)).shape == (32, 32)

    def test_sharpness_needs_scipy(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "scipy.ndimage", None)
        with pytest.raises(MissingExtraError, match=r"SciPy is not installed.*pipevault\[report\]") as caught:
            sharpness(grey([[1, 2]]))
        assert caught.value.extra == "report"

    def test_the_mean_to_others_by_hand(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def difference(one: Image.Image, other: Image.Image) -> float:
            return abs(np.asarray(one).mean() - np.asarray(other).mean())

        monkeypatch.setattr(quality, "lpips_metric", lambda: difference)
        scoring = quality.Scoring("m", ["x"], 3, None)
        scoring.add([(0, 0), (0, 1), (0, 2)], [grey(np.full((4, 4), level)) for level in (0, 1, 5)])
        assert scoring.tables()[0]["lpips"] == ((3.0, 2.5, 4.5),)


class TestVarianceShares:
    def test_a_table_by_hand(self) -> None:
        # Mean 4. Prompt means 3 and 5: SS 3 (1 + 1) = 6. Seed means 2, 4, 6: SS 2 (4 + 0 + 4) = 16. Total 26, rest 4.
        shares = variance_shares([[2.0, 2.0, 5.0], [2.0, 6.0, 7.0]])
        assert (shares.prompt, shares.seed, shares.remainder) == pytest.approx((6 / 26, 16 / 26, 4 / 26))

    @pytest.mark.parametrize("value", [0.0, 0.1, 1 / 3, 1e300, -7.7])
    def test_a_constant_score_has_no_shares(self, value: float) -> None:
        shares = variance_shares([[value] * 7] * 3)
        assert (shares.prompt, shares.seed, shares.remainder) == (0.0, 0.0, 0.0)

    def test_pure_effects(self) -> None:
        assert variance_shares([[1.0, 1.0], [2.0, 2.0]]).prompt == 1.0
        assert variance_shares([[1.0, 2.0], [1.0, 2.0]]).seed == 1.0
        assert variance_shares([[1.0, 2.0], [2.0, 1.0]]).remainder == 1.0

    def test_one_prompt_or_one_seed(self) -> None:
        assert variance_shares([[1.0, 5.0, 2.0]]).seed == pytest.approx(1.0)
        assert variance_shares([[1.0], [5.0]]).prompt == pytest.approx(1.0)
        assert variance_shares([[3.0]]) == variance_shares([[0.0]])

    @given(TABLES)
    def test_shares_sum_to_one_and_lie_between_0_and_1(self, table: list[list[float]]) -> None:
        shares = variance_shares(table)
        parts = (shares.prompt, shares.seed, shares.remainder)
        assert all(0 <= part <= 1 for part in parts)
        assert sum(parts) == pytest.approx(0.0 if len({value for row in table for value in row}) == 1 else 1.0)

    @given(st.integers(0, 2**32 - 1), st.floats(-100, 100), st.floats(0.01, 100), st.booleans())
    def test_invariances(self, seed: int, constant: float, factor: float, negative: bool) -> None:
        generator = np.random.default_rng(seed)
        table = generator.normal(size=(4, 6))
        moved = constant + (-factor if negative else factor) * table[generator.permutation(4)]
        moved = moved[:, generator.permutation(6)]
        one, other = variance_shares(table.tolist()), variance_shares(moved.tolist())
        assert (one.prompt, one.seed) == pytest.approx((other.prompt, other.seed), rel=1e-6, abs=1e-9)
        turned = variance_shares(table.T.tolist())
        assert (turned.seed, turned.prompt) == pytest.approx((one.prompt, one.seed))

    def test_noise_has_the_shares_of_chance_on_average(self) -> None:
        generator = np.random.default_rng(5)
        found = [variance_shares(generator.normal(size=(5, 8)).tolist()) for _ in range(400)]
        assert np.mean([shares.prompt for shares in found]) == pytest.approx(4 / 39, abs=0.02)
        assert np.mean([shares.seed for shares in found]) == pytest.approx(7 / 39, abs=0.02)


class TestOutlierSeeds:
    def test_modified_z_by_hand(self) -> None:
        # One prompt: median 3.5, deviations 2.5 1.5 .5 .5 1.5 16.5, MAD 1.5.
        effects = seed_effects([[1.0, 2.0, 3.0, 4.0, 5.0, 20.0]])
        assert effects.effects == (-2.5, -1.5, -0.5, 0.5, 1.5, 16.5)
        assert effects.z[5] == pytest.approx(0.6745 * 16.5 / 1.5, rel=1e-4)
        assert effects.outliers == (5,)

    def test_the_rule_looks_at_means_over_prompts(self) -> None:
        good = [0.90, 0.91, 0.92, 0.93, 0.94, 0.95, 0.96, 0.97]
        one_bad_picture = [[*good[:-1], 0.80], *[list(good) for _ in range(9)]]
        assert seed_effects(one_bad_picture).outliers == ()
        assert seed_effects([[*good[:-1], 0.5]] * 10).outliers == (7,)

    def test_a_prompts_own_level_is_no_effect_of_a_seed(self) -> None:
        row = np.array([1.0, 2.0, 3.0, 4.0, 5.0, 20.0])
        effects = seed_effects([list(row), list(row + 1000)])
        assert effects.outliers == (5,)
        assert effects.effects == seed_effects([list(row)]).effects

    def test_equal_seeds_have_no_outliers(self) -> None:
        effects = seed_effects([[0.1] * 8, [0.3] * 8])
        assert (effects.outliers, effects.z) == ((), (0.0,) * 8)

    def test_mad_0_flags_the_one_that_differs(self) -> None:
        effects = seed_effects([[1.0] * 7 + [0.2]], resolution=0.01)
        assert effects.outliers == (7,)
        assert effects.z[7] == pytest.approx(-0.8 / (math.sqrt(math.pi / 2) * 0.1))
        assert effects.z[0] == 0.0

    def test_mad_0_flags_nobody_where_several_differ(self) -> None:
        assert seed_effects([[1.0] * 5 + [0.8, 0.7, 0.9]]).outliers == ()

    def test_differences_below_the_resolution_are_never_flagged(self) -> None:
        table = [[1.0, 0.99999, 0.99998, 0.99999, 1.0, 0.99997, 0.998]]
        assert seed_effects(table).outliers == (6,)
        assert seed_effects(table, resolution=0.01).outliers == ()

    @pytest.mark.parametrize("seeds", [1, 2, 5])
    def test_few_seeds_have_no_outliers(self, seeds: int) -> None:
        effects = seed_effects([[*range(seeds - 1), 1000.0]])
        assert (effects.outliers, effects.z) == ((), (0.0,) * seeds)

    def test_how_often_normal_scores_flag_a_seed_is_as_documented(self) -> None:
        generator = np.random.default_rng(0)
        flagged = [bool(seed_effects(generator.normal(size=(1, 8)).tolist()).outliers) for _ in range(2000)]
        assert np.mean(flagged) == pytest.approx(0.14, abs=0.03)


class TestPairedShift:
    def test_by_hand(self) -> None:
        shift = paired_shift([1.0, 2.0, 3.0], [2.0, 4.0, 6.0])
        assert (shift.mean, shift.pairs) == (2.0, 3)
        assert shift.standard_error == pytest.approx(1 / math.sqrt(3))
        assert shift.p_value == 2 / 8  # only +++ and --- are as far from 0

    def test_no_shift(self) -> None:
        shift = paired_shift([1.0, 2.0], [1.0, 2.0])
        assert (shift.mean, shift.standard_error, shift.p_value) == (0.0, 0.0, 1.0)

    def test_one_pair(self) -> None:
        assert paired_shift([1.0], [3.0]).standard_error is None
        assert paired_shift([1.0], [3.0]).p_value == 1.0

    def test_pairs_that_did_not_move_do_not_change_the_exact_test(self) -> None:
        assert paired_shift([0.0] * 5, [1.0] * 5).p_value == 2 / 32
        assert paired_shift([0.0] * 50, [1.0] * 5 + [0.0] * 45).p_value == 2 / 32

    def test_many_pairs_are_drawn_and_give_the_same_p_again(self) -> None:
        generator = np.random.default_rng(1)
        drawn = generator.normal(size=(2, 200))
        old, new, moved = drawn[0].tolist(), drawn[1].tolist(), (drawn[0] + 1 + 0.1 * drawn[1]).tolist()
        assert paired_shift(old, new) == paired_shift(old, new)
        assert 0.01 < paired_shift(old, new).p_value <= 1
        assert paired_shift(old, moved).p_value == 2 / 10_000

    def test_it_is_two_sided_and_fair(self) -> None:
        generator = np.random.default_rng(2)
        values = [paired_shift([0.0] * 10, list(generator.normal(size=10))).p_value for _ in range(300)]
        assert np.mean(np.array(values) <= 0.1) == pytest.approx(0.1, abs=0.05)
        assert paired_shift([0.0, 0.0], [1.0, 2.0]).p_value == paired_shift([1.0, 2.0], [0.0, 0.0]).p_value

    def test_without_scipy(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "scipy.stats", None)
        with pytest.raises(MissingExtraError, match="SciPy"):
            paired_shift([0.0, 0.0], [1.0, 2.0])


class TestDigitConfidence:
    def test_it_is_the_probability_of_the_named_digit(self) -> None:
        pictures = [noise(1), noise(2)]
        [one, other], [first, second] = recognise(pictures)
        assert confidences(pictures, [one, other]) == pytest.approx([first, second])
        columns = [confidences(pictures, [digit, digit]) for digit in range(10)]
        assert np.sum(columns, axis=0) == pytest.approx([1.0, 1.0], abs=1e-5)

    def test_no_pictures(self) -> None:
        assert confidences([], []) == []

    @pytest.mark.parametrize("digits", [[10], [-1], [1, 2], []])
    def test_what_is_no_digit_for_each_picture(self, digits: list[int]) -> None:
        with pytest.raises(ValueError, match="as many digits"):
            confidences([noise(1)], digits)


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP model of random weights, with its processor, as ``save_pretrained`` writes them."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("clip")
    text = {"vocab_size": 190, "max_position_embeddings": 16, "bos_token_id": 188, "eos_token_id": 189}
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = {**small, "image_size": 32, "patch_size": 8}
    config = CLIPConfig(text_config={**small, **text, "pad_token_id": 189}, vision_config=vision, projection_dim=8)
    CLIPModel(config).save_pretrained(folder)
    images = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    CLIPProcessor(images, tokenizer(folder / "words")).save_pretrained(folder)
    return folder


class TestClipScore:
    def test_it_is_a_hundred_times_the_cosine_and_never_negative(self, clip_folder: Path) -> None:
        from transformers import CLIPModel, CLIPProcessor

        pictures, texts = [noise(seed) for seed in range(6)], ["a cat", "seven", "zero", "dog", "a b", "house"]
        scores = quality.clip_scorer(str(clip_folder))(pictures, texts)
        inputs = CLIPProcessor.from_pretrained(clip_folder)(
            text=texts, images=pictures, return_tensors="pt", padding=True
        )
        with torch.inference_mode():
            model = CLIPModel.from_pretrained(clip_folder).eval()
            cosines = (model(**inputs).logits_per_image / model.logit_scale.exp()).diagonal()
        assert scores == pytest.approx([100 * max(float(cosine), 0.0) for cosine in cosines], abs=1e-3)
        assert all(0 <= score <= 100 for score in scores)

    def test_a_long_text_is_cut(self, clip_folder: Path) -> None:
        [score] = quality.clip_scorer(str(clip_folder))([noise(1)], ["word " * 100])
        assert math.isfinite(score)

    @pytest.mark.parametrize("folder", [MODEL_DIR, Path("none"), Path("nobody/no-such-model")])
    def test_what_is_no_clip_model(self, folder: Path) -> None:
        with pytest.raises(SettingsError, match="cannot be opened as a CLIP model"):
            quality.clip_scorer(str(folder))


class TestLpips:
    """The package and its weights are not at hand in every place: a stand-in with its interface takes their part."""

    def test_without_the_package(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "lpips", None)
        assert quality.lpips_metric() == "the package lpips is not installed"

    def test_without_weights_nothing_is_downloaded(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        def refuse(**options: Any) -> Any:
            raise AssertionError("opened")

        monkeypatch.setitem(sys.modules, "lpips", SimpleNamespace(LPIPS=refuse))
        monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
        reason = quality.lpips_metric()
        assert isinstance(reason, str)
        assert "AlexNet" in reason

    def test_pictures_reach_it_as_0_to_1_and_large_enough(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        seen: list[torch.Tensor] = []

        class Network(torch.nn.Module):
            def __init__(self, net: str, verbose: bool) -> None:
                super().__init__()
                assert net == "alex"

            def forward(self, first: torch.Tensor, second: torch.Tensor, normalize: bool) -> torch.Tensor:
                assert normalize
                seen.extend([first, second])
                return (first - second).abs().mean().reshape(1, 1, 1, 1)

        (tmp_path / "checkpoints").mkdir()
        (tmp_path / "checkpoints" / "alexnet-owt-7be5be79.pth").touch()
        monkeypatch.setitem(sys.modules, "lpips", SimpleNamespace(LPIPS=Network))
        monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
        metric = quality.lpips_metric()
        assert not isinstance(metric, str)
        white, black = Image.new("RGB", (32, 48), "white"), Image.new("RGB", (32, 48))
        assert metric(white, black) == 1.0
        assert metric(white, white) == 0.0
        assert (tuple(seen[0].shape), seen[0].max()) == ((1, 3, 96, 64), 1.0)


def test_every_score_has_its_meaning_in_the_report() -> None:
    template = files("pipevault.report").joinpath("templates/sweep.html.j2").read_text("utf-8")
    assert [name for name in SCORES if f'  "{name}": "' not in template] == []
