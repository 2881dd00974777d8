"""Generations of a loaded pipeline: seeds, levels, records."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import pipevault
from helpers.pipelines import FAST_BUILD, PlainPipeline, stable_diffusion
from pipevault.determinism.layers import capture, moved, parse_state
from pipevault.errors import BadCallError, GeneratorCountError, SettingsError

pytestmark = pytest.mark.compile


def load(root: Path, pipe: Any, **settings: Any) -> Any:
    return pipevault.PipelineCache(root, mode="require", build_config=FAST_BUILD, **settings).load(pipe, batch_size=1)


@pytest.fixture
def pipe(frozen_vault: Path, tmp_path: Path) -> Any:
    pipe = load(frozen_vault, stable_diffusion(tmp_path / "tokenizer"))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def call(pipe: Any, **arguments: Any) -> Any:
    return pipe(**{"prompt": "a cat", "num_inference_steps": 2, "output_type": "np", **arguments})


def test_a_seed_gives_the_same_bits_again_and_stands_in_the_record(pipe: Any) -> None:
    one, other, third = call(pipe, seed=7), call(pipe, seed=7), call(pipe, seed=8)
    assert np.array_equal(one.images, other.images)
    assert not np.array_equal(one.images, third.images)
    record = pipevault.record_of(one)
    assert record.seeds["root"] == 7
    assert record.seeds["source"] == "argument"
    assert record.seeds["samples"] == [pipevault.sample_seed(7, 0)]
    assert record.results == pipevault.record_of(other).results
    assert record.results["pixels"] != pipevault.record_of(third).results["pixels"]
    assert record.key == pipevault.outcome(pipe).key.hex
    assert record.call == {"prompt": "a cat", "num_inference_steps": 2, "output_type": "np"}
    assert (record.level["asked"], record.level["achieved"]) == ("repeatable", "repeatable")


def test_a_generator_of_the_caller_is_used_and_gives_what_eager_diffusers_gives(pipe: Any, tmp_path: Path) -> None:
    eager = stable_diffusion(tmp_path / "tokenizer")
    eager.set_progress_bar_config(disable=True)
    expected = call(eager, generator=torch.Generator().manual_seed(3)).images
    actual = call(pipe, generator=torch.Generator().manual_seed(3))
    np.testing.assert_allclose(actual.images, expected, atol=1e-3)
    assert pipevault.record_of(actual).seeds == {
        "root": 3,
        "samples": [3],
        "source": "generator",
        "streams": {},
    }


def test_without_a_seed_the_real_one_is_recorded_and_gives_the_picture_again(pipe: Any) -> None:
    torch.manual_seed(11)
    one, other = call(pipe), call(pipe)
    assert not np.array_equal(one.images, other.images)
    torch.manual_seed(11)
    assert np.array_equal(call(pipe).images, one.images)
    assert pipevault.record_of(one).seeds == {
        "root": 11,
        "samples": [11],
        "source": "global",
        "streams": {"torch": {"kind": "seed", "seed": 11}},
    }
    seeds = pipevault.record_of(other).seeds
    assert (seeds["root"], seeds["samples"], seeds["source"]) == (None, [], "global")
    torch.set_rng_state(parse_state("torch", seeds["streams"]["torch"]))
    assert np.array_equal(call(pipe).images, other.images)


def test_a_level_belongs_to_the_load(pipe: Any) -> None:
    for name in ("level", "determinism"):
        with pytest.raises(BadCallError, match=rf"PipelineCache\({name}="):
            call(pipe, seed=7, **{name: "strict"})


def test_minus_one_becomes_a_seed_that_is_recorded(pipe: Any) -> None:
    output = call(pipe, seed=-1)
    record = pipevault.record_of(output)
    assert record.seeds["source"] == "random"
    assert np.array_equal(call(pipe, seed=record.seeds["root"]).images, output.images)


def test_randomness_of_the_program_is_left_alone(pipe: Any) -> None:
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    for _ in range(2):  # alone the first time, beside others from then on
        before = capture()
        call(pipe, seed=5)
        assert not moved(before, capture())


def test_a_seed_beside_a_generator_is_refused(pipe: Any) -> None:
    with pytest.raises(BadCallError, match="not both"):
        call(pipe, seed=1, generator=torch.Generator())


def test_fewer_generators_than_samples_are_refused(pipe: Any) -> None:
    with pytest.raises(GeneratorCountError):
        call(pipe, prompt=["a", "b"], generator=[torch.Generator()])


def test_audit_hashes_every_part_at_every_step(frozen_vault: Path, tmp_path: Path) -> None:
    pipe = load(frozen_vault, stable_diffusion(tmp_path / "tokenizer"), level="repeatable+audit")
    pipe.set_progress_bar_config(disable=True)
    steps = pipevault.record_of(call(pipe, seed=1)).results["steps"]
    assert [(step["part"], step["step"]) for step in steps] == [
        ("text_encoder", 0),
        ("text_encoder", 1),
        ("unet", 0),
        ("unet", 1),
        ("vae.decoder", 0),
    ]
    again = pipevault.record_of(call(pipe, seed=1)).results["steps"]
    assert again == steps
    assert pipevault.record_of(call(pipe, seed=2)).results["steps"][2] != steps[2]


def test_strict_has_graphs_of_its_own_and_leaves_no_switch_behind(frozen_vault: Path, tmp_path: Path) -> None:
    pipe = stable_diffusion(tmp_path / "tokenizer")
    cache = pipevault.PipelineCache(frozen_vault, mode="require", build_config=FAST_BUILD, level="strict")
    explanation = cache.explain(pipe)
    assert explanation.status == "miss"
    assert {difference.factor.partition(".")[0] for difference in explanation.differences} == {"determinism"}
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("level", ["repeatable", "production", "repeatable+audit"])
def test_names_of_one_level_share_its_graphs(frozen_vault: Path, tmp_path: Path, level: str) -> None:
    pipe = load(frozen_vault, stable_diffusion(tmp_path / "tokenizer"), level=level)
    assert pipevault.outcome(pipe).status == "hit"


class BlockNoise(PlainPipeline):
    """As Pyramid-Flow: noise between stages from the global generator, whatever ``generator=`` says."""

    def generate(self, prompt: str = "", generator: torch.Generator | None = None) -> torch.Tensor:
        latents = self(prompt, generator=generator)
        with torch.no_grad():
            return self.transformer(latents + 0.1 * torch.randn(latents.shape), torch.tensor(0.0))


def test_a_pipeline_that_draws_from_the_global_generator_is_seeded_and_told_of(tmp_path: Path) -> None:
    cache = pipevault.PipelineCache(tmp_path, build_config=FAST_BUILD)
    pipe: Any = cache.load(BlockNoise(), call=lambda pipe: pipe.generate())
    torch.manual_seed(1)
    one = pipe.generate(seed=7)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    other = pipe.generate(seed=7)
    assert torch.equal(one, other)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(one, pipe.generate(seed=8))
    record = pipevault.record_of(one)
    assert record.pipeline["method"] == "generate"
    assert any("drew from a global generator (torch" in note for note in record.level["notes"])
    assert not pipevault.record_of(pipe("", seed=7)).level["notes"]
    replayed = pipevault.replay(record, BlockNoise(), dir=tmp_path)
    assert replayed.equal, "loading with a function is no obstacle: the record names the graphs"
    assert replayed.divergences == ()


def test_a_tuple_has_a_record_and_what_was_not_generated_has_none(pipe: Any, tmp_path: Path) -> None:
    output = call(pipe, return_dict=False)
    assert type(output) is tuple
    assert pipevault.record_of(output).call["return_dict"] is False
    with pytest.raises(SettingsError, match="has no run record"):
        pipevault.record_of(call(stable_diffusion(tmp_path / "tokenizer")))


def test_invariant_gives_a_sample_the_same_bits_at_every_batch_size(tmp_path: Path) -> None:
    from helpers.pipelines import PlainPipeline

    cache = pipevault.PipelineCache(tmp_path / "vault", build_config=FAST_BUILD, level="invariant")
    pipe: Any = cache.load(PlainPipeline(), batch_size=1)
    alone = [pipe(prompt=[f"p{i}"], seed=9 + i) for i in range(1)]
    for size in (1, 2, 4):
        batch = pipe(prompt=[f"p{i}" for i in range(size)], seed=9)
        assert batch.shape[0] == size
        assert torch.equal(batch[:1], alone[0])
    eight = pipe(prompt=["p"] * 8, seed=9)
    four = pipe(prompt=["p"] * 4, seed=9)
    assert torch.equal(eight[:4], four)


class TestSaving:
    def test_each_image_has_its_own_seed_inside_and_beside_it(self, pipe: Any, tmp_path: Path) -> None:
        output = call(pipe, seed=7, output_type="pil")
        written = pipevault.save(output, tmp_path / "cat.png")
        assert [path.name for path in written] == ["cat.png", "cat.png.json"]
        for path in written:
            record = pipevault.read_record(path)
            assert record == pipevault.record_of(output).of_sample(0)
            assert record.seeds["root"] == 7

    def test_an_output_without_images_is_refused(self, pipe: Any, tmp_path: Path) -> None:
        with pytest.raises(SettingsError, match="output_type='pil'"):
            pipevault.save(call(pipe, seed=7), tmp_path / "cat.png")
