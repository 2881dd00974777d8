"""Pyramid-Flow's own code, of both generations: ``PYRAMID_FLOW_REPO`` names a checkout. It takes minutes to compile."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import pipevault
from helpers import pyramid_flow
from helpers.pipelines import FAST_BUILD
from pipevault.determinism.seeds import seed_layers
from pipevault.determinism.streams import generators

pytestmark = [
    pytest.mark.compile,
    pytest.mark.skipif(
        pyramid_flow.CHECKOUT not in os.environ, reason=f"{pyramid_flow.CHECKOUT} names no checkout of Pyramid-Flow"
    ),
]

SIZE: dict[str, Any] = {"height": 64, "width": 64}
STEPS: dict[str, Any] = {"num_inference_steps": [2, 1, 2]}
LATER_STEPS: dict[str, Any] = {"video_num_inference_steps": [1, 2, 1]}


class Generation:
    """One generation of the model: where its checkpoint and its vault lie, and what it drew after it was frozen."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name = name
        self.folder = folder
        self.drawn: list[str] = []

    def model(self) -> Any:
        return pyramid_flow.load_model(self.name, self.folder)

    def load(self, mode: str = "compile") -> Any:
        cache = pipevault.PipelineCache(self.folder / "vault", mode=mode, build_config=FAST_BUILD)
        return cache.load(self.model(), **SIZE, num_frames=17)

    def eager(self, method: str, *, seed: int, **arguments: Any) -> Any:
        model = self.model()
        seed_layers(seed)
        return getattr(model, method)(generator=generators(seed, 1)[0], **arguments)


@pytest.fixture(scope="module", params=pyramid_flow.GENERATIONS)
def generation(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Generation:
    made = Generation(request.param, tmp_path_factory.mktemp(request.param))
    model = made.load()
    outcome = pipevault.outcome(model)
    assert outcome.status == "miss"
    encoders = [f"text_encoder.{name}" for name, _ in model.text_encoder.named_children()]
    assert len(encoders) == {"pyramid_flux": 2, "pyramid_mmdit": 3}[made.name]
    parts = ("dit", *encoders, "vae.encoder", "vae.decoder")
    assert {name: part.status for name, part in outcome.parts.items()} == dict.fromkeys(parts, "frozen")
    made.drawn = digests(model)
    return made


def digests(model: Any) -> list[str]:
    """Of two equal videos, of one with seed 0 at another length, and of one from an image."""
    videos = [
        model.generate("waves", seed=seed, temp=temp, **SIZE, **STEPS, **LATER_STEPS)
        for seed, temp in ((1, 3), (0, 2), (1, 3))
    ]
    videos.append(model.generate_i2v("waves", input_image=picture(), seed=0, temp=2, **STEPS))
    return [hashlib.sha256(pixels(video).tobytes()).hexdigest() for video in videos]


def pixels(frames: list[Image.Image]) -> np.ndarray[Any, Any]:
    return np.stack([np.asarray(frame) for frame in frames]).astype(int)


def picture() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))


def test_every_frame_is_the_eager_one(generation: Generation) -> None:
    model = generation.load("require")
    for temp in (3, 2):
        video = model.generate("waves", seed=0, temp=temp, **SIZE, **STEPS, **LATER_STEPS)
        expected = generation.eager("generate", seed=0, prompt="waves", temp=temp, **SIZE, **STEPS, **LATER_STEPS)
        assert len(video) == 8 * temp - 7
        assert np.abs(pixels(video) - pixels(expected)).max() <= 1
    video = model.generate_i2v("waves", input_image=picture(), seed=0, temp=2, **STEPS)
    expected = generation.eager("generate_i2v", seed=0, prompt="waves", input_image=picture(), temp=2, **STEPS)
    assert np.abs(pixels(video) - pixels(expected)).max() <= 1
    decoder = model.__dict__["_pipevault"].states(model)["vae.decoder"]
    assert len(decoder.graphs) == 2
    assert decoder.uses["eager"] == 0


def test_blocks_serve_videos_of_every_length_with_a_dozen_graphs(generation: Generation) -> None:
    cache = pipevault.PipelineCache(generation.folder / "blocks", regions="blocks", build_config=FAST_BUILD)
    model = cache.load(generation.model(), parts=["dit"], num_frames=8 * 30 + 1, **SIZE)
    regions = {
        "pyramid_flux": "2 FluxTransformerBlock, 2 FluxSingleTransformerBlock",
        "pyramid_mmdit": "2 JointTransformerBlock",
    }
    assert pipevault.outcome(model).parts["dit"].regions == regions[generation.name]
    steps = {"num_inference_steps": [1, 1, 1], "video_num_inference_steps": [1, 1, 1]}
    for temp in (2, 8, 16, 31):
        arguments = {"prompt": "waves", "temp": temp, **SIZE, **steps}
        video = model.generate(seed=0, **arguments)
        expected = generation.eager("generate", seed=0, **arguments)
        assert len(video) == 8 * (temp - 1) + 1
        assert max(np.abs(np.int16(a) - np.int16(b)).max() for a, b in zip(video, expected, strict=True)) <= 1
    part = pipevault.outcome(model).parts["dit"]
    assert part.status == "frozen"
    assert part.graphs <= 12


def test_another_process_draws_what_the_one_drew_that_froze_the_graphs(generation: Generation) -> None:
    script = (
        "import sys; sys.path[:0] = sys.argv[3:]\n"
        "from pathlib import Path; import test_pyramid_flow_code as tests\n"
        "model = tests.Generation(sys.argv[1], Path(sys.argv[2])).load('require')\n"
        "print('drawn', *tests.digests(model))\n"
    )
    here = Path(__file__).parent
    command = [sys.executable, "-c", script, generation.name, str(generation.folder), str(here), str(here.parent)]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1]
    assert printed.split()[1:] == generation.drawn
    assert generation.drawn[0] == generation.drawn[2]


def test_save_and_replay(generation: Generation, tmp_path: Path) -> None:
    model = generation.load("require")
    video = model.generate("waves", seed=7, temp=2, **SIZE, **STEPS, **LATER_STEPS)
    assert [path.name for path in pipevault.save(video, tmp_path / "waves.mp4")] == ["waves.mp4", "waves.mp4.json"]
    assert len(pipevault.save(video, tmp_path / "waves.png")) == 2 * len(video)
    for source in (tmp_path / "waves.mp4", tmp_path / "waves-8.png"):
        replayed = pipevault.replay(source, generation.model(), dir=generation.folder / "vault")
        assert replayed.equal, replayed.divergences
