from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pipelines import PlainPipeline, stable_diffusion
from pipevault.errors import BadCallError
from pipevault.manager.call import CallShape, resolve_shape, shape_factors, warm_up_arguments


@pytest.fixture(scope="module")
def pipe(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return stable_diffusion(tmp_path_factory.mktemp("tokenizer"))


def factors(pipe: Any, **shape: Any) -> dict[str, Any]:
    return shape_factors(resolve_shape(pipe, CallShape(**shape)))


def test_defaults_are_filled_in_so_that_both_spellings_share_a_key(pipe: Any) -> None:
    assert factors(pipe) == factors(pipe, height=16, width=16, batch_size=1, guidance=True)
    assert factors(pipe)["height"] == 16


@pytest.mark.parametrize(
    "shape",
    [{"height": 32}, {"width": 32}, {"batch_size": 2}, {"guidance": False}, {"call": {"guidance_scale": 1.0}}],
)
def test_what_changes_a_signature_changes_the_factors(pipe: Any, shape: dict[str, Any]) -> None:
    assert factors(pipe, **shape) != factors(pipe)


@pytest.mark.parametrize(
    "call", [{"prompt": "x"}, {"num_inference_steps": 30}, {"negative_prompt": "y"}, {"guidance_scale": 3.0}]
)
def test_what_changes_values_alone_does_not(pipe: Any, call: dict[str, Any]) -> None:
    assert factors(pipe, call=call) == factors(pipe)


def test_sizes_and_batch_are_read_from_the_call(pipe: Any) -> None:
    read = factors(pipe, call={"prompt": ["a", "b"], "num_images_per_prompt": 2, "height": 32})
    assert (read["batch_size"], read["height"], read["width"]) == (4, 32, 16)


def test_further_arguments_count_by_their_kind(pipe: Any) -> None:
    image = Image.new("RGB", (16, 8))
    call = {"image": image, "latents": torch.zeros(1, 4, 8, 8), "mask": np.zeros((2, 2)), "clip_skip": 1}
    assert factors(pipe, call=call)["arguments"] == {
        "clip_skip": 1,
        "image": "RGB image 16x8",
        "latents": "torch.float32[1, 4, 8, 8]",
        "mask": "float64[2, 2]",
    }


def test_a_function_counts_by_its_code(pipe: Any) -> None:
    one = factors(pipe, call=lambda p: p("a"))
    other = factors(pipe, call=lambda p: p("b"))
    assert one["function"] != other["function"]


@pytest.mark.parametrize("shape", [{"height": 100}, {"width": 17}])
def test_a_size_that_the_vae_cannot_take_names_the_nearest_that_it_can(pipe: Any, shape: dict[str, int]) -> None:
    with pytest.raises(BadCallError, match=r"must be divisible by 8\. Use (96 or 104|16 or 24)"):
        factors(pipe, **shape)


@pytest.mark.parametrize("value", [0, -8, 1.5, "8", True])
def test_sizes_are_whole_numbers_above_zero(value: object) -> None:
    with pytest.raises(BadCallError, match="height must be a whole number"):
        CallShape(height=value)  # type: ignore[arg-type]


def test_warm_up_inputs_come_from_the_signature(pipe: Any) -> None:
    shape = resolve_shape(pipe, CallShape(batch_size=2, guidance=False))
    arguments = warm_up_arguments(pipe, shape)
    assert len(arguments["prompt"]) == 2
    assert arguments["guidance_scale"] == 1.0
    assert (arguments["height"], arguments["width"], arguments["output_type"]) == (16, 16, "np")
    assert "num_frames" not in arguments


def test_arguments_that_are_given_win(pipe: Any) -> None:
    shape = resolve_shape(pipe, CallShape(call={"num_inference_steps": 9, "output_type": "latent"}))
    arguments = warm_up_arguments(pipe, shape)
    assert (arguments["num_inference_steps"], arguments["output_type"]) == (9, "latent")


class NeedsImage(PlainPipeline):
    def __call__(self, prompt: str, image: Any, height: int = 8, width: int = 8) -> Any: ...


class NeedsPose(PlainPipeline):
    def __call__(self, prompt: str, pose: Any) -> Any: ...


def test_an_image_is_made_up_where_one_is_needed() -> None:
    arguments = warm_up_arguments(NeedsImage(), CallShape(height=8, width=16))
    assert arguments["image"].size == (16, 8)


def test_an_input_that_cannot_be_made_up_is_asked_for(tmp_path: Path) -> None:
    with pytest.raises(BadCallError, match="NeedsPose needs 'pose'"):
        warm_up_arguments(NeedsPose(), CallShape())
    assert warm_up_arguments(NeedsPose(), CallShape(call={"pose": 1}))["pose"] == 1


def test_a_call_of_another_kind_is_refused() -> None:
    with pytest.raises(BadCallError, match="mapping of keyword arguments or a function"):
        CallShape(call=3)  # type: ignore[arg-type]
