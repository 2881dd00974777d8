"""Saving whatever a pipeline returned, with its record."""

from __future__ import annotations

import sys
import wave
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.utils import BaseOutput
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1] / "determinism"))
from sample_records import fields, sample_record

import pipevault
from pipevault.determinism.outputs import digests
from pipevault.errors import SettingsError, UnknownFormatError
from pipevault.runtime.records import attach_record


@dataclass
class Depth(BaseOutput):
    rgb: Any
    depth: Any


def recorded(output: Any) -> Any:
    results = {**fields()["results"], **digests(output)}
    return attach_record(output, sample_record(results=results, call={}), {})


def image(value: int) -> Image.Image:
    return Image.new("RGB", (4, 4), (value, 0, 0))


def names(files: list[Path]) -> list[str]:
    return [file.name for file in files if file.suffix != ".json"]


def test_a_depth_map_of_16_bits_is_saved_beside_its_picture(tmp_path: Path) -> None:
    depth = np.arange(16, dtype=np.uint16).reshape(4, 4) * 4000
    files = pipevault.save(recorded(Depth([image(1)], [Image.fromarray(depth)])), tmp_path / "out.png")
    assert names(files) == ["out-rgb-0.png", "out-depth-0.png"]
    with Image.open(tmp_path / "out-depth-0.png") as saved:
        assert np.array_equal(np.asarray(saved), depth)
        record = pipevault.read_record(tmp_path / "out-depth-0.png")
        assert record.sample == 1
        assert digests(saved)["pixels"] == [record.results["pixels"][1]]


def test_a_bare_list_and_frames_of_two_videos(tmp_path: Path) -> None:
    assert names(pipevault.save(recorded([image(1), image(2)]), tmp_path / "a.png")) == ["a-0.png", "a-1.png"]
    frames = recorded([[image(1), image(2)], [image(3), image(4)]])
    assert names(pipevault.save(frames, tmp_path / "b.png")) == ["b-0-0.png", "b-0-1.png", "b-1-0.png", "b-1-1.png"]
    with Image.open(tmp_path / "b-1-0.png") as third:
        assert third.getpixel((0, 0)) == (3, 0, 0)


@pytest.mark.parametrize("kind", ["pil", "np"])
def test_videos_one_file_each(tmp_path: Path, kind: str) -> None:
    frames = [[Image.new("RGB", (32, 32), (value, 0, 0)) for value in (10, 200)] for _ in range(2)]
    output = frames if kind == "pil" else np.stack([[np.asarray(f) / 255.0 for f in video] for video in frames])
    assert names(pipevault.save(recorded(output), tmp_path / "a.mp4")) == ["a-0.mp4", "a-1.mp4"]
    assert names(pipevault.save(recorded(output[:1]), tmp_path / "b.mp4")) == ["b.mp4"]
    assert pipevault.read_record(tmp_path / "b.mp4").seeds == fields()["seeds"]


def test_audio_as_wav(tmp_path: Path) -> None:
    tone = np.sin(np.linspace(0, 40, 800, dtype=np.float32))
    output = recorded({"audios": np.stack([np.stack([tone, -tone])] * 2)})
    files = pipevault.save(output, tmp_path / "a.wav", sampling_rate=8000)
    assert names(files) == ["a-0.wav", "a-1.wav"]
    with wave.open(str(tmp_path / "a-0.wav")) as file:
        assert (file.getnchannels(), file.getframerate(), file.getnframes()) == (2, 8000, 800)
        heard = np.frombuffer(file.readframes(800), "<i2").reshape(800, 2)
    assert np.abs(heard[:, 0] / 32767 - tone).max() < 1e-4
    with pytest.raises(SettingsError, match="sampling rate"):
        pipevault.save(output, tmp_path / "b.wav")


def test_arrays_as_npy_and_npz(tmp_path: Path) -> None:
    tensor = torch.randn(2, 3).bfloat16()
    pipevault.save(recorded(tensor), tmp_path / "a.npy")
    assert np.array_equal(np.load(tmp_path / "a.npy"), tensor.float().numpy())
    output = recorded(Depth([image(1)], np.ones((1, 2))))
    assert names(pipevault.save(output, tmp_path / "b.npz")) == ["b.npz"]
    with np.load(tmp_path / "b.npz") as arrays:
        assert set(arrays) == {"rgb[0]", "depth"}
    assert pipevault.read_record(tmp_path / "b.npz.json") == pipevault.record_of(output)
    with pytest.raises(SettingsError, match=r"this output has rgb\[0\], depth: save it as \.npz"):
        pipevault.save(output, tmp_path / "c.npy")


@pytest.mark.parametrize(
    ("suffix", "match"),
    [(".png", r"no PIL images to save \(it has images: ndarray\): .*output_type='pil'"), (".mp4", "no video to save")],
)
def test_what_is_not_there_is_named(tmp_path: Path, suffix: str, match: str) -> None:
    with pytest.raises(SettingsError, match=match):
        pipevault.save(recorded({"images": np.zeros((1, 2, 2), np.float32)}), tmp_path / f"a{suffix}")


def test_an_unknown_suffix_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnknownFormatError, match=r"can be saved as \.png, .*\.npz"):
        pipevault.save(recorded([image(1)]), tmp_path / "a.gif")
