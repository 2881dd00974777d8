"""What the key of a pipeline takes in beside its parts: whatever decides with which signatures they are called."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler

from helpers.pipelines import PlainPipeline, stable_diffusion
from pipevault.cache.keys import PartIdentity, build_key, pipeline_factors
from pipevault.cache.pipeline_cache import PipelineCache
from pipevault.calls.call import CallShape, resolve_shape
from pipevault.digest import Digest, canonical_json
from pipevault.graphs.inductor import BuildOptions
from pipevault.graphs.parts import find_parts
from pipevault.graphs.signature import CallSignature
from pipevault.key import Key


@pytest.fixture
def pipe(tmp_path: Path) -> Any:
    return stable_diffusion(tmp_path / "tokenizer")


def key_of(pipe: Any, **shape: Any) -> Key:
    resolved = resolve_shape(pipe, CallShape(**shape))
    return build_key(pipe, find_parts(pipe), resolved, backend="inductor", build=BuildOptions("bound", {}))


def differing(one: Key, other: Key) -> set[str]:
    return {difference.factor for difference in one.differences(other)}


def other_scheduler(pipe: Any) -> None:
    pipe.scheduler = EulerDiscreteScheduler()


def other_timesteps(pipe: Any) -> None:
    pipe.scheduler = DDIMScheduler(**{**pipe.scheduler.config, "timestep_spacing": "trailing"})


def shorter_prompts(pipe: Any) -> None:
    pipe.tokenizer.model_max_length = 8


def other_setting(pipe: Any) -> None:
    pipe.register_to_config(requires_safety_checker=True)


@pytest.mark.parametrize(
    ("change", "factor"),
    [
        (other_scheduler, "pipeline.components.scheduler.class"),
        (other_timesteps, "pipeline.components.scheduler.config.timestep_spacing"),
        (lambda pipe: pipe.vae.enable_tiling(), "pipeline.components.vae.use_tiling"),
        (lambda pipe: pipe.vae.enable_slicing(), "pipeline.components.vae.use_slicing"),
        (lambda pipe: setattr(pipe.vae, "tile_latent_min_size", 4), "pipeline.components.vae.tile_latent_min_size"),
        (
            lambda pipe: pipe.vae.register_to_config(force_upcast=False),
            "pipeline.components.vae.config.force_upcast",
        ),
        (shorter_prompts, "pipeline.components.tokenizer.model_max_length"),
        (other_setting, "pipeline.config.requires_safety_checker"),
        (lambda pipe: setattr(pipe, "tokenizer_max_length", 8), "pipeline.config.tokenizer_max_length"),
    ],
)
def test_what_decides_signatures_beside_the_parts_is_in_the_key(
    pipe: Any, change: Callable[[Any], None], factor: str
) -> None:
    before = key_of(pipe)
    change(pipe)
    assert factor in differing(before, key_of(pipe))


def test_autocast_in_force_is_in_the_key(pipe: Any) -> None:
    plain = key_of(pipe)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert differing(plain, key_of(pipe)) == {"call.autocast"}
    assert key_of(pipe) == plain


def test_two_prompts_are_not_one_prompt_drawn_twice(pipe: Any) -> None:
    twice = key_of(pipe, call={"num_images_per_prompt": 2})
    assert differing(key_of(pipe, batch_size=2), twice) == {"call.prompts", "call.images_per_prompt"}


def test_a_latent_output_is_in_the_key(pipe: Any) -> None:
    assert differing(key_of(pipe), key_of(pipe, call={"output_type": "latent"})) == {"call.output"}


def test_the_parts_share_their_graphs_across_all_of_these(pipe: Any) -> None:
    def shelves() -> dict[str, Digest]:
        build = BuildOptions("bound", {})
        device = torch.device("cpu")
        return {
            name: PartIdentity.of(module, device, backend="inductor", build=build).graph_key(CallSignature(())).shelf
            for name, module in find_parts(pipe).items()
        }

    before, key = shelves(), key_of(pipe)
    other_scheduler(pipe)
    pipe.vae.enable_tiling()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert key_of(pipe, call={"output_type": "latent", "num_images_per_prompt": 2}).digest != key.digest
        assert shelves() == before


def test_a_call_changes_nothing(pipe: Any) -> None:
    before = key_of(pipe)
    pipe.set_progress_bar_config(disable=True)
    pipe("a", num_inference_steps=2, output_type="np")
    assert differing(before, key_of(pipe)) == set()


def test_where_a_pipeline_came_from_does_not_count(pipe: Any) -> None:
    before = key_of(pipe)
    pipe.register_to_config(_name_or_path="/models/mine")
    pipe.vae.register_to_config(_name_or_path="/models/mine/vae", _diffusers_version="0.1")
    pipe.scheduler.register_to_config(_diffusers_version="0.1")
    assert differing(before, key_of(pipe)) == set()


def test_undone_tiling_gives_the_key_back(pipe: Any) -> None:
    before = key_of(pipe)
    pipe.vae.enable_tiling()
    pipe.vae.disable_tiling()
    assert key_of(pipe) == before


def test_settings_that_json_has_no_number_for(pipe: Any) -> None:
    pipe.scheduler = DPMSolverMultistepScheduler()
    config = key_of(pipe).factors["pipeline"]["components"]["scheduler"]["config"]
    assert config["lambda_min_clipped"] == "-inf"


def test_a_saved_and_loaded_pipeline_has_the_same_factors(pipe: Any, tmp_path: Path) -> None:
    pipe.scheduler = EulerDiscreteScheduler(trained_betas=(0.1, 0.2), steps_offset=1)
    pipe.save_pretrained(tmp_path / "saved")
    again = type(pipe).from_pretrained(tmp_path / "saved", local_files_only=True)
    assert differing(key_of(pipe), key_of(again)) == set()


@pytest.mark.parametrize("local", [False, True])
def test_a_guarded_pipeline_counts_as_its_own_class(pipe: Any, local: bool) -> None:
    pipe = PlainPipeline() if local else pipe
    before = key_of(pipe)
    original = type(pipe)

    @functools.wraps(original.__call__)
    def guarded(pipeline: Any, *args: Any, **kwargs: Any) -> Any: ...

    attributes = {"__call__": guarded, "_pipevault_original_class": original, "__module__": original.__module__}
    pipe.__class__ = type(original.__name__, (original,), attributes)
    assert differing(before, key_of(pipe)) == set()


def test_the_code_of_a_local_pipeline_counts() -> None:
    class Other(PlainPipeline):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return super().__call__(*args, **kwargs)

    first = pipeline_factors(PlainPipeline(), {})
    Other.__qualname__ = PlainPipeline.__qualname__
    second = pipeline_factors(Other(), {})
    assert first["class"] == second["class"]
    assert first["code"] != second["code"]


def test_the_class_is_the_first_factor_in_canonical_order(pipe: Any) -> None:
    factors = json.loads(canonical_json(key_of(pipe).factors["pipeline"]))
    assert next(iter(factors.values())) == (
        "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion.StableDiffusionPipeline"
    )


def test_a_pipeline_without_attributes() -> None:
    class Slotted:
        __slots__ = ()

    assert pipeline_factors(Slotted(), {})["components"] == {}


def test_a_cache_with_the_recorded_build_options_has_their_keys(pipe: Any, tmp_path: Path) -> None:
    tuned = PipelineCache(tmp_path / "vault", mode="require", compile_profile="max")
    other = PipelineCache(tmp_path / "vault", mode="require").with_build(tuned.build)
    part = next(iter(find_parts(pipe)))
    assert other.part_key(pipe, part) == tuned.part_key(pipe, part)
    assert other.part_key(pipe, part) != PipelineCache(tmp_path / "vault", mode="require").part_key(pipe, part)
