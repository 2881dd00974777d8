"""Saving whatever a pipeline returned, with its record."""

from __future__ import annotations

import re
import wave
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.utils import BaseOutput
from PIL import Image

import pipevault
from helpers.sample_records import SEEDS, fields, sample_record
from helpers.saved_files import infotext, parsed
from pipevault.calls.describe import pixels_sha256
from pipevault.calls.outputs import digests
from pipevault.errors import SettingsError, UnknownFormatError
from pipevault.runtime.records import attach_record


@dataclass
class Depth(BaseOutput):
    rgb: Any
    depth: Any


class Own:
    """An object that carries its record, whatever it holds."""

    def __init__(self, values: dict[str, Any]) -> None:
        vars(self).update(values)


def recorded(output: Any, *, prompts: int = 0) -> Any:
    results = {**fields()["results"], **digests(output)}
    call = {"prompt": [f"prompt {index}" for index in range(prompts)], "num_inference_steps": 12} if prompts else {}
    return attach_record(output, sample_record(results=results, call=call), {})


def av_open(path: Path) -> Any:
    import av

    return av.open(str(path))


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


def test_the_frames_of_several_videos_in_one_list(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (32, 32), (40 * value, 0, 0)) for value in range(6)]
    files = pipevault.save(recorded(frames, prompts=2), tmp_path / "a.mp4")
    assert names(files) == ["a-0.mp4", "a-1.mp4"]
    with av_open(tmp_path / "a-1.mp4") as video:
        assert len(list(video.decode(video=0))) == 3
    assert [pipevault.read_record(file).sample for file in files if file.suffix == ".mp4"] == [0, 3]
    assert names(pipevault.save(recorded(frames[:3], prompts=2), tmp_path / "b.mp4")) == ["b.mp4"]


@pytest.mark.parametrize("kind", ["pil", "np"])
def test_videos_one_file_each(tmp_path: Path, kind: str) -> None:
    frames = [[Image.new("RGB", (32, 32), (value, 0, 0)) for value in (10, 200)] for _ in range(2)]
    output = frames if kind == "pil" else np.stack([[np.asarray(f) / 255.0 for f in video] for video in frames])
    assert names(pipevault.save(recorded(output), tmp_path / "a.mp4")) == ["a-0.mp4", "a-1.mp4"]
    assert names(pipevault.save(recorded(output[:1]), tmp_path / "b.mp4")) == ["b.mp4"]
    assert pipevault.read_record(tmp_path / "b.mp4").seeds == fields()["seeds"]


def test_one_picture_of_a_batch_keeps_its_own_digest_and_seed(tmp_path: Path) -> None:
    output = recorded([image(1), image(1), image(2)], prompts=3)
    for index in range(3):
        [path, sidecar] = pipevault.save(output[index], tmp_path / f"{index}.png")
        record = pipevault.read_record(path)
        assert record == pipevault.read_record(sidecar)
        assert record.sample == index
        assert f"Seed: {SEEDS[index]}," in infotext(path)
    rest = pipevault.save(output[1:], tmp_path / "rest.png")
    assert [pipevault.read_record(path).sample for path in rest] == [1, 1, 2, 2]


def test_a_depth_map_has_the_prompt_and_the_seed_of_its_picture(tmp_path: Path) -> None:
    output = Depth([image(i) for i in range(3)], [Image.new("I;16", (4, 4), i) for i in range(3)])
    files = [path for path in pipevault.save(recorded(output, prompts=3), tmp_path / "a.png") if path.suffix == ".png"]
    for number, index in ((0, 3), (1, 4), (2, 5)):
        text = parsed(infotext(tmp_path / f"a-depth-{number}.png"))
        assert (text["Prompt"], text["Seed"]) == (f"prompt {number}", str(SEEDS[number]))
        assert pipevault.read_record(files[index]).sample == index
        with Image.open(files[index]) as saved:
            assert pixels_sha256(saved) == pipevault.read_record(files[index]).results["pixels"][index]


def test_frames_have_the_seed_of_their_video(tmp_path: Path) -> None:
    frames = recorded([[image(1), image(2)], [image(3), image(4)], [image(5), image(6)]], prompts=3)
    pipevault.save(frames, tmp_path / "a.png")
    text = parsed(infotext(tmp_path / "a-1-0.png"))
    assert (text["Prompt"], text["Seed"]) == ("prompt 1", str(SEEDS[1]))
    assert pipevault.read_record(tmp_path / "a-1-0.png").sample == 2


def test_frames_that_belong_to_nobody_knows_which_sample_have_no_seed(tmp_path: Path) -> None:
    pipevault.save(recorded([image(value) for value in range(6)], prompts=3), tmp_path / "a.png")
    assert "Seed" not in parsed(infotext(tmp_path / "a-1.png"))


def test_the_frames_of_one_video_are_counted(tmp_path: Path) -> None:
    assert names(pipevault.save(recorded([[image(1), image(2)]]), tmp_path / "a.png")) == ["a-0.png", "a-1.png"]
    flat = pipevault.save(recorded({"frames": [image(1), image(2)]}), tmp_path / "b.png")
    assert names(flat) == ["b-0.png", "b-1.png"]


def test_no_file_takes_the_place_of_another(tmp_path: Path) -> None:
    output = recorded({"a-b": image(1), "a b": image(2), "../a_b": image(3)})
    files = pipevault.save(output, tmp_path / "x.png")
    assert len(set(files)) == 6
    assert {path.parent for path in files} == {tmp_path}
    assert names(files) == ["x-a-b-0.png", "x-a-b-1.png", "x-a_b-2.png"]


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16", "I;16B"])
def test_a_png_has_the_digest_that_its_record_tells(tmp_path: Path, mode: str) -> None:
    made = Image.new(mode, (4, 2), 1 if len(Image.new(mode, (1, 1)).getbands()) == 1 else None)
    if mode == "P":
        made.putpalette([1, 2, 3, 4, 5, 6, 7, 8, 9])
        made.info["transparency"] = 1
    [path, _] = pipevault.save(recorded([made]), tmp_path / "a.png")
    with Image.open(path) as saved:
        assert [pixels_sha256(saved)] == pipevault.read_record(path).results["pixels"]


@pytest.mark.parametrize(
    ("mode", "suffix", "message"),
    [
        ("F", ".png", "mode F cannot be written as .png.*NPY or NPZ"),
        ("I", ".png", "mode I cannot be written as .png.*NPY or NPZ"),
        ("CMYK", ".png", r"mode CMYK cannot .*image\.convert\('RGB'\)"),
        ("I;16", ".webp", "mode I;16 cannot be written as .webp, .*Save it as PNG"),
        ("F", ".webp", "mode F cannot .*NPY or NPZ"),
        ("I;16", ".jpg", "mode I;16 .* as JPEG.*Save it as PNG"),
    ],
)
def test_a_mode_that_a_format_would_change_is_refused(tmp_path: Path, mode: str, suffix: str, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        pipevault.save(recorded([Image.new(mode, (4, 4))]), tmp_path / f"a{suffix}")
    assert list(tmp_path.iterdir()) == []


def test_each_video_has_its_own_digest_and_seed(tmp_path: Path) -> None:
    pytest.importorskip("av")
    frames = [[Image.new("RGB", (32, 32), (10 * value, 0, 0)) for value in (i, i + 1)] for i in range(3)]
    for output, first in ((frames, 2), (np.stack([[np.asarray(f) / 255.0 for f in video] for video in frames]), 1)):
        [_, _, path, sidecar, *_] = pipevault.save(recorded(output, prompts=3), tmp_path / "a.mp4")
        record = pipevault.read_record(path)
        assert record == pipevault.read_record(sidecar)
        assert record.sample == first
        with av_open(path) as container:
            assert f"Seed: {SEEDS[1]}," in container.metadata["description"]


def test_videos_as_a_list_of_arrays(tmp_path: Path) -> None:
    pytest.importorskip("av")
    videos = [np.full((2, 32, 32, 3), value, dtype) for value, dtype in ((0.5, np.float32), (200, np.uint8))]
    assert names(pipevault.save(recorded({"frames": videos}), tmp_path / "a.mp4")) == ["a-0.mp4", "a-1.mp4"]
    [path, _] = pipevault.save(recorded(torch.full((1, 2, 32, 32, 3), 0.5)), tmp_path / "b.mp4")
    with av_open(path) as container:
        [first, _] = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert abs(int(first[0, 0, 0]) - 128) < 4


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ([[Image.new("I;16", (32, 32))]], r"Frame 0 is an image of mode I;16.*save\(output\.frames"),
        (np.full((1, 2, 32, 32, 3), np.nan), "output has values that are not finite"),
        (torch.zeros(1, 2, 3, 32, 32), r"no video to save \(it has output: Tensor \[1, 2, 3, 32, 32\]\)"),
        ({"image": Image.new("RGB", (32, 32))}, r"no video to save \(it has image: Image\)"),
        (np.zeros((1, 2, 32, 32, 3), np.int64), "no video to save"),
    ],
    ids=["16 bits", "nan", "channels first", "one image", "integers"],
)
def test_what_is_no_video(tmp_path: Path, output: Any, message: str) -> None:
    pytest.importorskip("av")
    with pytest.raises(SettingsError, match=message):
        pipevault.save(recorded(output), tmp_path / "a.mp4")
    assert list(tmp_path.iterdir()) == []


TONE = np.sin(np.linspace(0, 40, 800, dtype=np.float32))


def heard(path: Path) -> Any:
    with wave.open(str(path)) as file:
        assert (file.getsampwidth(), file.getframerate()) == (2, 8000)
        return np.frombuffer(file.readframes(file.getnframes()), "<i2").reshape(-1, file.getnchannels())


def test_audio_as_wav(tmp_path: Path) -> None:
    output = recorded({"audios": np.stack([np.stack([TONE, -TONE])] * 2)})
    files = pipevault.save(output, tmp_path / "a.wav", sampling_rate=8000)
    assert names(files) == ["a-0.wav", "a-1.wav"]
    stereo = heard(tmp_path / "a-0.wav")
    assert stereo.shape == (800, 2)
    assert np.abs(stereo[:, 0] / 32767 - TONE).max() < 1e-4
    assert np.array_equal(stereo[:, 0], -stereo[:, 1])
    assert pipevault.read_record(tmp_path / "a-1.wav").sample == 1
    with pytest.raises(SettingsError, match="needs the sampling rate"):
        pipevault.save(output, tmp_path / "b.wav")


@pytest.mark.parametrize("rate", [8000, np.int64(8000), 8000.0])
@pytest.mark.parametrize(
    ("audio", "count", "shape"),
    [
        (TONE, 1, (800, 1)),
        ((TONE * 32767).astype(np.int16), 1, (800, 1)),
        (torch.from_numpy(TONE)[None].bfloat16(), 1, (800, 1)),
        (np.stack([TONE] * 3), 3, (800, 1)),
        ([TONE, TONE[:400]], 2, (800, 1)),
        ([np.stack([TONE, TONE])], 1, (800, 2)),
    ],
    ids=["one", "int16", "bfloat16", "batch", "list", "list of stereo"],
)
def test_audio_of_every_shape_and_an_output_that_knows_its_rate(
    tmp_path: Path, audio: Any, count: int, shape: tuple[int, int], rate: Any
) -> None:
    output = recorded({"latents": np.zeros((1, 4)), "audio": audio, "sampling_rate": rate})
    files = [path for path in pipevault.save(output, tmp_path / "a.wav") if path.suffix == ".wav"]
    assert len(files) == count
    assert heard(files[0]).shape == shape
    assert np.abs(heard(files[0])[:, 0] / 32767 - TONE).max() < 4e-3


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ({"a": TONE, "b": TONE}, r"several fields that may be audio: a, b\. .*save\(output\.a, "),
        ({"audio": np.zeros((800, 2), np.float32)}, r"\[800, 2\], which would be 800 clips of 2 samples"),
        ([np.zeros((800, 2), np.float32)], r"up to 64 channels; this is \[800, 2\]"),
        ({"audio": np.zeros((4097, 1, 2), np.float32)}, "audio has 4097 slices, too many to tell apart"),
        (np.array([0.0, np.inf]), "not finite"),
        (np.zeros(8, np.int32), "not int32"),
        (np.zeros(8, np.complex64), "not complex64"),
        ({"text": "a"}, r"no audio to save \(it has text: str\)"),
        (torch.zeros(8, device="meta"), "cannot be saved: A tensor .*on meta"),
    ],
)
def test_what_is_no_audio(tmp_path: Path, output: Any, message: str) -> None:
    output = Own(output) if isinstance(output, dict) and "text" in output else output
    with pytest.raises(SettingsError, match=message):
        pipevault.save(recorded(output), tmp_path / "a.wav", sampling_rate=8000)


@pytest.mark.parametrize("rate", [0, -1, True, "8000", 8000.5, float("nan"), 2**40, [8000]])
def test_sampling_rates(tmp_path: Path, rate: Any) -> None:
    with pytest.raises(SettingsError, match=re.escape(f"The sampling rate is {rate!r}")):
        pipevault.save(recorded(TONE), tmp_path / "a.wav", sampling_rate=rate)


def test_arrays_as_npy_and_npz(tmp_path: Path) -> None:
    tensor = torch.randn(2, 3).bfloat16()
    pipevault.save(recorded(tensor), tmp_path / "a.npy")
    assert np.array_equal(np.load(tmp_path / "a.npy"), tensor.float().numpy())
    assert pipevault.read_record(tmp_path / "a.npy").sample is None
    output = recorded(Depth([image(1)], np.ones((1, 2))))
    assert names(pipevault.save(output, tmp_path / "b.npz")) == ["b.npz"]
    with np.load(tmp_path / "b.npz") as arrays:
        assert set(arrays) == {"rgb[0]", "depth"}
    assert pipevault.read_record(tmp_path / "b.npz") == pipevault.record_of(output)
    with pytest.raises(SettingsError, match=r"this output has rgb\[0\], depth: save it as \.npz"):
        pipevault.save(output, tmp_path / "c.npy")
    pipevault.save(output.rgb[0], tmp_path / "d.npy")
    assert pipevault.read_record(tmp_path / "d.npy").sample == 0


def test_an_npz_holds_arrays_of_any_name_and_is_the_same_file_again(tmp_path: Path) -> None:
    output = recorded({"file": np.ones(2), "allow_pickle": np.zeros(3), 1: np.ones(1), "a/../b": np.ones(4)})
    pipevault.save(output, tmp_path / "a.npz")
    with np.load(tmp_path / "a.npz") as arrays:
        assert {name: arrays[name].shape for name in arrays} == {
            "file": (2,),
            "allow_pickle": (3,),
            "[1]": (1,),
            "['a/../b']": (4,),
        }
    pipevault.save(output, tmp_path / "b.npz")
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    with zipfile.ZipFile(tmp_path / "a.npz") as archive:
        assert {member.date_time for member in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}


@pytest.mark.parametrize("suffix", [".npy", ".npz"])
def test_what_cannot_be_an_array(tmp_path: Path, suffix: str) -> None:
    with pytest.raises(SettingsError, match="Python objects"):
        pipevault.save(recorded(np.array([print])), tmp_path / f"a{suffix}")
    with pytest.raises(SettingsError, match=r"no arrays, tensors or images to save \(it has text: str\)"):
        pipevault.save(recorded(Own({"text": "a"})), tmp_path / f"a{suffix}")


def test_a_picture_that_was_handed_in_and_returned_is_saved_with_the_rest(tmp_path: Path) -> None:
    given = image(9)
    output = Depth([image(1)], [given])
    results = {**fields()["results"], **digests(output)}
    attach_record(output, sample_record(results=results, call={}), {"image": given})
    files = pipevault.save(output, tmp_path / "a.png")
    assert [pipevault.read_record(path).sample for path in files] == [0, 0, 1, 1]


def test_pictures_of_two_calls_are_not_saved_as_one(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="2 generations"):
        pipevault.save([recorded([image(1)])[0], recorded([image(2)])[0]], tmp_path / "a.png")


@pytest.mark.parametrize(
    ("suffix", "match"),
    [
        (".png", r"no PIL images to save \(it has images: ndarray \[1, 2, 2\]\)\. .*output_type='pil'"),
        (".mp4", "no video to save"),
    ],
)
def test_what_is_not_there_is_named(tmp_path: Path, suffix: str, match: str) -> None:
    with pytest.raises(SettingsError, match=match):
        pipevault.save(recorded({"images": np.zeros((1, 2, 2), np.float32)}), tmp_path / f"a{suffix}")


def test_an_unknown_suffix_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnknownFormatError, match=r"can be saved as \.png, .*\.npz"):
        pipevault.save(recorded([image(1)]), tmp_path / "a.gif")
