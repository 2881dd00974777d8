"""The arguments of every pipeline of diffusers have a role, and those of a batch go to the right samples."""

from __future__ import annotations

import inspect
import re
from typing import Any

import pytest
import torch

from helpers.diffusers_classes import generating_methods, parameters, pipeline_classes
from pipevault.calls import sample_roles
from pipevault.calls.sample_roles import ONE_PROMPT, ArgumentKind, class_names, role_of
from pipevault.calls.samples import Samples, samples_of, split
from pipevault.errors import UnplacedArgumentError

FOUND = [(cls, name, method) for cls in pipeline_classes() for name, method in generating_methods(cls).items()]
METHODS = [pytest.param(*found, id=f"{found[0].__name__}.{found[1]}") for found in FOUND]
NAMES = sorted({name for *_, method in FOUND for name in parameters(method)})

# Written down again and not taken from the table, so that a slip there is noticed.
PER_PROMPT = re.compile(
    r"(negative_)?prompt(_[234])?|source_prompt|task_prompt|content_prompt|lyrics"
    r"|(negative_)?(pooled_)?prompt_embeds(_2|_t5|_pooled|_mask|_mask_2|_qwen|_clip)?"
    r"|(negative_)?prompt_attention_mask(_2)?|(negative_)?attention_mask|class_labels"
)
PER_SAMPLE = re.compile(r"(audio_|prior_|decoder_|super_res_)?latents")
SHARED = re.compile(
    r"timesteps|sigmas|guidance_scale|true_cfg_scale|callback_on_step_end_tensor_inputs|skip_guidance_layers"
    r"|original_size|target_size|crops_coords_top_left|controlnet_conditioning_scale|control_guidance_start"
    r"|ip_adapter_image|ip_adapter_image_embeds|guidance_schedule|frame_ids|editing_prompt|gligen_phrases"
)
# What their entries are for was not found out, so several are refused.
UNPLACED = frozenset(
    """
    audio_duration audio_end_in_s audio_start_in_s bpm clip_latents conditioning_attention_mask conditioning_features
    duration fake_image_latents guidance_keyframe_latents guidance_latents id_cond id_vit_hidden image_latents
    images_and_prompts keyframes_latents keyscale kps_cond last_image_latents negative_index_latents
    negative_prompt_cu_seqlens negative_prompt_embeds_llama3 prompt_cu_seqlens prompt_embeds_llama3 prompt_latents
    device raw_audio reference_latents sana_latent sem_guidance state text_attention_mask text_images text_model_output
    timesignature vae_latents video_latents
    """.split()  # noqa: SIM905
)
SEVERAL = re.compile(r"[Ll]ist|[Tt]uple|[Dd]ict|Tensor|ndarray|Iterable|Sequence|Image|Video|Mapping|\bAny\b")
# Their prompts are segments, alternatives or no list at all; their latents stand for something else.
OTHERWISE = {*ONE_PROMPT, *sample_roles.MARIGOLD, "UniDiffuserPipeline"}


def may_be_several(parameter: inspect.Parameter) -> bool:
    """Whether a value of the argument can have entries, by its type hint or else its default."""
    if parameter.annotation is parameter.empty:
        return not isinstance(parameter.default, (bool, int, float, str))
    hint = str(parameter.annotation)
    return "Callable" not in hint and SEVERAL.search(hint) is not None


def named(param: Any) -> set[str]:
    return set(class_names(param.values[0]))


def takes_prompts(param: Any) -> bool:
    texts = {"prompt", "task_prompt"} & set(parameters(param.values[2]))
    return bool(texts) and not named(param) & {*ONE_PROMPT, "UniDiffuserPipeline"}


@pytest.mark.parametrize(("cls", "name", "method"), METHODS)
def test_every_argument_has_a_role(cls: type[Any], name: str, method: Any) -> None:
    unknown = {
        argument
        for argument, parameter in parameters(method).items()
        if role_of(argument, cls).kind is ArgumentKind.UNPLACED and may_be_several(parameter)
    }
    assert unknown - UNPLACED - set(sample_roles._OF_NAME) == set()


def test_the_walk_finds_what_there_is() -> None:
    assert len(pipeline_classes()) > 300
    assert len(NAMES) > 500


def test_every_class_that_the_table_names_exists() -> None:
    known = {"PyramidDiTForVideoGeneration", *(cls.__name__ for cls in pipeline_classes())}
    tables = (
        *(sample_roles._OF_CLASS, sample_roles.COUNTED_OF_CLASS, sample_roles.REPEATED_BY_EMBEDDINGS, ONE_PROMPT),
        *(sample_roles.TILED, sample_roles.ONE_FOR_EACH_MODE, sample_roles.NETS_WITHIN_PROMPTS, sample_roles.ADAPTERS),
    )
    assert {name for table in tables for name in table} - known == set()


def test_every_name_in_the_table_is_an_argument() -> None:
    assert {*sample_roles._OF_NAME, *UNPLACED} - set(NAMES) == set()


@pytest.mark.parametrize(("cls", "name", "method"), [param for param in METHODS if not named(param) & OTHERWISE])
def test_a_batch_of_three_is_divided_by_name(cls: type[Any], name: str, method: Any) -> None:
    given: dict[str, Any] = {}
    for argument in parameters(method):
        if PER_PROMPT.fullmatch(argument):
            embeds = "embeds" in argument or "mask" in argument
            given[argument] = torch.arange(6).reshape(3, 2) if embeds else [f"{argument} {i}" for i in range(3)]
        elif PER_SAMPLE.fullmatch(argument):
            given[argument] = torch.arange(12).reshape(3, 4)
        elif SHARED.fullmatch(argument):
            given[argument] = ["x", "y", "z"]
        elif argument == "generator":
            given[argument] = [torch.Generator().manual_seed(seed) for seed in range(3)]
    samples = Samples(3, 1)
    calls = split(given, samples, pipeline=cls, nets=1)
    assert len(calls) == 3
    for index, call in enumerate(calls):
        assert list(call) == list(given)
        for argument, value in given.items():
            if argument == "generator":
                assert call[argument] is value[index]
            elif SHARED.fullmatch(argument):
                assert call[argument] == value
            elif isinstance(value, torch.Tensor):
                assert torch.equal(call[argument], value[index : index + 1]), argument
            else:
                assert call[argument] == [value[index]], argument


@pytest.mark.parametrize(("cls", "name", "method"), [param for param in METHODS if takes_prompts(param)])
def test_prompts_and_repeats_are_counted(cls: type[Any], name: str, method: Any) -> None:
    accepted = parameters(method)
    text = "prompt" if "prompt" in accepted else "task_prompt"
    repeats = {argument: 2 for argument in sample_roles.REPEATS if argument in accepted}
    samples = samples_of({text: ["a", "b", "c"], **repeats}, accepted, pipeline=cls)
    assert (samples.prompts, samples.count) == (3, 3 * 2 ** len(repeats))
    assert samples_of({text: "a"}, accepted, pipeline=cls).count == 1


@pytest.mark.parametrize("argument", sorted(UNPLACED))
def test_what_cannot_be_placed_is_refused_by_name(argument: str) -> None:
    with pytest.raises(UnplacedArgumentError, match=f"^{argument} of ToyPipeline cannot be divided") as error:
        split({"prompt": ["a", "b", "c"], argument: [1, 2, 3]}, Samples(3, 1), pipeline="ToyPipeline", nets=1)
    assert error.value.argument == argument
    assert split({"prompt": ["a", "b"], argument: 1}, Samples(2, 1), pipeline="ToyPipeline", nets=1)[1][argument] == 1
