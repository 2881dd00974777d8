"""Where the program gives the noise, a loaded pipeline draws what plain diffusers draws, from the same streams."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import pipevault
from helpers.loaded import load
from helpers.pipelines import PlainPipeline, stable_diffusion
from pipevault.determinism.layers import capture, moved

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LEVELS = ("off", "seeded", "repeatable", "strict")


def generator(seed: int, *, used: int = 0) -> torch.Generator:
    made = torch.Generator().manual_seed(seed)
    torch.rand(used, generator=made)
    return made


GIVEN: dict[str, Callable[[], Any]] = {
    "a generator": lambda: generator(3),
    "one that was drawn from": lambda: generator(3, used=5),
    "a list": lambda: [generator(3), generator(4, used=1)],
    "the program's stream": lambda: None,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tokenizer")


def noisy(pipe: Any, dtype: torch.dtype) -> tuple[Any, list[torch.Tensor]]:
    """The pipeline, and the list to which each call adds its first latents."""
    found: list[torch.Tensor] = []
    prepare = pipe.prepare_latents

    def prepare_latents(*args: Any, **kwargs: Any) -> torch.Tensor:
        found.append(prepare(*args, **kwargs))
        return found[-1]

    pipe.prepare_latents = prepare_latents
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(dtype), found


def draw(pipe: Any, given: Any) -> Any:
    return pipe(["a", "b"], num_inference_steps=1, output_type="latent", generator=given, guidance_scale=1.0)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", GIVEN)
def test_noise_and_streams_are_those_of_plain_diffusers(
    folder: Path, tmp_path: Path, kind: str, dtype: torch.dtype, level: str
) -> None:
    plain, expected = noisy(stable_diffusion(folder), dtype)
    loaded, found = noisy(stable_diffusion(folder), dtype)
    load(loaded, tmp_path, level=level)
    ends: list[list[torch.Tensor]] = []
    for pipe in (plain, loaded):
        torch.manual_seed(5)
        given = GIVEN[kind]()
        outputs = [draw(pipe, given) for _ in range(3)]  # alone, and beside others; each goes on where the last ended
        streams = given if isinstance(given, list) else [given] if given is not None else []
        ends.append([*(one.get_state() for one in streams), torch.get_rng_state()])
    assert len(expected) == len(found) == 3
    assert all(torch.equal(one, other) for one, other in zip(expected, found, strict=True))
    assert found[0].dtype is dtype
    assert all(torch.equal(one, other) for one, other in zip(*ends, strict=True))
    assert pipevault.record_of(outputs[0]).results["noise"] is not None


class Odd(PlainPipeline):
    """Draws a number of values that torch draws in another way in half precision."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.transformer.to(dtype)
        self._dtype = dtype

    def __call__(self, prompt: str = "", generator: Any = None) -> torch.Tensor:  # type: ignore[override]
        return torch.randn(1, 5, 5, generator=generator, dtype=self._dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_noise_of_a_seed_is_drawn_on_the_host_and_cast(tmp_path: Path, dtype: torch.dtype) -> None:
    pipe = load(Odd(dtype), tmp_path)
    expected = pipevault.noise((1, 5, 5), 7).to(dtype)
    assert torch.equal(pipe(seed=7), expected)
    assert torch.equal(pipe(seed=7), expected), "beside others too"
    plain = Odd(dtype)(generator=generator(7))
    assert torch.equal(pipe(generator=generator(7)), plain)
    assert dtype is torch.float32 or not torch.equal(plain, pipevault.noise((1, 5, 5), 7).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_seed_is_the_same_noise_in_every_dtype(folder: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    pipe, found = noisy(stable_diffusion(folder), dtype)
    load(pipe, tmp_path)
    before = capture()
    for _ in range(2):
        pipe(["a", "b"], num_inference_steps=1, output_type="latent", seed=7)
    assert not moved(before, capture())
    expected = pipevault.noise((2, 4, 8, 8), 7).to(dtype)
    assert all(torch.equal(one / pipe.scheduler.init_noise_sigma, expected) for one in found)
