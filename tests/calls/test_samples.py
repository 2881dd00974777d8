"""How many samples a call draws, and what goes with each of them."""

from __future__ import annotations

import functools
import inspect
from types import SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers.experimental import ValueGuidedRLPipeline
from PIL import Image

from families.build import FAMILIES
from families.contract import arrays, distance
from pipevault.calls.describe import describe
from pipevault.calls.samples import (
    Samples,
    count_nets,
    given_prompts,
    prompt_of_sample,
    recorded_samples,
    samples_of,
    split,
)
from pipevault.errors import BadCallError, UnplacedArgumentError

A, B, C = (Image.new("RGB", (8, 8), color) for color in ("red", "green", "blue"))
PICTURES = torch.arange(3.0).reshape(3, 1, 1, 1).expand(3, 3, 8, 8)
TEXTS = ["a", "b", "c"]
CONTROLNET = "StableDiffusionControlNetPipeline"
XL_CONTROLNET = "StableDiffusionXLControlNetPipeline"
UNION = "StableDiffusionXLControlNetUnionPipeline"


class Custom:
    """A pipeline whose class nobody knows."""

    def __call__(
        self, prompt: Any = "", num_images_per_prompt: int = 2, batch_size: int = 4, **options: Any
    ) -> Any: ...


ACCEPTED = inspect.signature(Custom.__call__).parameters


def of_samples(argument: str, value: Any, samples: Samples, pipeline: str = "", nets: int = 1) -> list[Any]:
    """The value of one argument for each sample."""
    return [call[argument] for call in split({argument: value}, samples, pipeline=pipeline, nets=nets)]


class TestCounting:
    @pytest.mark.parametrize(
        ("arguments", "prompts", "repeats"),
        [
            ({}, 1, 1),
            ({"prompt": "abc"}, 1, 1),
            ({"prompt": TEXTS}, 3, 1),
            ({"prompt": ("a", "b")}, 2, 1),
            ({"prompt": []}, 1, 1),
            ({"prompt": {0: "a", 8: "b", 16: "c"}}, 1, 1),
            ({"prompt": [{"scene": "a"}, {"scene": "b"}]}, 2, 1),
            ({"prompt": [["a", "b", "c"], ["d"]]}, 2, 1),
            ({"prompt_embeds": torch.zeros(3, 7, 5)}, 3, 1),
            ({"prompt_embeds": [torch.zeros(7, 5), torch.zeros(9, 5)]}, 2, 1),
            ({"prompt_embeds_qwen": torch.zeros(3, 7, 5)}, 3, 1),
            ({"pooled_prompt_embeds": torch.zeros(3, 5)}, 3, 1),
            ({"class_labels": [1, 2]}, 2, 1),
            ({"class_labels": torch.tensor([1, 2, 3])}, 3, 1),
            ({"class_labels": 207}, 1, 1),
            ({"batch_size": 3}, 3, 1),
            ({"prompt": TEXTS, "batch_size": 5}, 3, 1),
            ({"prompt": TEXTS, "timesteps": [9, 4]}, 3, 1),
            ({"messages": [{"role": "user"}, {"role": "assistant"}]}, 1, 1),
            ({"messages": [[{"role": "user"}], [{"role": "user"}]]}, 2, 1),
            ({"prompt": TEXTS, "num_images_per_prompt": 2}, 3, 2),
            ({"prompt": "a", "num_videos_per_prompt": np.int64(2)}, 1, 2),
            ({"prompt": "a", "num_waveforms_per_prompt": 4}, 1, 4),
            ({"prompt": "a", "num_images_per_prompt": None}, 1, 1),
            ({"image": [A, B, C]}, 1, 1),
        ],
    )
    def test_of_any_pipeline(self, arguments: dict[str, Any], prompts: int, repeats: int) -> None:
        samples = samples_of(arguments)
        assert (samples.prompts, samples.repeats, samples.count) == (prompts, repeats, prompts * repeats)

    @pytest.mark.parametrize(
        ("pipeline", "arguments", "count"),
        [
            ("StableVideoDiffusionPipeline", {"image": [A, B, C], "num_videos_per_prompt": 2}, 6),
            ("StableVideoDiffusionPipeline", {"image": A}, 1),
            ("StableVideoDiffusionPipeline", {"image": PICTURES}, 3),
            ("StableVideoDiffusionPipeline", {"image": PICTURES[0]}, 1),
            ("StableDiffusionImageVariationPipeline", {"image": [PICTURES[:1], PICTURES[1:]]}, 3),
            ("StableUnCLIPImg2ImgPipeline", {"image": [A, B]}, 2),
            ("StableDiffusionUpscalePipeline", {"prompt": ["a", "b"], "image": [A, B]}, 2),
            ("MarigoldDepthPipeline", {"image": [A, B], "batch_size": 4}, 2),
            ("MarigoldDepthPipeline", {"image": A, "ensemble_size": 5}, 5),
            ("LDMSuperResolutionPipeline", {"image": PICTURES, "batch_size": 1}, 3),
            ("KandinskyV22Pipeline", {"image_embeds": torch.zeros(3, 5)}, 3),
            ("KandinskyV22Pipeline", {"image_embeds": [torch.zeros(1, 5), torch.zeros(2, 5)]}, 3),
            ("KandinskyV22PriorEmb2EmbPipeline", {"prompt": ["a", "b"], "image": torch.zeros(2, 5)}, 2),
            ("Kandinsky6SRPipeline", {"video": [A, B, C]}, 1),
            ("Kandinsky6SRPipeline", {"video": [[A, B, C], [A, B, C]]}, 2),
            ("LTXLatentUpsamplePipeline", {"latents": torch.zeros(3, 1, 1, 1, 1)}, 3),
            ("LTXLatentUpsamplePipeline", {"video": [A, B, C]}, 1),
            ("LTXI2VLongMultiPromptPipeline", {"prompt": TEXTS}, 1),
            ("Cosmos3OmniPipeline", {"prompt": ["a"]}, 1),
            ("DreamLitePipeline", {"prompt": "a", "num_images_per_prompt": 2}, 2),
            ("FluxPriorReduxPipeline", {"image": [A, B, C]}, 1),
            ("VisualClozePipeline", {"task_prompt": ["a", "b"], "content_prompt": ["c", None]}, 2),
            ("StableCascadeDecoderPipeline", {"prompt": "a", "image_embeddings": torch.zeros(4, 16, 24, 24)}, 4),
            ("StableCascadeDecoderPipeline", {"prompt": TEXTS, "image_embeddings": torch.zeros(6, 16, 24, 24)}, 6),
            ("ConsistencyModelPipeline", {"class_labels": [1, 2], "batch_size": 2}, 2),
            ("DiTPipeline", {"class_labels": [1, 2]}, 2),
            ("UniDiffuserPipeline", {"prompt": TEXTS, "num_images_per_prompt": 2, "num_prompts_per_image": 5}, 6),
            ("UniDiffuserPipeline", {"image": A, "num_images_per_prompt": 5, "num_prompts_per_image": 2}, 2),
            ("UniDiffuserPipeline", {"num_images_per_prompt": 3, "num_prompts_per_image": 2}, 2),
        ],
    )
    def test_of_pipelines_that_count_otherwise(self, pipeline: str, arguments: dict[str, Any], count: int) -> None:
        assert samples_of(arguments, pipeline=pipeline).count == count

    def test_defaults_of_the_signature_count(self) -> None:
        assert samples_of({}, ACCEPTED).count == 8
        assert samples_of({"prompt": TEXTS}, ACCEPTED).count == 6
        assert samples_of({"prompt": TEXTS, "num_images_per_prompt": 1}, ACCEPTED).count == 3
        assert samples_of({"batch_size": None, "num_images_per_prompt": None}, ACCEPTED).count == 1
        rl = inspect.signature(ValueGuidedRLPipeline.__call__).parameters
        assert samples_of({}, rl, pipeline="ValueGuidedRLPipeline").count == 1

    @pytest.mark.parametrize("repeats", [0, -1, 1.5, "2", True])
    def test_a_count_that_is_none_is_refused(self, repeats: Any) -> None:
        with pytest.raises(BadCallError, match="num_images_per_prompt must be a whole number above 0"):
            samples_of({"prompt": "a", "num_images_per_prompt": repeats})

    def test_a_class_counts_as_its_base_does(self) -> None:
        class Mine(diffusers.StableVideoDiffusionPipeline):
            pass

        assert samples_of({"image": [A, B]}, pipeline=Mine).count == 2

    def test_prompts_that_are_listed(self) -> None:
        assert given_prompts({"prompt": ["a"]}) == 1
        assert given_prompts({"prompt": "a"}) is None
        assert given_prompts({"batch_size": 3}) is None


class TestByName:
    def test_a_schedule_of_as_many_entries_as_prompts_is_no_pair(self) -> None:
        arguments = {
            "prompt": TEXTS,
            "timesteps": [9.0, 4.0, 1.0],
            "sigmas": torch.tensor([3.0, 2.0, 1.0]),
            "guidance_scale": [1.0, 2.0, 3.0],
            "ip_adapter_image": [A, B, C],
            "conditioning_scale": torch.ones(3),
            "callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds", "noise_pred"],
        }
        calls = split(arguments, Samples(3, 1), nets=1)
        assert len(calls) == 3
        for index, call in enumerate(calls):
            assert call.pop("prompt") == [TEXTS[index]]
            assert all(call[name] is arguments[name] or call[name] == arguments[name] for name in call)

    def test_each_prompt_is_drawn_repeatedly_before_the_next(self) -> None:
        latents = torch.arange(6.0).reshape(6, 1)
        generators = [torch.Generator().manual_seed(seed) for seed in range(6)]
        arguments = {
            "prompt": TEXTS,
            "negative_prompt": ("x", "y", "z"),
            "negative_prompt_embeds": PICTURES,
            "prompt_attention_mask": [torch.zeros(4), torch.ones(4), torch.ones(5)],
            "num_images_per_prompt": 2,
            "latents": latents,
            "generator": generators,
        }
        calls = split(arguments, samples_of(arguments), nets=1)
        assert [call["prompt"] for call in calls] == [["a"], ["a"], ["b"], ["b"], ["c"], ["c"]]
        assert [call["negative_prompt"] for call in calls] == [("x",), ("x",), ("y",), ("y",), ("z",), ("z",)]
        assert [call["negative_prompt_embeds"].mean().item() for call in calls] == [0, 0, 1, 1, 2, 2]
        assert [len(call["prompt_attention_mask"][0]) for call in calls] == [4, 4, 4, 4, 5, 5]
        assert [call["latents"].item() for call in calls] == [0, 1, 2, 3, 4, 5]
        assert [call["generator"] for call in calls] == generators
        assert {call["num_images_per_prompt"] for call in calls} == {1}

    def test_one_prompt_drawn_repeatedly_stays_whole(self) -> None:
        assert of_samples("prompt", ["a"], Samples(1, 3)) == [["a"]] * 3
        assert of_samples("prompt", "a", Samples(1, 3)) == ["a"] * 3
        assert of_samples("prompt", {0: "a", 8: "b"}, Samples(1, 2)) == [{0: "a", 8: "b"}] * 2

    def test_counts_become_1_also_those_of_the_signature(self) -> None:
        assert of_samples("batch_size", 3, Samples(3, 1)) == [1, 1, 1]
        calls = split({"prompt": TEXTS}, samples_of({"prompt": TEXTS}, ACCEPTED), nets=1)
        assert len(calls) == 6
        assert calls[5] == {"prompt": ["c"], "num_images_per_prompt": 1, "batch_size": 1}

    def test_a_single_sample_is_the_call_itself(self) -> None:
        arguments = {"prompt": ["a"], "mystery": [1, 2, 3], "num_images_per_prompt": 1}
        assert split(arguments, Samples(1, 1), nets=1) == [arguments]

    def test_one_generator_draws_for_all(self) -> None:
        generator = torch.Generator()
        assert of_samples("generator", generator, Samples(3, 1)) == [generator] * 3

    def test_a_single_entry_is_for_all(self) -> None:
        assert of_samples("negative_prompt", ["x"], Samples(3, 1)) == [["x"]] * 3
        embeds = torch.zeros(1, 7, 5)
        assert all(one is embeds for one in of_samples("negative_prompt_embeds", embeds, Samples(3, 1)))

    def test_pipelines_that_draw_all_prompts_before_they_repeat_any(self) -> None:
        arguments = {"prompt": TEXTS, "num_images_per_prompt": 2}
        calls = split(arguments, samples_of(arguments, pipeline="AmusedPipeline"), pipeline="AmusedPipeline", nets=1)
        assert [call["prompt"][0] for call in calls] == ["a", "b", "c", "a", "b", "c"]

    def test_each_call_has_lists_of_its_own(self) -> None:
        """Z-Image writes chat templates into the list of prompts, others take entries out of dictionaries."""
        arguments = {"prompt": ["a"], "image": [A], "cross_attention_kwargs": {"scale": 0.5}, "sigmas": [1.0]}
        first, second = split(arguments, Samples(1, 2), nets=1)
        first["prompt"][0] = "changed"
        first["image"].clear()
        first["cross_attention_kwargs"].pop("scale")
        first["sigmas"].clear()
        assert (
            second
            == arguments
            == {
                "prompt": ["a"],
                "image": [A],
                "cross_attention_kwargs": {"scale": 0.5},
                "sigmas": [1.0],
            }
        )

    @pytest.mark.parametrize(
        ("argument", "value", "numbers"),
        [
            ("prompt_2", ["a", "b"], "2 entries for 3 prompts"),
            ("negative_prompt_embeds", torch.zeros(6, 4, 4), "6 entries for 3 prompts"),
            ("image", [A, B], "2 entries for 3 prompts"),
            ("latents", torch.zeros(1, 4), "1 entry for 3 samples"),
            ("latents", torch.zeros(2, 4), "2 entries for 3 samples"),
            ("generator", [torch.Generator()], "1 entry for 3 samples"),
        ],
    )
    def test_another_number_of_entries_is_refused_with_both_numbers(
        self, argument: str, value: Any, numbers: str
    ) -> None:
        with pytest.raises(BadCallError, match=f"^{argument} has {numbers}"):
            of_samples(argument, value, Samples(3, 1))


class TestUnknownNames:
    @pytest.mark.parametrize(
        "value", [None, 3, 0.5, True, "text", print, torch.tensor(2.0), np.float32(1), A, {"a": 1}]
    )
    def test_one_value_is_for_all(self, value: Any) -> None:
        assert all(one is value or one == value for one in of_samples("mystery", value, Samples(3, 1)))

    @pytest.mark.parametrize("value", [[1, 2, 3], (1,), torch.zeros(3), np.zeros(1), {1, 2}, {"a": {"b": [1]}}, []])
    def test_several_cannot_be_placed(self, value: Any) -> None:
        with pytest.raises(
            UnplacedArgumentError, match=r"^mystery of Custom cannot be divided among 3 samples"
        ) as error:
            split({"mystery": value}, Samples(3, 1), pipeline=Custom, nets=1)
        assert error.value.argument == "mystery"
        assert isinstance(error.value, BadCallError)


class TestPictures:
    @pytest.mark.parametrize("argument", ["image", "mask_image", "last_image", "control_image"])
    def test_a_list_is_for_the_prompts(self, argument: str) -> None:
        assert of_samples(argument, [A, B, C], Samples(3, 1)) == [[A], [B], [C]]
        assert of_samples(argument, A, Samples(3, 1)) == [A, A, A]
        assert of_samples(argument, [A], Samples(3, 1)) == [[A]] * 3

    def test_a_tensor_of_three_dimensions_is_one_picture(self) -> None:
        assert all(one.shape == (3, 8, 8) for one in of_samples("image", PICTURES[0], Samples(3, 1)))
        assert [one.mean().item() for one in of_samples("image", PICTURES, Samples(3, 1))] == [0, 1, 2]
        assert [one[0].mean().item() for one in of_samples("image", list(PICTURES), Samples(3, 1))] == [0, 1, 2]
        array = np.zeros((3, 8, 3))
        assert all(one is array for one in of_samples("image", array, Samples(3, 1)))

    def test_a_mask_of_three_dimensions_is_a_batch(self) -> None:
        masks = torch.arange(3.0).reshape(3, 1, 1).expand(3, 8, 8)
        assert [one.mean().item() for one in of_samples("mask_image", masks, Samples(3, 1))] == [0, 1, 2]
        assert all(one.shape == (8, 8) for one in of_samples("mask_image", masks[0], Samples(3, 1)))

    def test_frames_are_no_batch(self) -> None:
        assert of_samples("video", [A, B, C], Samples(3, 1)) == [[A, B, C]] * 3
        assert of_samples("video", [[A], [B], [C]], Samples(3, 1)) == [[[A]], [[B]], [[C]]]

    @pytest.mark.parametrize(
        ("pipeline", "argument"),
        [
            ("Flux2Pipeline", "image"),
            ("QwenImageEditPlusPipeline", "image"),
            ("QwenImage21Pipeline", "image"),
            ("ZImageOmniPipeline", "image"),
            ("LTXConditionPipeline", "image"),
            ("StableCascadePriorPipeline", "images"),
            ("AnimateDiffSparseControlNetPipeline", "conditioning_frames"),
        ],
    )
    def test_references_are_for_all(self, pipeline: str, argument: str) -> None:
        assert of_samples(argument, [A, B, C], Samples(3, 1), pipeline) == [[A, B, C]] * 3

    @pytest.mark.parametrize(
        ("pipeline", "argument"),
        [("GlmImagePipeline", "image"), ("OmniGenPipeline", "input_images"), ("JoyImageEditPlusPipeline", "images")],
    )
    def test_references_of_each_prompt(self, pipeline: str, argument: str) -> None:
        assert of_samples(argument, [[A, B], [B], [C]], Samples(3, 1), pipeline) == [[[A, B]], [[B]], [[C]]]
        assert of_samples(argument, [A, B, C], Samples(1, 3), pipeline) == [[A, B, C]] * 3
        with pytest.raises(UnplacedArgumentError, match="one list is given for 3 prompts"):
            of_samples(argument, [A, B, C], Samples(3, 1), pipeline)

    def test_rows_of_examples(self) -> None:
        rows = [[[A, B], [C, None]], [[B, A], [C, None]]]
        given = of_samples("image", rows, Samples(2, 1), "VisualClozePipeline")
        assert given == [[rows[0]], [rows[1]]]

    def test_embeddings_of_a_first_and_a_last_image_are_one_set(self) -> None:
        embeds = torch.zeros(2, 7, 5)
        assert all(
            one is embeds for one in of_samples("image_embeds", embeds, Samples(2, 1), "WanImageToVideoPipeline")
        )
        given = of_samples("image_embeds", torch.arange(4.0).reshape(2, 2), Samples(2, 1), "KandinskyV22Pipeline")
        assert [one.tolist() for one in given] == [[[0.0, 1.0]], [[2.0, 3.0]]]

    def test_a_list_of_batches_cannot_be_told_apart(self) -> None:
        with pytest.raises(UnplacedArgumentError, match="list of batches"):
            of_samples("image", [PICTURES[:2], PICTURES[2:]], Samples(3, 1))
        with pytest.raises(UnplacedArgumentError, match="list of batches"):
            of_samples("prompt_embeds", [torch.zeros(3, 7, 5)], Samples(3, 1))

    def test_several_pictures_and_several_repeats(self) -> None:
        """img2img pairs picture i modulo their number, IF and ControlNets repeat each picture with its prompt."""
        with pytest.raises(UnplacedArgumentError, match="differ in how they repeat"):
            of_samples("image", [A, B], Samples(2, 2), "StableDiffusionImg2ImgPipeline")
        assert of_samples("image", [A, B], Samples(2, 2), "IFImg2ImgPipeline") == [[A], [A], [B], [B]]
        assert of_samples("control_image", [A, B], Samples(2, 2), "FluxControlPipeline") == [[A], [A], [B], [B]]
        assert of_samples("image", A, Samples(2, 2), "StableDiffusionImg2ImgPipeline") == [A] * 4

    def test_pictures_of_modular_pipelines_mean_what_their_blocks_say(self) -> None:
        with pytest.raises(UnplacedArgumentError):
            of_samples("image", [A, B, C], Samples(3, 1), "Flux2ModularPipeline")

    def test_an_ensemble_makes_one_result(self) -> None:
        samples = samples_of({"image": A, "ensemble_size": 3}, pipeline="MarigoldDepthPipeline")
        with pytest.raises(UnplacedArgumentError, match="make one result together"):
            split({"image": A, "ensemble_size": 3}, samples, pipeline="MarigoldDepthPipeline", nets=1)


class TestControlNets:
    def test_one_net_has_a_picture_for_each_prompt(self) -> None:
        assert of_samples("image", [A, B, C], Samples(3, 1), CONTROLNET, nets=1) == [[A], [B], [C]]

    def test_several_nets_have_one_each(self) -> None:
        assert of_samples("image", [A, B], Samples(2, 1), CONTROLNET, nets=2) == [[A, B], [A, B]]
        assert of_samples("image", [A, [B, C]], Samples(2, 1), XL_CONTROLNET, nets=2) == [[A, [B]], [A, [C]]]
        first, second = of_samples("image", [A, PICTURES[:2]], Samples(2, 1), XL_CONTROLNET, nets=2)
        assert (first[1].mean().item(), second[1].mean().item()) == (0, 1)

    def test_nested_lists_are_for_prompts_first_in_stable_diffusion(self) -> None:
        assert of_samples("image", [[A, B], [C, A]], Samples(2, 1), CONTROLNET) == [[[A, B]], [[C, A]]]

    def test_a_union_has_one_for_each_mode(self) -> None:
        assert of_samples("control_image", [A, B], Samples(2, 1), UNION, nets=1) == [[A, B], [A, B]]
        with pytest.raises(UnplacedArgumentError, match="control modes"):
            of_samples("control_image", [[A, B], C], Samples(2, 1), UNION, nets=2)

    def test_nets_are_counted(self) -> None:
        assert count_nets(SimpleNamespace()) == 1
        assert count_nets(SimpleNamespace(controlnet=torch.nn.Linear(1, 1))) == 1
        assert count_nets(SimpleNamespace(controlnet=[1, 2])) == 2
        several = diffusers.MultiControlNetModel([torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)])
        assert count_nets(SimpleNamespace(controlnet=several)) == 2
        adapters = diffusers.MultiAdapter([diffusers.T2IAdapter(channels=[32, 32, 32, 32]) for _ in range(3)])
        assert count_nets(SimpleNamespace(adapter=adapters)) == 3


class TestRecords:
    @pytest.mark.parametrize(
        ("arguments", "pipeline", "count"),
        [
            ({"prompt": ("a", "b"), "num_images_per_prompt": 2}, "", 4),
            ({"prompt_embeds": torch.zeros(3, 7, 5)}, "", 3),
            ({"prompt_embeds": [torch.zeros(7, 5)] * 2}, "", 2),
            ({"class_labels": np.array([1, 2])}, "", 2),
            ({"image": [A, B]}, "StableVideoDiffusionPipeline", 2),
            ({"image": PICTURES}, "StableVideoDiffusionPipeline", 3),
            ({"image": np.zeros((8, 8, 3))}, "StableVideoDiffusionPipeline", 1),
        ],
    )
    def test_a_recorded_call_counts_as_the_call_did(self, arguments: dict[str, Any], pipeline: str, count: int) -> None:
        recorded = {name: describe(value) for name, value in arguments.items()}
        assert recorded_samples(recorded, pipeline=pipeline) == samples_of(arguments, pipeline=pipeline)
        assert recorded_samples(recorded, pipeline=pipeline).count == count

    @pytest.mark.parametrize(
        "call",
        [
            {"prompt": ["a", "b"], "num_images_per_prompt": "many"},
            {"prompt": ["a", "b"], "num_images_per_prompt": {"kind": "tensor", "shape": None}},
            {"prompt": None, "prompt_embeds": {"kind": "tensor", "shape": ["x"]}, "class_labels": [1, 2]},
        ],
    )
    def test_a_record_that_makes_no_sense_counts_what_does(self, call: dict[str, Any]) -> None:
        assert recorded_samples(call).count == 2

    def test_the_prompt_of_a_sample(self) -> None:
        call = {"prompt": ["a", "b"], "negative_prompt": "x", "num_images_per_prompt": 2, "prompt_2": [["chat"], "d"]}
        of = functools.partial(prompt_of_sample, call)
        assert [of("prompt", index, 4) for index in range(4)] == ["a", "a", "b", "b"]
        assert [of("prompt", index, 4, pipeline="AmusedPipeline") for index in range(4)] == ["a", "b", "a", "b"]
        assert of("prompt", 5, 6) == "b"
        assert of("prompt", 2, 3) == "b"
        assert (of("negative_prompt", 3, 4), of("prompt_2", 0, 4), of("prompt_3", 0, 4)) == ("x", "", "")


def generators(count: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(100 + index) for index in range(count)]


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("sd15", {"prompt": ["a cat", "red sun"], "negative_prompt": ["a dog", "fog"], "num_images_per_prompt": 2}),
        ("flux", {"prompt": ["a cat", "red sun"], "sigmas": [1.0, 0.3], "num_inference_steps": 2}),
        ("sd15_img2img", {"prompt": ["a cat", "red sun"], "image": [A.resize((16, 16)), C.resize((16, 16))]}),
        ("sd_controlnet", {"prompt": ["a cat", "red sun"], "image": [A, C], "num_images_per_prompt": 2}),
        ("sdxl_t2i_adapter", FAMILIES["sdxl_t2i_adapter"].variations["batch_2"]),
        ("z_image", {"prompt": ["a cat", "red sun"], "num_images_per_prompt": 2}),
        ("kandinsky22_combined", {"prompt": ["a cat", "red sun"], "num_images_per_prompt": 2}),
        ("svd", FAMILIES["svd"].variations["batch_2"]),
        ("stable_audio", {"prompt": ["a cat", "red sun"], "num_waveforms_per_prompt": 2}),
        ("dit", {"class_labels": [3, 7]}),
        ("ddpm", {"batch_size": 2}),
    ],
)
def test_samples_drawn_one_by_one_are_those_of_the_batch(family: str, changes: dict[str, Any]) -> None:
    pipe, call = FAMILIES[family].make(), {**FAMILIES[family].call, **changes}
    accepted = inspect.signature(type(pipe).__call__).parameters
    samples = samples_of(call, accepted, pipeline=type(pipe))
    singles = split(
        {**call, "generator": generators(samples.count)}, samples, pipeline=type(pipe), nets=count_nets(pipe)
    )
    with torch.no_grad():
        batch = arrays(pipe(**call, generator=generators(samples.count)))
        alone = np.concatenate([arrays(pipe(**single)) for single in singles])
    assert distance(alone, batch) < 1e-3
    assert distance(np.roll(alone, 1, axis=0), batch) > 1e-2
