"""What a fresh process does with its job, here in the tests' own process; and one comparison with real processes."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import pipevault
from helpers.pipelines import FAST_BUILD, stable_diffusion
from pipevault.calls.describe import pixels_sha256
from pipevault.errors import BadCallError, MissError
from pipevault.evidence.compare.run import compare
from pipevault.evidence.fresh_generation import generate_for
from pipevault.evidence.generation_job import GenerationJob, GenerationResult
from pipevault.evidence.request import Request
from pipevault.opening import open_pipeline

REQUEST = Request(prompts=("a cat",), seed=5, steps=2)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with the tiny Stable Diffusion pipeline."""
    folder = tmp_path_factory.mktemp("model")
    stable_diffusion(folder / "tokenizer").save_pretrained(folder / "saved")
    return str(folder / "saved")


def generated(model: str, folder: Path, request: Request = REQUEST, method: str = "eager", **options: Any) -> Any:
    folder.mkdir(exist_ok=True)
    job = GenerationJob(model, request, method, device="cpu", **options)
    return generate_for(job, folder, started_at_s=time.time())


def picture(result: GenerationResult, index: int = 0) -> np.ndarray[Any, Any]:
    array: np.ndarray[Any, Any] = np.load(result.pictures[index])
    return array


def test_an_eager_run_is_what_plain_diffusers_gives(model: str, tmp_path: Path) -> None:
    request = Request(prompts=("a cat", "a dog"), seed=5, steps=2, guidance_scale=3.0)
    result = generated(model, tmp_path, request)
    plain = open_pipeline(model, device="cpu")
    expected = plain(
        ["a cat", "a dog"], num_inference_steps=2, guidance_scale=3.0, generator=pipevault.generators(5, 2)
    ).images
    assert result.pixels == tuple(pixels_sha256(image) for image in expected)
    assert np.array_equal(picture(result, 1), np.asarray(expected[1]))
    assert result.warm_pixels == result.pixels
    assert result.seconds.keys() == {"import", "open", "ready", "first", "warm"}
    assert (result.device, result.threads, result.outcome) == ("cpu", torch.get_num_threads(), "")


def test_the_latents_are_those_of_the_last_step(model: str, tmp_path: Path) -> None:
    result = generated(model, tmp_path)
    latents = open_pipeline(model, device="cpu")(
        "a cat", num_inference_steps=2, generator=pipevault.generators(5)[0], output_type="latent"
    ).images
    assert result.latents is not None
    assert np.array_equal(np.load(result.latents), latents.numpy())


def test_torch_compile_is_asked_for_the_parts_that_are_frozen_and_sees_no_mode(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[str] = []
    called: set[str] = set()

    def fake_compile(forward: Any) -> Any:
        name = type(forward.__self__).__name__
        compiled.append(name)

        def call(*args: Any, **kwargs: Any) -> Any:
            called.add(name)
            assert torch._C._len_torch_function_stack() == 0, "the mode that draws noise would be traced"
            return forward(*args, **kwargs)

        return call

    monkeypatch.setattr(torch, "compile", fake_compile)
    result = generated(model, tmp_path, method="torch.compile")
    assert sorted(compiled) == ["CLIPTextModel", "Decoder", "Encoder", "UNet2DConditionModel"]
    assert called == {"CLIPTextModel", "Decoder", "UNet2DConditionModel"}
    assert result.pixels == generated(model, tmp_path).pixels


def test_a_frozen_run_starts_from_the_same_noise(model: str, tmp_path: Path, frozen_vault: Path) -> None:
    frozen = generated(model, tmp_path / "frozen", method="frozen", dir=frozen_vault, build_config=FAST_BUILD)
    eager = generated(model, tmp_path / "eager")
    assert frozen.outcome == "hit"
    assert frozen.key
    assert frozen.noise == eager.noise is not None
    assert frozen.latents is not None
    assert eager.latents is not None
    np.testing.assert_allclose(np.load(frozen.latents), np.load(eager.latents), atol=1e-4)


def test_noise_does_not_depend_on_the_dtype(model: str, tmp_path: Path) -> None:
    low = generated(model, tmp_path / "low", dtype="bfloat16")
    assert low.noise == generated(model, tmp_path / "full").noise
    assert low.latents is not None
    assert np.load(low.latents).dtype == np.float32


def test_getting_ready_alone_draws_nothing(model: str, tmp_path: Path, frozen_vault: Path) -> None:
    options: dict[str, Any] = {"dir": frozen_vault, "build_config": FAST_BUILD, "mode": "compile", "generations": 0}
    result = generated(model, tmp_path, method="frozen", **options)
    assert (result.outcome, result.pictures, result.pixels, result.latents) == ("hit", (), (), None)
    assert "first" not in result.seconds


def test_mode_require_does_not_compile(model: str, tmp_path: Path) -> None:
    with pytest.raises(MissError):
        generated(model, tmp_path, method="frozen", dir=tmp_path / "none")


def test_arrays_are_kept_as_they_are(model: str, tmp_path: Path) -> None:
    request = Request(prompts=("a cat",), seed=5, steps=2, arguments={"output_type": "np"})
    [path] = generated(model, tmp_path, request).pictures
    assert path.name == "picture-0.npy"
    assert (np.load(path).shape, np.load(path).dtype) == ((16, 16, 3), np.float32)


def test_a_pipeline_that_wants_a_prompt_says_so(model: str, tmp_path: Path) -> None:
    with pytest.raises(BadCallError, match="--prompt"):
        generated(model, tmp_path, Request())


def test_frozen_runs_in_real_processes_are_equal(model: str, frozen_vault: Path, tmp_path: Path) -> None:
    """And the runs with another thread count and another batch size are what they say."""
    vault = shutil.copytree(frozen_vault, tmp_path / "vault")
    job = GenerationJob(model, REQUEST, device="cpu", dir=vault, build_config=FAST_BUILD)
    comparison = compare(job, groups=("frozen", "threads", "batch"))
    comparison.check()
    assert comparison.frozen_equal is True
    assert comparison.prewarm is not None
    assert comparison.prewarm.outcome == "hit"
    assert comparison.skipped == ()
    frozen, threads = comparison.run("frozen"), comparison.run("eager, other thread count")
    assert frozen.result.outcome == "hit"
    assert frozen.same_noise is True
    assert comparison.run("frozen again").equal
    assert threads.result.threads != comparison.run("eager").result.threads
    assert len(comparison.run("eager, other batch size").pictures) == 2
