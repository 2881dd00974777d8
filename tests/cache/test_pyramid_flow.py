"""Pyramid-Flow's structure, on a small model: no diffusers pipeline, a growing history, a VAE that keeps frames."""

from __future__ import annotations

import functools
import hashlib
import random
import re
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import pipevault
from helpers.pipelines import FAST_BUILD
from helpers.pyramid_small import PyramidDiTForVideoGeneration
from pipevault.determinism.seeds import seed_layers
from pipevault.determinism.streams import generators
from pipevault.errors import BadCallError, BadRecordError, SettingsError
from pipevault.graphs import parts as graph_parts
from pipevault.graphs import pyramid_flow

pytestmark = pytest.mark.compile

PARTS = {"dit", "text_encoder.text_encoder", "text_encoder.text_encoder_2", "vae.encoder", "vae.decoder"}
SIZE: dict[str, Any] = {"height": 384, "width": 640}


DRAWN_AT_FIRST: list[str] = []
"""The :func:`digests` in the process that froze the graphs of ``vault``."""


@pytest.fixture(scope="module")
def vault(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A vault with the graphs that the example of the docs freezes. Tests add graphs for other lengths alone."""
    folder = tmp_path_factory.mktemp("pyramid")
    page = (Path(__file__).parents[2] / "docs" / "pipelines.md").read_text(encoding="utf-8")
    example = re.findall(r"```python\n(.*?)```", page.rpartition("[Pyramid-Flow]")[2], re.DOTALL)[0]
    cache = functools.partial(pipevault.PipelineCache, folder / "vault", build_config=FAST_BUILD)
    names: dict[str, Any] = {"model": PyramidDiTForVideoGeneration(), "pipevault": pipevault}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipevault, "PipelineCache", cache)
        patch.chdir(folder)
        exec(example, names)
    outcome = pipevault.outcome(names["model"])
    assert outcome.status == "miss"
    assert {name: part.status for name, part in outcome.parts.items()} == dict.fromkeys(PARTS, "frozen")
    expected = eager("generate", seed=0, prompt="waves at dusk", temp=3, **SIZE)
    assert np.abs(pixels(names["frames"]) - pixels(expected)).max() <= 1
    assert (folder / "waves.mp4").exists()
    DRAWN_AT_FIRST[:] = digests(names["model"])
    return folder / "vault"


def load(vault: Path, mode: str = "compile", **options: Any) -> Any:
    cache = pipevault.PipelineCache(vault, mode=mode, build_config=FAST_BUILD, **options)
    return cache.load(PyramidDiTForVideoGeneration())


def pixels(frames: list[Image.Image]) -> np.ndarray[Any, Any]:
    return np.stack([np.asarray(frame) for frame in frames]).astype(int)


def picture() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (384, 640, 3), dtype=np.uint8))


def eager(method: str, *, seed: int, **arguments: Any) -> Any:
    model = PyramidDiTForVideoGeneration()
    seed_layers(seed)
    return getattr(model, method)(generator=generators(seed, 1)[0], **arguments)


def test_the_whole_life_of_a_model(vault: Path, tmp_path: Path) -> None:
    model = load(vault, "require")
    assert pipevault.outcome(model).status == "hit"
    decoder = model.__dict__["_pipevault"].states(model)["vae.decoder"]
    for temp in (2, 3, 2, 3):  # what the video before has left in the caches is no change, and asks for no graph
        video = model.generate("waves", seed=0, temp=temp, **SIZE)
        assert len(video) == 8 * (temp - 1) + 1
        expected = eager("generate", seed=0, prompt="waves", temp=temp, **SIZE)
        assert np.abs(pixels(video) - pixels(expected)).max() <= 1
        again = model.generate("waves", seed=0, temp=temp, **SIZE)
        assert np.array_equal(pixels(video), pixels(again))
        assert not np.array_equal(pixels(video), pixels(model.generate("waves", seed=1, temp=temp, **SIZE)))
    assert len(decoder.graphs) == 2
    assert decoder.uses["eager"] == 0


@pytest.mark.parametrize("temp", [1, 4])
def test_longer_and_shorter_videos_than_those_of_the_load(vault: Path, temp: int) -> None:
    model = load(vault)
    video = model.generate("waves", seed=3, temp=temp, **SIZE)
    expected = eager("generate", seed=3, prompt="waves", temp=temp, **SIZE)
    assert np.abs(pixels(video) - pixels(expected)).max() <= 1
    assert np.array_equal(pixels(video), pixels(model.generate("waves", seed=3, temp=temp, **SIZE)))
    assert len(model.__dict__["_pipevault"].states(model)["vae.decoder"].graphs) <= 3


def test_blocks_serve_videos_of_every_length_with_a_dozen_graphs(tmp_path: Path) -> None:
    size: dict[str, Any] = {"height": 64, "width": 64}
    temps = (1, 2, 5, 8)
    cache = pipevault.PipelineCache(tmp_path / "vault", build_config=FAST_BUILD, regions="blocks")
    model: Any = cache.load(PyramidDiTForVideoGeneration(), num_frames=8 * 7 + 1, **size)
    assert pipevault.outcome(model).parts["dit"].regions == "2 Block"
    for temp in temps:
        video = model.generate("waves", seed=0, temp=temp, **size)
        expected = eager("generate", seed=0, prompt="waves", temp=temp, **size)
        assert np.abs(pixels(video) - pixels(expected)).max() <= 1
        assert np.array_equal(pixels(video), pixels(model.generate("waves", seed=0, temp=temp, **size)))
    parts = pipevault.outcome(model).parts
    assert {part.status for part in parts.values()} == {"frozen"}
    assert sum(part.graphs for part in parts.values()) <= 12, parts


def test_an_image_to_video(vault: Path) -> None:
    model = load(vault, "require")
    video = model.generate_i2v("waves", input_image=picture(), seed=5, temp=2)
    expected = eager("generate_i2v", seed=5, prompt="waves", input_image=picture(), temp=2)
    assert np.abs(pixels(video) - pixels(expected)).max() <= 1
    assert np.array_equal(pixels(video), pixels(model.generate_i2v("waves", input_image=picture(), seed=5, temp=2)))
    record = pipevault.record_of(video)
    assert record.pipeline["method"] == "generate_i2v"
    assert record.graphs.keys() == PARTS


def test_every_stream_follows_the_seed_and_is_put_back(vault: Path) -> None:
    model = load(vault, "require")
    drawn = []
    for start in (1, 2):
        seed_layers(start)
        before = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
        drawn.append(model.generate_i2v("waves", input_image=picture(), seed=0, temp=1))
        assert random.getstate() == before[0]
        assert np.array_equal(np.random.get_state()[1], before[1])
        assert torch.equal(torch.get_rng_state(), before[2])
    assert np.array_equal(pixels(drawn[0]), pixels(drawn[1]))
    seeds = pipevault.record_of(drawn[0]).seeds
    assert seeds["root"] == 0
    assert seeds["source"] == "argument"


def digests(model: Any) -> list[str]:
    """Of two equal videos, and of one from an image."""
    videos = [model.generate("waves", seed=0, temp=3, **SIZE) for _ in range(2)]
    videos.append(model.generate_i2v("waves", input_image=picture(), seed=0, temp=2))
    return [hashlib.sha256(pixels(video).tobytes()).hexdigest() for video in videos]


def test_another_process_draws_what_the_one_drew_that_froze_the_graphs(vault: Path) -> None:
    script = (
        "import sys; sys.path[:0] = sys.argv[2:]\n"
        "from pathlib import Path; import test_pyramid_flow as tests\n"
        "print(*tests.digests(tests.load(Path(sys.argv[1]), 'require')))\n"
    )
    here = Path(__file__).parent
    command = [sys.executable, "-c", script, str(vault), str(here), str(here.parent)]
    drawn = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    assert drawn == DRAWN_AT_FIRST
    assert drawn[0] == drawn[1]


def test_save_and_replay(vault: Path, tmp_path: Path) -> None:
    model = load(vault, "require")
    video = model.generate("waves", seed=7, temp=2, num_inference_steps=[1, 2], **SIZE)
    assert [path.name for path in pipevault.save(video, tmp_path / "waves.mp4")] == ["waves.mp4", "waves.mp4.json"]
    assert len(pipevault.save(video, tmp_path / "waves.png")) == 2 * len(video)
    for source in (tmp_path / "waves.mp4", tmp_path / "waves-8.png"):
        replayed = pipevault.replay(source, PyramidDiTForVideoGeneration(), dir=vault)
        assert replayed.equal, replayed.divergences
    video = model.generate_i2v("waves", input_image=picture(), seed=8, temp=2)
    pipevault.save(video, tmp_path / "image.mp4")
    with pytest.raises(BadCallError, match="holds input_image by its digest only"):
        pipevault.replay(tmp_path / "image.mp4", model)
    assert pipevault.replay(tmp_path / "image.mp4", model, inputs={"input_image": picture()}).equal
    record = pipevault.record_of(
        model.generate("waves", seed=7, temp=2, num_inference_steps=[1, 20_000_000][:1], **SIZE)
    )
    record.call["video_num_inference_steps"] = [1, 20_000_000]
    with pytest.raises(BadRecordError, match=r"video_num_inference_steps' of the run record is \[1, 20000000\]"):
        pipevault.replay(record, model)


def test_threads_get_what_each_gets_alone(vault: Path) -> None:
    model = load(vault, "require")
    alone = {seed: pixels(model.generate("waves", seed=seed, temp=3, **SIZE)) for seed in range(3)}
    found: dict[int, Any] = {}

    def draw(seed: int) -> None:
        found[seed] = pixels(model.generate("waves", seed=seed, temp=3, **SIZE))

    threads = [threading.Thread(target=draw, args=(seed,)) for seed in alone]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(np.array_equal(found[seed], alone[seed]) for seed in alone)


def test_unloaded_it_is_what_it_was(vault: Path) -> None:
    model = pipevault.unload(load(vault, "require"))
    assert type(model) is PyramidDiTForVideoGeneration
    assert graph_parts.frozen_parts(model) == {}
    seed_layers(0)
    video = model.generate("waves", temp=3, generator=generators(0, 1)[0], **SIZE)
    assert np.array_equal(pixels(video), pixels(eager("generate", seed=0, prompt="waves", temp=3, **SIZE)))


class TestBadInput:
    @pytest.mark.parametrize("missing", ["vae", "text_encoder"])
    def test_a_model_without_a_part_that_it_needs(self, tmp_path: Path, missing: str) -> None:
        model = PyramidDiTForVideoGeneration(**{f"load_{missing}": False})
        with pytest.raises(SettingsError, match=rf"has no {missing}, .* load_{missing}=True"):
            pipevault.PipelineCache(tmp_path / "vault").load(model)
        assert type(model) is PyramidDiTForVideoGeneration
        assert not (tmp_path / "vault").exists()

    def test_a_number_of_frames_that_no_video_has(self, tmp_path: Path) -> None:
        with pytest.raises(BadCallError, match=r"num_frames=16 does not suit .* Use 9 or 17"):
            pipevault.PipelineCache(tmp_path / "vault").load(PyramidDiTForVideoGeneration(), **SIZE, num_frames=16)

    def test_an_argument_that_it_does_not_take(self, tmp_path: Path) -> None:
        with pytest.raises(BadCallError, match="takes no 'tmp'; did you mean 'temp'"):
            pipevault.PipelineCache(tmp_path / "vault").load(PyramidDiTForVideoGeneration(), call={"tmp": 2})


class TestWarmUp:
    """Nothing is compiled."""

    @pytest.mark.parametrize(
        ("folder", "size"),
        [("", (384, 640)), ("/models/diffusion_transformer_384p", (384, 640)), ("models/x_768p", (768, 1280))],
    )
    def test_without_a_size_that_of_the_checkpoint(self, folder: str, size: tuple[int, int]) -> None:
        calls = warm_up_calls({}, folder)
        assert [(call["height"], call["width"], call["temp"]) for call in calls[:1]] == [(*size, 3)]
        assert (calls[1]["input_image"].height, calls[1]["input_image"].width, calls[1]["temp"]) == (*size, 2)

    def test_what_a_load_asks_for(self) -> None:
        asked = {"height": 64, "width": 96, "num_frames": 41, "guidance": False, "save_memory": False}
        calls = warm_up_calls(asked)
        assert [(call["temp"], call["guidance_scale"], call["save_memory"]) for call in calls] == [
            (6, 0.0, False),
            (5, 0.0, False),
        ]

    @pytest.mark.parametrize("asked", [{"num_frames": 1}, {"temp": 1}, {"batch_size": 2}])
    def test_a_frame_or_a_batch_is_drawn_from_texts_alone(self, asked: dict[str, Any]) -> None:
        (call,) = warm_up_calls(asked)
        assert len(call["prompt"]) == asked.get("batch_size", 1)


def warm_up_calls(shape: dict[str, Any], folder: str = "") -> list[dict[str, Any]]:
    calls: list[dict[str, Any]] = []

    class Told(PyramidDiTForVideoGeneration):
        @functools.wraps(PyramidDiTForVideoGeneration.generate)
        def generate(self, **given: Any) -> None:  # type: ignore[override]
            calls.append(given)

        @functools.wraps(PyramidDiTForVideoGeneration.generate_i2v)
        def generate_i2v(self, **given: Any) -> None:  # type: ignore[override]
            calls.append(given)

    model = Told()
    model.dit.config = type("Config", (), {"_name_or_path": folder})  # type: ignore[assignment]
    pyramid_flow.warm_up(model, shape)()
    return calls
