"""Records inside videos."""

from __future__ import annotations

import builtins
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from helpers.sample_records import FRAMES, SEEDS, picture, sample_record, with_call
from pipevault.errors import MissingExtraError, NoRecordError, RecordDigestError, SettingsError
from pipevault.evidence.record_files.embed import read_record, write_sidecar, write_video

av = pytest.importorskip("av")


def without(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make ``import name`` fail."""
    real = builtins.__import__

    def refuse(module: str, *arguments: Any, **keywords: Any) -> Any:
        if module.partition(".")[0] == name:
            raise ModuleNotFoundError(f"No module named {name!r}")
        return real(module, *arguments, **keywords)

    monkeypatch.setattr(builtins, "__import__", refuse)


class TestVideo:
    @pytest.mark.parametrize("prompt", ["a seven", "ü漢字😀\n«ß»", "x" * 300_000], ids=["short", "unicode", "huge"])
    def test_there_and_back(self, tmp_path: Path, prompt: str) -> None:
        record = with_call(prompt=prompt)
        path = write_video(FRAMES, tmp_path / "out.mp4", record, fps=8, index=1)
        assert read_record(path) == record.of_sample(1)
        with av.open(str(path)) as container:
            assert container.metadata["description"].startswith(prompt[:1000])
            assert f"Seed: {SEEDS[1]}," in container.metadata["description"]

    @pytest.mark.parametrize("size", [(32, 32), (31, 17)])
    def test_frames(self, tmp_path: Path, size: tuple[int, int]) -> None:
        frames = [Image.new("RGB", size, (60 * index, 30, 200)) for index in range(4)]
        path = write_video(frames, tmp_path / "out.mp4", sample_record(), fps=24000 / 1001)
        with av.open(str(path)) as container:
            read = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
            assert (container.streams.video[0].average_rate.numerator, len(read)) == (24000, 4)
        for frame, original in zip(read, frames, strict=True):
            assert frame.shape == (size[1], size[0], 3)
            assert np.abs(frame.astype(int) - np.asarray(original).astype(int)).max() < 12

    def test_arrays_and_the_same_frames_as_images_make_the_same_file(self, tmp_path: Path) -> None:
        arrays = np.stack([np.asarray(frame) for frame in FRAMES])
        write_video(FRAMES, tmp_path / "a.mp4", sample_record(), fps=8)
        write_video(arrays, tmp_path / "b.mp4", sample_record(), fps=8)  # type: ignore[arg-type]
        assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()

    def test_one_file_again_and_again_while_memory_is_handed_around(self, tmp_path: Path) -> None:
        sizes = np.random.default_rng(0).integers(1, 50_000, 200)
        held: list[bytes] = []
        files = set()
        for size in sizes:
            held = [*held[-20:], b"\xa5" * int(size)]
            files.add(write_video(FRAMES, tmp_path / "out.mp4", sample_record(), fps=8).read_bytes())
        assert len(files) == 1

    def test_the_digests_of_frames_are_not_taken_for_samples(self, tmp_path: Path) -> None:
        record = sample_record(
            call={"prompt": "a seven"}, seeds={"root": 7, "samples": [7], "source": "argument", "streams": {}}
        )
        path = write_video(FRAMES, tmp_path / "out.mp4", record, fps=8)
        with av.open(str(path)) as container:
            assert "Batch" not in container.metadata["description"]

    @pytest.mark.parametrize("fps", [0, -1, float("nan"), float("inf"), True, "8"])
    def test_frame_rates(self, tmp_path: Path, fps: Any) -> None:
        with pytest.raises(SettingsError, match="fps"):
            write_video(FRAMES, tmp_path / "out.mp4", sample_record(), fps=fps)
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize(
        ("frames", "message"),
        [
            ([], "at least one frame"),
            ([picture(), picture(size=(16, 16))], "Frame 1"),
            ([np.zeros((8, 8, 3))], "float64"),
            ([np.zeros((8, 8), np.uint8)], r"\(8, 8\)"),
        ],
        ids=["none", "sizes", "floats", "grey"],
    )
    def test_frames_that_make_no_video(self, tmp_path: Path, frames: Any, message: str) -> None:
        with pytest.raises(SettingsError, match=message):
            write_video(frames, tmp_path / "out.mp4", sample_record(), fps=8)

    def test_without_pyav(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path = write_video(FRAMES, tmp_path / "out.mp4", sample_record(), fps=8)
        without("av", monkeypatch)
        with pytest.raises(MissingExtraError, match=r"pipevault\[video\]") as caught:
            write_video(FRAMES, tmp_path / "other.mp4", sample_record(), fps=8)
        assert caught.value.extra == "video"
        with pytest.raises(MissingExtraError):
            read_record(path)
        write_sidecar(path, sample_record())
        assert read_record(path) == sample_record()

    def test_metadata_that_is_not_utf_8(self, tmp_path: Path) -> None:
        path = write_video(FRAMES, tmp_path / "out.mp4", sample_record(), fps=8)
        path.write_bytes(path.read_bytes().replace(b"Negative", b"Neg\xfftive"))
        assert read_record(path) == sample_record().of_sample(0)

    def test_an_edited_record(self, tmp_path: Path) -> None:
        path = write_video(FRAMES, tmp_path / "out.mp4", sample_record(), fps=8)
        path.write_bytes(path.read_bytes().replace(b"an eight", b"an eigth"))
        with pytest.raises(RecordDigestError):
            read_record(path)

    def test_a_plain_video(self, tmp_path: Path) -> None:
        path = write_video(FRAMES, tmp_path / "out.mp4", sample_record(), fps=8)
        path.write_bytes(path.read_bytes().replace(b"pipevault_record", b"pipecault_record"))
        with pytest.raises(NoRecordError, match="holds no run record"):
            read_record(path)

    def test_a_file_that_is_no_video(self, tmp_path: Path) -> None:
        (tmp_path / "out.mp4").write_bytes(b"hello" * 100)
        with pytest.raises(NoRecordError, match="cannot be read as a video"):
            read_record(tmp_path / "out.mp4")
