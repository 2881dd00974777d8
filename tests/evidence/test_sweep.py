"""Sweeps: what is drawn, what is written down, and how two sweeps differ."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import pipevault
from helpers.pipelines import FAST_BUILD, PlainPipeline, stable_diffusion
from helpers.sweeps import Painter, sweep_result
from pipevault.cache.outcome import Step
from pipevault.calls.describe import pixels_sha256
from pipevault.demo import named_digit
from pipevault.digest import canonical_json
from pipevault.errors import BadCallError, BadSeedError, SettingsError
from pipevault.evidence import quality
from pipevault.evidence.metrics import contrast, distance, reduced_luma, sharpness
from pipevault.evidence.request import Request
from pipevault.evidence.sweep.drift import drift
from pipevault.evidence.sweep.result import SWEEP_VERSION, SweepResult, read_sweep
from pipevault.evidence.sweep.run import MAX_PICTURES, run_sweep, sweep_load_arguments


@pytest.fixture(autouse=True)
def _without_lpips(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quality, "lpips_metric", lambda: "the package lpips is not installed")


def eager(pipe: Any) -> Any:
    return pipevault.PipelineCache(mode="off").load(pipe, batch_size=1)


@pytest.fixture
def painter() -> Painter:
    pipe: Painter = eager(Painter())
    return pipe


def alone(pipe: Any, prompt: str, seed: int) -> Image.Image:
    picture: Image.Image = pipe(prompt, generator=pipevault.generators(seed, 1)[0]).images[0]
    return picture


class TestDrawing:
    def test_a_picture_is_that_of_its_prompt_and_seed_drawn_alone(self, frozen_vault: Path, tmp_path: Path) -> None:
        pipe = stable_diffusion(tmp_path / "tokenizer")
        pipe.set_progress_bar_config(disable=True)
        request = Request(steps=2)
        cache = pipevault.PipelineCache(frozen_vault, mode="require", build_config=FAST_BUILD)
        cache.load(pipe, **sweep_load_arguments(pipe, ["a cat", "a dog"], request, 1))
        done = run_sweep(pipe, ["a cat", "a dog"], [0, 7], request, model="tiny")
        for row, prompt in enumerate(["a cat", "a dog"]):
            for column, seed in enumerate([0, 7]):
                output = pipe(prompt, num_inference_steps=2, seed=seed)
                assert done.result.pixels[row][column] == pixels_sha256(output.images[0])
                assert done.thumbnails[row][column].tobytes() == output.images[0].tobytes()
        record = pipevault.record_of(output)
        assert done.result.key == record.key
        assert done.result.weights == record.weights != {}
        assert done.result.machine == record.machine
        assert done.result.level == {"asked": "repeatable", "achieved": "repeatable"}
        assert done.result.versions["torch"] == torch.__version__
        assert {*record.versions, "scikit-image"} <= set(done.result.versions)
        assert done.result.outcome == "hit"
        assert SweepResult.from_json(done.result.to_json()) == done.result

    @pytest.mark.parametrize("batch_size", [1, 2, 4, 6, 7])
    def test_whatever_the_batch(self, painter: Painter, batch_size: int) -> None:
        prompts, seeds = ["x", "yy", "zzz"], [5, 0]
        result = run_sweep(painter, prompts, seeds, model="m", batch_size=batch_size).result
        expected = tuple(tuple(pixels_sha256(alone(painter, prompt, seed)) for seed in seeds) for prompt in prompts)
        assert result.pixels == expected

    def test_every_call_has_the_same_size(self, painter: Painter) -> None:
        run_sweep(painter, ["x", "yy", "zzz"], [5, 0], model="m", batch_size=4)
        assert painter.calls == [["x", "yy", "zzz", "x"], ["yy", "zzz", "zzz", "zzz"]]

    def test_what_is_loaded_is_what_is_called(self) -> None:
        request = Request(steps=2, height=16)
        assert sweep_load_arguments(Painter(), ["x", "y"], request, 4) == {"height": 16, "batch_size": 4}
        assert sweep_load_arguments(Painter(), ["x", "y"], request, 1) == {"height": 16, "batch_size": 1}

    def test_the_call_of_the_request_is_made_and_recorded(self, painter: Painter) -> None:
        request = Request(height=4, width=6, seed=9, prompts=("other",))
        done = run_sweep(painter, ["x"], [0], request, model="m")
        assert done.thumbnails[0][0].size == (6, 4)
        assert done.result.call["height"] == 4
        assert not {"seed", "prompts"} & set(done.result.call)

    def test_progress(self, painter: Painter) -> None:
        steps: list[Step] = []
        run_sweep(painter, ["x", "y"], [0, 1], model="m", batch_size=3, progress=steps.append)
        assert [(step.action, step.detail, step.seconds is None) for step in steps] == [
            ("draw", "", True),
            ("draw", "3 of 4", True),
            ("draw", "4 of 4", True),
            ("draw", "", False),
            ("comparing the seeds' pictures", "", True),
            ("comparing the seeds' pictures", "", False),
        ]

    def test_a_video_is_scored_by_its_middle_frame(self) -> None:
        frames = [Image.new("RGB", (8, 8), (level, 0, 0)) for level in (0, 100, 200)]
        frames[1].putpixel((0, 0), (255, 255, 255))

        class Filming(PlainPipeline):
            def __call__(self, prompt: str = "", generator: Any = None) -> Any:  # type: ignore[override]
                return SimpleNamespace(frames=[frames])

        done = run_sweep(eager(Filming()), ["x"], [0], model="m")
        assert done.thumbnails[0][0].tobytes() == frames[1].tobytes()
        assert done.result.scores["contrast"] == ((contrast(frames[1]),),)
        assert done.result.pixels[0][0] != pixels_sha256(frames[1])

    def test_a_pipeline_without_prompts(self) -> None:
        class Unconditional(PlainPipeline):
            def __call__(self, batch_size: int = 1, generator: Any = None) -> Any:  # type: ignore[override]
                assert batch_size == (len(generator) if isinstance(generator, list) else 1)
                return SimpleNamespace(images=Painter()(["x"] * batch_size, generator=generator).images)

        pipe = eager(Unconditional())
        assert sweep_load_arguments(pipe, [], Request(), 2)["batch_size"] == 2
        result = run_sweep(pipe, [], [0, 1, 2], model="m", batch_size=2).result
        assert (result.prompts, len(set(result.pixels[0]))) == (("",), 3)
        with pytest.raises(SettingsError, match="takes no prompts"):
            run_sweep(pipe, ["x"], [0], model="m")

    def test_a_large_picture_leaves_a_thumbnail(self, painter: Painter) -> None:
        done = run_sweep(painter, ["x"], [0], Request(height=512, width=300), model="m")
        assert done.thumbnails[0][0].size == (150, 256)


class TestScores:
    def test_they_are_those_of_the_pictures(self, painter: Painter) -> None:
        prompts, seeds = ["x", "yy"], [0, 1, 2]
        result = run_sweep(painter, prompts, seeds, model="m", batch_size=4).result
        pictures = [[alone(painter, prompt, seed) for seed in seeds] for prompt in prompts]
        assert result.scores["sharpness"] == tuple(tuple(map(sharpness, row)) for row in pictures)
        assert result.scores["contrast"] == tuple(tuple(map(contrast, row)) for row in pictures)
        lumas = [reduced_luma(picture) for picture in pictures[1]]
        others = [distance(lumas[1], lumas[at]).ssim for at in (0, 2)]
        assert result.scores["similarity"][1][1] == pytest.approx(np.mean([other for other in others if other]))

    def test_every_score_is_there_or_has_a_reason(self, painter: Painter) -> None:
        result = run_sweep(painter, ["x"], [0, 1], model="m").result
        assert list(result.scores) == ["sharpness", "contrast", "similarity"]
        assert result.not_available == {
            "digit_confidence": "the digit classifier knows the demo model's pictures only",
            "clip_score": "no CLIP model was named: give --clip-model",
            "lpips": "the package lpips is not installed",
        }

    def test_scores_of_pairs_need_two_seeds(self, painter: Painter, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(quality, "lpips_metric", lambda: lambda one, other: 0.5)
        result = run_sweep(painter, ["x"], [0], model="m").result
        assert result.not_available["similarity"] == result.not_available["lpips"]
        assert "only one" in result.not_available["lpips"]
        assert run_sweep(painter, ["x"], [0, 1], model="m").result.scores["lpips"] == ((0.5, 0.5),)

    def test_tiny_pictures_have_no_ssim(self, painter: Painter) -> None:
        result = run_sweep(painter, ["x"], [0, 1], Request(height=2, width=8), model="m").result
        assert "fewer than 3 pixels" in result.not_available["similarity"]

    def test_a_clip_model_sees_pictures_and_their_prompts(self, painter: Painter) -> None:
        def clip(pictures: Any, texts: Any) -> list[float]:
            assert all(picture.size == (8, 8) for picture in pictures)
            return [float(len(text)) for text in texts]

        result = run_sweep(painter, ["x", "yy"], [0, 1], model="m", batch_size=3, clip=clip).result
        assert result.scores["clip_score"] == ((1.0, 1.0), (2.0, 2.0))

    def test_a_score_that_is_not_finite_is_reported(self, painter: Painter) -> None:
        result = run_sweep(painter, ["x"], [0, 1], model="m", clip=lambda pictures, texts: [float("nan")]).result
        assert "not finite" in result.not_available["clip_score"]
        assert "clip_score" not in result.scores

    def test_the_demo_has_its_classifiers_confidence(self, painter: Painter) -> None:
        result = run_sweep(painter, ["a handwritten two"], [0], model="demo").result
        assert 0 <= result.scores["digit_confidence"][0][0] <= 1

    def test_a_prompt_of_the_demo_that_names_no_digit(self, painter: Painter) -> None:
        result = run_sweep(painter, ["a two", "a lighthouse"], [0], model="demo").result
        assert result.not_available["digit_confidence"] == "the prompt 'a lighthouse' does not name one digit"

    @pytest.mark.parametrize(
        ("prompt", "digit"),
        [("a handwritten seven", 7), ("Zero!", 0), ("one,one", 1), ("a stone", None), ("two three", None), ("", None)],
    )
    def test_the_digit_that_a_prompt_names(self, prompt: str, digit: int | None) -> None:
        assert named_digit(prompt) == digit


class TestBadInput:
    @pytest.mark.parametrize(
        ("seeds", "error", "words"),
        [
            ([1, 2, 1], BadSeedError, "seed 1 is given twice"),
            ([-1], BadSeedError, "out of range"),
            ([2**64], BadSeedError, "out of range"),
            ([1.5], BadSeedError, "integer"),
        ],
    )
    def test_seeds(self, painter: Painter, seeds: Any, error: type[Exception], words: str) -> None:
        with pytest.raises(error, match=words):
            run_sweep(painter, ["x"], seeds, model="m")
        assert painter.calls == []

    @pytest.mark.parametrize(
        ("prompts", "words"),
        [([], "needs prompts"), (["x", " "], "Prompt 2"), (["x", "y", "x"], "'x' is given twice")],
    )
    def test_prompts(self, painter: Painter, prompts: Any, words: str) -> None:
        with pytest.raises(SettingsError, match=words):
            run_sweep(painter, prompts, [0], model="m")
        with pytest.raises(SettingsError, match=words):  # before minutes of compiling
            sweep_load_arguments(painter, prompts, Request(), 2)

    def test_too_many_pictures(self, painter: Painter) -> None:
        prompts = [f"prompt {index}" for index in range(MAX_PICTURES // 100 + 1)]
        with pytest.raises(SettingsError, match=f"up to {MAX_PICTURES}"):
            run_sweep(painter, prompts, range(100), model="m")

    def test_several_pictures_of_a_prompt(self, painter: Painter) -> None:
        with pytest.raises(BadCallError, match="num_images_per_prompt"):
            run_sweep(painter, ["x"], [0], Request(arguments={"num_images_per_prompt": 2}), model="m")

    def test_an_argument_that_the_pipeline_does_not_take(self, painter: Painter) -> None:
        with pytest.raises(BadCallError, match="guidance_scale"):
            run_sweep(painter, ["x"], [0], Request(guidance_scale=2.0), model="m")

    def test_an_output_without_pictures(self) -> None:
        with pytest.raises(SettingsError, match="holds no PIL images"):
            run_sweep(eager(PlainPipeline()), ["x"], [0], model="m")

    def test_fewer_pictures_than_prompts(self, painter: Painter, monkeypatch: pytest.MonkeyPatch) -> None:
        def one(pipe: Any, prompt: Any = "", generator: Any = None) -> Any:
            return SimpleNamespace(images=[Image.new("RGB", (8, 8))])

        monkeypatch.setattr(Painter, "__call__", one)
        with pytest.raises(BadCallError, match="1 pictures for a batch of 2"):
            run_sweep(painter, ["x", "y"], [0], model="m", batch_size=2)

    def test_a_pipeline_that_was_not_loaded(self) -> None:
        with pytest.raises(SettingsError, match="was not loaded"):
            run_sweep(Painter(), ["x"], [0], model="m")

    def test_without_prompts_and_batch_size_a_pipeline_draws_one_by_one(self) -> None:
        class Bare(PlainPipeline):
            def __call__(self, generator: Any = None) -> Any:  # type: ignore[override]
                return SimpleNamespace(images=[Image.new("RGB", (8, 8))])

        with pytest.raises(BadCallError, match="batch size 1"):
            run_sweep(eager(Bare()), [], [0, 1], model="m", batch_size=2)
        assert run_sweep(eager(Bare()), [], [0, 1], model="m").result.prompts == ("",)


def broken(**changes: Any) -> str:
    document = json.loads(sweep_result().to_json())
    for name, value in changes.items():
        if value is None:
            del document[name]
        else:
            document[name] = value
    return json.dumps(document)


class TestDocument:
    def test_it_is_canonical_json_and_comes_back(self) -> None:
        result = sweep_result(scores={"contrast": ((0.1, 0.2), (0.3, 1 / 3))}, seeds=(3, 2**64 - 1))
        assert result.to_json().encode() == canonical_json(json.loads(result.to_json()))
        assert SweepResult.from_json(result.to_json()) == result

    def test_what_was_found_is_in_it(self) -> None:
        scores = {"contrast": ((0.1, 0.11, 0.12, 0.13, 0.14, 0.45),) * 2}
        found = json.loads(sweep_result(seeds=range(6), scores=scores).to_json())["found"]
        shares = {"prompt": 0.0, "seed": 1.0, "remainder": 0.0}
        assert found["variance_shares"]["contrast"] == shares
        assert found["outlier_seeds"] == {"5": ["contrast"]}

    @pytest.mark.parametrize(
        ("text", "words"),
        [
            ("no JSON", "not JSON"),
            ("[]", "with the field `pipevault_sweep`"),
            ('{"pipevault_record": 1}', "with the field `pipevault_sweep`"),
            (broken(pipevault_sweep=SWEEP_VERSION + 1), "Upgrade pipevault"),
            (broken(pipevault_sweep="1"), "integer from 1 on"),
            (broken(pipevault_sweep=True), "integer from 1 on"),
            (broken(pixels=None), "`pixels`: missing"),
            (broken(more=1), "`more`: unknown"),
            (broken(model=3), "`model`: expected `str`"),
            (broken(level=[]), "`level`: expected `object`"),
            (broken(weights={"unet": 1}), "`weights[...]`: expected `str`"),
            (broken(key="abc"), "`key`: expected `str` matching"),
            (broken(batch_size=0), "`batch_size`: expected `int` >= 1"),
            (broken(prompts=[]), "`prompts`: expected `array` of length >= 1"),
            (broken(prompts=["a", "a"]), "`prompts`: it names one twice"),
            (broken(seeds=[-1, *range(7)]), "`seeds[0]`: expected `int` >= 0"),
            (broken(seeds=[0, *range(7)]), "`seeds`: it names one twice"),
            (broken(notes=[1]), "`notes[0]`: expected `str`"),
            (broken(pixels=[["a" * 64] * 8]), "`pixels`: expected a table of 2 prompts by 8 seeds"),
            (broken(pixels=[["x"] * 8] * 2), "`pixels[0][0]`: expected `str` matching"),
            (
                broken(scores={"contrast": [[0.1] * 7] * 2}),
                "`scores.contrast`: expected a table of 2 prompts by 8 seeds",
            ),
            (broken(scores={"contrast": [["0.1"] * 8] * 2}), "`scores[...][0][0]`: expected `float`"),
            (broken(scores={"beauty": [[0.1] * 8] * 2}), "`scores.beauty`: unknown"),
            (broken().replace("0.2", "NaN"), "expected a finite number, got NaN"),
        ],
    )
    def test_what_is_no_sweep(self, text: str, words: str) -> None:
        with pytest.raises(SettingsError, match=r"old\.json") as caught:
            SweepResult.from_json(text, source="old.json")
        assert words in str(caught.value)

    def test_a_file_that_is_not_there(self, tmp_path: Path) -> None:
        with pytest.raises(SettingsError, match="cannot be read"):
            read_sweep(tmp_path / "none.json")


class TestDrift:
    def test_the_same_sweep_has_none(self) -> None:
        found = drift(sweep_result(), sweep_result())
        assert found.summary.startswith("All 16 pictures")
        assert (found.compared, found.changed, found.context) == (16, (), ())
        assert (found.shifts["contrast"].mean, found.shifts["contrast"].p_value) == (0.0, 1.0)

    def test_a_painter_that_draws_again_has_none_and_another_call_has(self, painter: Painter) -> None:
        old = run_sweep(painter, ["x", "yy"], [0, 1], model="m").result
        again = run_sweep(painter, ["x", "yy"], [0, 1], model="m", batch_size=2).result
        assert drift(again, old).changed == ()
        assert drift(again, old).context == ("batch size: 1 then, 2 now",)
        other = run_sweep(painter, ["x", "yy"], [0, 1], Request(height=9), model="m").result
        found = drift(other, old)
        assert (len(found.changed), found.context) == (4, ("call height: none then, 9 now",))

    def test_changed_pictures_and_shifts(self) -> None:
        old = sweep_result()
        pixels = [list(row) for row in old.pixels]
        pixels[1][3] = "0" * 64
        contrasts = [[0.2] * 8, [0.2] * 3 + [0.36] + [0.2] * 4]
        found = drift(sweep_result(pixels=pixels, scores={"contrast": contrasts}), old)
        assert found.summary.startswith("1 of the 16 pictures")
        assert found.changed == (("b", 3),)
        assert found.shifts["contrast"].mean == pytest.approx(0.16 / 16)
        assert found.shifts["contrast"].pairs == 16

    def test_only_what_both_have_is_compared_and_the_rest_is_named(self) -> None:
        old = sweep_result(prompts=["b", "a"], seeds=[0, 1, 2, 9])
        new = sweep_result(prompts=["a", "c"], seeds=[2, 1, 0, 7])
        found = drift(new, old)
        assert (found.compared, found.changed) == (3, ())
        assert found.context == ("prompts: b, a then, a, c now", "seeds: 0, 1, 2, 9 then, 0, 1, 2, 7 now")

    def test_scores_that_one_side_lacks_are_named(self) -> None:
        with_clip = sweep_result(scores={"clip_score": [[1.0] * 8] * 2, "contrast": [[0.2] * 8] * 2})
        found = drift(sweep_result(), with_clip)
        assert found.context == ("scores: clip_score, contrast then, contrast now",)
        assert list(found.shifts) == ["contrast"]

    def test_scores_that_compare_seeds_shift_only_among_the_same_seeds(self) -> None:
        def with_similarity(seeds: Any) -> SweepResult:
            return sweep_result(seeds=seeds, scores={"similarity": [[0.5] * len(seeds)] * 2})

        assert list(drift(with_similarity([0, 1]), with_similarity([1, 0])).shifts) == ["similarity"]
        assert list(drift(with_similarity([0, 1]), with_similarity([0, 1, 2])).shifts) == []

    def test_seeds_that_became_outliers_or_are_none_any_more(self) -> None:
        calm, wild = [0.10, 0.11, 0.12, 0.13, 0.14, 0.15], [0.10, 0.11, 0.12, 0.13, 0.14, 0.45]
        one = sweep_result(seeds=range(6), scores={"contrast": [calm] * 2})
        other = sweep_result(seeds=range(6), scores={"contrast": [wild] * 2})
        assert drift(other, one).context == ("outlier seeds: none then, 5 now",)
        assert drift(one, other).context == ("outlier seeds: 5 then, none now",)
        assert drift(other, other).context == ()

    def test_what_was_different_about_the_sweeps_is_told(self) -> None:
        new = sweep_result(
            key="c" * 64,
            weights={"unet": "d" * 64},
            versions={"torch": "2.14.0"},
            level={"asked": "strict", "achieved": "strict"},
        )
        assert drift(new, sweep_result()).context == (
            "level achieved: repeatable then, strict now",
            "level asked: repeatable then, strict now",
            "weights unet: bbbbbbbbbbbb… then, dddddddddddd… now",
            "version torch: 2.13.0 then, 2.14.0 now",
            "key: aaaaaaaaaaaa… then, cccccccccccc… now",
        )

    def test_it_is_plain_json(self) -> None:
        found = drift(sweep_result(seeds=[1]), sweep_result(seeds=[1, 2])).to_json()
        assert json.loads(canonical_json(found)) == found

    @pytest.mark.parametrize(
        ("changes", "words"),
        [
            ({"model": "other"}, "sweep of other, not of demo"),
            ({"pipeline": "FluxPipeline"}, "drawn by FluxPipeline"),
            ({"prompts": ["z"]}, "no picture in common"),
            ({"seeds": [99]}, "no picture in common"),
        ],
    )
    def test_a_baseline_that_cannot_be_compared(self, changes: dict[str, Any], words: str) -> None:
        with pytest.raises(SettingsError, match=words):
            drift(sweep_result(), sweep_result(**changes))
