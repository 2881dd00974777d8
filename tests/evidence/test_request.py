"""What a person asks for, as a pipeline is loaded and called for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.pipelines import PlainPipeline, stable_diffusion
from pipevault.errors import BadCallError
from pipevault.evidence.request import Request, load_arguments

EMBEDS = [torch.zeros(4, 16)] * 2


def test_what_is_not_given_is_left_to_the_pipeline() -> None:
    assert Request(("a cat",)).call_arguments(PlainPipeline()) == {"prompt": "a cat"}
    assert Request(("a", "b"), steps=2).call_arguments(PlainPipeline()) == {
        "prompt": ["a", "b"],
        "num_inference_steps": 2,
    }


def test_the_demo_has_defaults_of_its_own() -> None:
    request = Request(("a",))
    assert request.with_defaults_of("./model") == request
    assert (request.with_defaults_of("demo").steps, request.with_defaults_of("demo").guidance_scale) == (12, 3.0)
    assert Request(("a",), steps=3).with_defaults_of("demo").steps == 3


@pytest.mark.parametrize("request_", [Request(("a",), num_frames=2), Request(("a",), arguments={"guidanse_scale": 2})])
def test_an_argument_that_the_pipeline_does_not_take(request_: Request, tmp_path: Path) -> None:
    for pipe in (PlainPipeline(), stable_diffusion(tmp_path / "tokenizer")):
        with pytest.raises(BadCallError, match="takes no"):
            request_.call_arguments(pipe)


@pytest.mark.parametrize(
    ("arguments", "loaded"),
    [
        ({"prompt": "a"}, {"batch_size": 1}),
        ({"prompt": ["a", "b"], "height": 8, "width": None}, {"batch_size": 2, "height": 8}),
        ({"prompt": "a", "guidance_scale": 1.0}, {"batch_size": 1, "guidance": False}),
        ({"prompt": "a", "guidance_scale": [1.0, 3.0]}, {"batch_size": 1, "guidance": True}),
        ({"batch_size": 3, "num_inference_steps": 9}, {"batch_size": 3}),
        ({"class_labels": [3, 7]}, {"batch_size": 2}),
        ({"prompt_embeds": EMBEDS}, {"batch_size": 2, "call": {"prompt_embeds": EMBEDS}}),
        ({"prompt": "a", "clip_skip": 1, "eta": 0.5}, {"batch_size": 1, "call": {"clip_skip": 1}}),
        ({"prompt": "a", "num_images_per_prompt": 2}, {"batch_size": 1, "call": {"num_images_per_prompt": 2}}),
        ({"prompt": "a", "output_type": "latent"}, {"batch_size": 1, "call": {"output_type": "latent"}}),
        ({"prompt": "a", "output_type": "np"}, {"batch_size": 1}),
    ],
)
def test_the_load_that_freezes_a_call(arguments: dict[str, Any], loaded: dict[str, Any]) -> None:
    assert load_arguments(arguments) == loaded


def test_the_load_of_a_pipeline_that_counts_its_images() -> None:
    images = [object(), object()]
    assert load_arguments({"image": images}, pipeline="StableVideoDiffusionPipeline")["batch_size"] == 2
    assert load_arguments({"image": images})["batch_size"] == 1
