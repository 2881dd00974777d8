from __future__ import annotations

import functools
import json
import operator
import subprocess
import sys
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from helpers.pipelines import PlainPipeline, stable_diffusion
from pipevault.calls.call import CallShape, described, parameters, resolve_shape, shape_factors, warm_up_arguments
from pipevault.calls.call_shapes import asked_shape, call_shapes
from pipevault.digest import digest_json
from pipevault.errors import BadCallError


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
    call = {
        "ip_adapter_image": [image],
        "latents": torch.zeros(1, 4, 8, 8),
        "cross_attention_kwargs": {"mask": np.zeros((2, 2))},
        "clip_skip": 1,
    }
    assert factors(pipe, call=call)["arguments"] == {
        "clip_skip": 1,
        "cross_attention_kwargs": {"mask": "float64[2, 2]"},
        "ip_adapter_image": ["RGB image 16x8"],
        "latents": "torch.float32[1, 4, 8, 8]",
    }


STEPS = {"num_inference_steps": 2}


def with_size(size: Any) -> Callable[[Any], Any]:
    return lambda p: p("a", height=size)


def with_options(**options: Any) -> Callable[[Any], Any]:
    def draw(p: Any) -> Any:
        return p("a", **options)

    return draw


def nested(size: Any) -> Callable[[Any], Any]:
    return lambda p: (lambda: p("a", height=size))()


def draw(p: Any, height: int = 8, options: Any = None) -> Any:
    return p("a", height=height, **STEPS)


class Drawing:
    def __init__(self, size: int, options: Any = None) -> None:
        self.size = size
        self.options = options

    def __call__(self, p: Any) -> Any:
        return p("a", height=self.size)

    def by_name(self, p: Any) -> Any:
        return p("a", height=self.size)


class WideDrawing(Drawing):
    def __call__(self, p: Any) -> Any:
        return p("a", width=self.size)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        pytest.param(lambda p: p("a"), lambda p: p("b"), id="constant"),
        pytest.param(lambda p: p.first(), lambda p: p.second(), id="method name"),
        pytest.param(lambda p: (lambda: p("a"))(), lambda p: (lambda: p("b"))(), id="nested code"),
        pytest.param(lambda p, size=8: p(size), lambda p, size=16: p(size), id="default"),
        pytest.param(lambda p, o={"h": 8}: p(**o), lambda p, o={"h": 16}: p(**o), id="default mapping"),
        pytest.param(with_size(8), with_size(16), id="closure"),
        pytest.param(nested(8), nested(16), id="closure of nested code"),
        pytest.param(with_options(height=8), with_options(height=16), id="closure over a mapping"),
        pytest.param(with_options(call=with_size(8)), with_options(call=with_size(16)), id="closure over a closure"),
        pytest.param(functools.partial(draw, height=8), functools.partial(draw, height=16), id="partial keyword"),
        pytest.param(functools.partial(draw), functools.partial(Drawing(8)), id="partial function"),
        pytest.param(operator.methodcaller("a"), functools.partial(draw), id="other kinds"),
        pytest.param(Drawing(8), Drawing(16), id="object value"),
        pytest.param(Drawing(8, {"a": 1}), Drawing(8, {"a": 2}), id="object mapping"),
        pytest.param(Drawing(8), WideDrawing(8), id="object class"),
        pytest.param(Drawing(8).by_name, Drawing(16).by_name, id="bound method's object"),
        pytest.param(Drawing(8).by_name, Drawing(8).__call__, id="bound method"),
    ],
)
def test_functions_that_can_call_otherwise_differ(pipe: Any, one: Any, other: Any) -> None:
    assert factors(pipe, call=one)["function"] != factors(pipe, call=other)["function"]


@pytest.mark.parametrize(
    "make",
    [
        lambda: with_size(8),
        lambda: nested(torch.zeros(2)),
        lambda: functools.partial(draw, height=8, options={"image": object()}),
        lambda: Drawing(8, torch.zeros(2)),
        lambda: Drawing(8).by_name,
    ],
)
def test_the_same_function_made_again_is_the_same(pipe: Any, make: Callable[[], Any]) -> None:
    assert factors(pipe, call=make()) == factors(pipe, call=make())


def test_a_global_that_a_function_reads_counts(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    before = factors(pipe, call=draw)
    monkeypatch.setitem(STEPS, "num_inference_steps", 3)
    assert factors(pipe, call=draw) != before


def test_a_function_that_holds_itself(pipe: Any) -> None:
    def again(p: Any) -> Any:
        return again

    assert factors(pipe, call=again) == factors(pipe, call=again)


def test_a_function_is_the_same_in_every_process() -> None:
    program = (
        "from pipevault.calls.call import CallShape, shape_factors\n"
        "call = lambda p: [(lambda x: p(x, kind={'a', 'b', 'c'}))(y) for y in range(3)]\n"
        "print(shape_factors(CallShape(call=call))['function'])"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", program],
            check=True,
            capture_output=True,
            text=True,
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(filter(None, sys.path))},
        ).stdout
        for seed in ("1", "2")
    }
    assert len(outputs) == 1


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
    def __call__(self, prompt: str, image: Any, height: int = 8, width: int = 8) -> Any: ...  # type: ignore[override]


class NeedsPose(PlainPipeline):
    def __call__(self, prompt: str, pose: Any) -> Any: ...  # type: ignore[override]


def test_an_image_is_made_up_where_one_is_needed() -> None:
    arguments = warm_up_arguments(NeedsImage(), CallShape(height=8, width=16))
    assert arguments["image"].size == (16, 8)


def test_an_input_that_cannot_be_made_up_is_asked_for(tmp_path: Path) -> None:
    with pytest.raises(BadCallError, match="NeedsPose needs 'pose'"):
        warm_up_arguments(NeedsPose(), CallShape())
    assert warm_up_arguments(NeedsPose(), CallShape(call={"pose": 1}))["pose"] == 1


@pytest.mark.parametrize(
    ("call", "options", "prompts", "batch_size"),
    [
        ({"num_images_per_prompt": 2}, {}, "a", 2),
        ({"num_images_per_prompt": 2}, {"batch_size": 3}, ["a"] * 3, 6),
        ({"num_images_per_prompt": None}, {"batch_size": 2}, ["a"] * 2, 2),
        ({"num_images_per_prompt": 2, "prompt": ["x", "y"]}, {}, ["x", "y"], 4),
        ({"prompt": "x", "negative_prompt": "z"}, {"batch_size": 2}, ["x", "x"], 2),
    ],
)
def test_the_warm_up_has_the_batch_that_the_key_names(
    pipe: Any, call: dict[str, Any], options: dict[str, Any], prompts: Any, batch_size: int
) -> None:
    shape = resolve_shape(pipe, CallShape(call=call, **options))
    arguments = warm_up_arguments(pipe, shape)
    assert shape.batch_size == batch_size
    assert arguments["prompt"] == prompts
    assert arguments.get("num_images_per_prompt") == call.get("num_images_per_prompt")
    if "negative_prompt" in call:
        assert arguments["negative_prompt"] == ["z", "z"]
    read = shape_factors(shape)
    assert read["prompts"] * read["images_per_prompt"] == batch_size


@pytest.mark.parametrize("embeds", [torch.zeros(3, 16, 16), [torch.zeros(4, 16)] * 3])
def test_the_batch_is_read_from_prompt_embeds(pipe: Any, embeds: Any) -> None:
    shape = resolve_shape(pipe, CallShape(call={"prompt_embeds": embeds, "num_images_per_prompt": 2}))
    assert (shape.batch_size, shape_factors(shape)["prompts"]) == (6, 3)
    assert "prompt" not in warm_up_arguments(pipe, shape)


@pytest.mark.parametrize("repeats", [0, -1, 1.5, "2", True])
def test_images_per_prompt_is_a_whole_number_above_zero(pipe: Any, repeats: object) -> None:
    with pytest.raises(BadCallError, match="num_images_per_prompt must be a whole number above 0"):
        factors(pipe, call={"num_images_per_prompt": repeats})


@pytest.mark.parametrize(
    "shape",
    [
        {"height": 16, "call": {"height": 32}},
        {"width": 16, "call": {"width": 32}},
        {"batch_size": 3, "call": {"prompt": ["x", "y"]}},
        {"guidance": False, "call": {"guidance_scale": 4.0}},
    ],
)
def test_two_values_for_one_thing_are_refused(pipe: Any, shape: dict[str, Any]) -> None:
    with pytest.raises(BadCallError, match="which disagrees with"):
        factors(pipe, **shape)


def test_a_guidance_scale_that_is_no_number_is_refused(pipe: Any) -> None:
    with pytest.raises(BadCallError, match="guidance_scale must be a number"):
        factors(pipe, call={"guidance_scale": "much"})


def test_a_latent_output_is_a_factor_and_other_outputs_are_one(pipe: Any) -> None:
    latent = factors(pipe, call={"output_type": "latent"})
    assert latent != factors(pipe)
    assert factors(pipe, call={"output_type": "pt"}) == factors(pipe)


def test_a_callback_counts_for_it_can_change_what_runs(pipe: Any) -> None:
    one = factors(pipe, call={"callback_on_step_end": lambda p, i, t, kwargs: kwargs})
    assert one != factors(pipe)
    assert one != factors(pipe, call={"callback_on_step_end": lambda p, i, t, kwargs: {}})


@pytest.mark.parametrize("value", [float("inf"), torch.float16, {1, 2}, {1: "a", "b": 2}, np.float32(2)])
def test_any_argument_has_a_json_form(pipe: Any, value: Any) -> None:
    assert digest_json(factors(pipe, call={"cross_attention_kwargs": value})) != digest_json(factors(pipe))


@pytest.mark.parametrize(("one", "other"), [(torch.float16, torch.float32), (np.float32(1), np.float32(2))])
def test_plain_arguments_count_by_value(pipe: Any, one: Any, other: Any) -> None:
    first, second = (factors(pipe, call={"clip_skip": value}) for value in (one, other))
    assert first != second


class TakesAnything(PlainPipeline):
    def __call__(self, prompt: str = "", **options: Any) -> Any: ...  # type: ignore[override]


class SelfIsNamedPipeline(PlainPipeline):
    def __call__(pipeline, prompt: str = "", height: int = 8) -> Any: ...  # type: ignore[override]  # noqa: N805


class Wrapped(PlainPipeline):
    @functools.wraps(PlainPipeline.__call__)
    def __call__(pipeline, *args: Any, **kwargs: Any) -> Any: ...  # type: ignore[override]  # noqa: N805


def test_the_pipeline_itself_is_no_argument_whatever_its_name() -> None:
    assert list(parameters(SelfIsNamedPipeline())) == ["prompt", "height"]
    assert "pipeline" not in warm_up_arguments(SelfIsNamedPipeline(), CallShape())


def test_the_arguments_of_a_wrapped_call_are_those_of_the_original() -> None:
    assert parameters(Wrapped()) == parameters(PlainPipeline())


def test_a_misspelled_argument_is_refused_and_the_right_one_named(pipe: Any) -> None:
    with pytest.raises(BadCallError, match=r"StableDiffusionPipeline takes no 'heigth'; did you mean 'height'\?"):
        resolve_shape(pipe, CallShape(call={"heigth": 32}))
    with pytest.raises(BadCallError, match=r"PlainPipeline takes no 'promt'; did you mean 'prompt'\?"):
        resolve_shape(PlainPipeline(), CallShape(call={"promt": "x"}))


def test_an_argument_like_no_other_is_refused(pipe: Any) -> None:
    with pytest.raises(BadCallError, match=r"PlainPipeline takes no 'xyz'\. It takes prompt, height, "):
        resolve_shape(PlainPipeline(), CallShape(call={"xyz": 32}))


def test_arguments_that_diffusers_takes_without_listing_them(pipe: Any) -> None:
    arguments = warm_up_arguments(pipe, resolve_shape(pipe, CallShape(call={"callback": print, "callback_steps": 1})))
    assert (arguments["callback"], arguments["callback_steps"]) == (print, 1)


def test_a_pipeline_that_takes_anything_is_given_anything() -> None:
    shape = resolve_shape(
        TakesAnything(), CallShape(height=16, num_frames=3, guidance=True, call={"heigth": 32, "xyz": 1})
    )
    arguments = warm_up_arguments(TakesAnything(), shape)
    assert arguments["guidance_scale"] > 1
    assert {name: arguments[name] for name in ("height", "num_frames", "heigth", "xyz")} == {
        "height": 16,
        "num_frames": 3,
        "heigth": 32,
        "xyz": 1,
    }
    assert "options" not in arguments


def test_guidance_given_to_a_pipeline_that_takes_anything_counts() -> None:
    with_guidance, without = (factors(TakesAnything(), call={"guidance_scale": scale}) for scale in (4.0, 1.0))
    assert with_guidance != without


class Sizeless(PlainPipeline):
    def __call__(self, prompt: str = "") -> Any: ...  # type: ignore[override]


class FromImage(PlainPipeline):
    def __call__(self, prompt: str = "", image: Any = None) -> Any: ...  # type: ignore[override]


@pytest.mark.parametrize(
    ("shape", "name"),
    [
        ({"height": 8}, "height"),
        ({"width": 8}, "width"),
        ({"num_frames": 8}, "num_frames"),
        ({"guidance": True}, "guidance_scale"),
        ({"guidance": False}, "guidance_scale"),
    ],
)
def test_what_a_pipeline_has_no_argument_for_is_refused(shape: dict[str, Any], name: str) -> None:
    with pytest.raises(BadCallError, match=f"Sizeless takes no '{name}'"):
        resolve_shape(Sizeless(), CallShape(**shape))
    resolve_shape(Sizeless(), CallShape())


def test_frames_are_refused_by_an_image_pipeline_of_diffusers(pipe: Any) -> None:
    with pytest.raises(BadCallError, match="StableDiffusionPipeline takes no 'num_frames'"):
        resolve_shape(pipe, CallShape(num_frames=8))


def test_a_pipeline_that_takes_an_image_is_given_one_of_the_size() -> None:
    shape = resolve_shape(FromImage(), CallShape(height=16, width=8, batch_size=2))
    assert [image.size for image in warm_up_arguments(FromImage(), shape)["image"]] == [(8, 16)] * 2


def test_the_warm_up_prompt_fits_every_tokenizer(pipe: Any) -> None:
    prompt = warm_up_arguments(pipe, resolve_shape(pipe, CallShape()))["prompt"]
    assert len(pipe.tokenizer(prompt).input_ids) <= 3


def test_a_call_of_another_kind_is_refused() -> None:
    with pytest.raises(BadCallError, match="mapping of keyword arguments or a function"):
        CallShape(call=3)  # type: ignore[arg-type]


class TestDescribed:
    def test_what_holds_itself_by_way_of_a_function_ends_at_once(self) -> None:
        held: list[Any] = []
        held.append(functools.partial(len, held))
        [[kind, _, arguments, _]] = described(held)
        assert (kind, arguments) == ("partial", ["itself"])

    def test_a_registry_of_methods_grows_with_their_number_and_not_faster(self) -> None:
        def length(count: int) -> int:
            registry: dict[int, Any] = {}
            for number in range(count):
                owner = Owner(registry)
                registry[number] = owner.method
            return len(json.dumps(described(registry)))

        assert length(8) < 10 * length(2)

    def test_containers_that_are_arrays_or_images_count_as_such(self) -> None:
        kind = namedtuple("kind", ["size", "mode"])
        picture = kind((3, 4), "RGB")
        assert described(picture) == "RGB image 3x4"


class Owner:
    def __init__(self, registry: Any) -> None:
        self.registry = registry

    def method(self) -> None:
        pass


def test_shapes_may_be_given_one_by_one() -> None:
    assert call_shapes(one for one in [{"height": 512}, {"height": 768}]) == [  # type: ignore[arg-type]
        asked_shape({"height": 512}),
        asked_shape({"height": 768}),
    ]
