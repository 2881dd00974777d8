"""``demo`` with a cache that freezes nothing: what it prints and writes, and how it fails."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import pipevault
from helpers.command_runner import Run
from helpers.stand_ins import KEY, FakeCache, FlatPipeline, fake_outcome
from pipevault.cli import demo
from pipevault.demo import DIGIT_WORDS
from pipevault.errors import CannotSaveError
from pipevault.opening import open_pipeline


@pytest.fixture(scope="module")
def real_cache() -> type[Any]:
    """The cache as it is before a test puts a stand-in in its place."""
    return pipevault.PipelineCache


@pytest.fixture(autouse=True)
def _stand_ins(monkeypatch: pytest.MonkeyPatch, real_cache: type[Any]) -> None:
    monkeypatch.setattr(pipevault, "PipelineCache", FakeCache, raising=False)
    monkeypatch.setattr(pipevault, "outcome", fake_outcome, raising=False)
    monkeypatch.setattr(demo, "open_pipeline", lambda model, **options: FlatPipeline())


def flat_pixels_sha256(seed: int) -> str:
    pixels = b"".join(bytes([seed + digit, 0, 0]) * 32 * 32 for digit in range(10))
    return hashlib.sha256(pixels).hexdigest()


class TestDemo:
    def test_json_has_exactly_the_promised_keys_and_stdout_nothing_else(self, run: Run, tmp_path: Path) -> None:
        result = run("demo", "--dir", tmp_path, "--out", tmp_path / "a.png", "--seed", "7", "--json")
        assert result.exit_code == 0, result.output
        document = json.loads(result.stdout)
        assert list(document) == ["outcome", "key", "ready_s", "pixels_sha256", "picture", "parts"]
        assert document["picture"] == str(tmp_path / "a.png")
        assert document["outcome"] == "miss"
        assert document["key"] == KEY.digest.hex
        assert document["ready_s"] >= 0
        assert document["pixels_sha256"] == flat_pixels_sha256(7)
        assert document["parts"]["vae.decoder"] == {
            "status": "eager",
            "reason": "it keeps state",
            "graphs": 0,
            "regions": "",
        }
        assert "unet: compiling" in result.stderr

    def test_text(self, run: Run, tmp_path: Path) -> None:
        result = run("demo", "--out", tmp_path / "a.png")
        assert "miss (no entry for this model yet)" in result.stdout
        assert flat_pixels_sha256(0) in result.stdout
        assert KEY.digest.hex in result.stdout
        assert "it keeps state" in result.stdout

    def test_text_names_the_fields_as_json_does(self, run: Run, tmp_path: Path) -> None:
        words = [line.split()[:1] for line in run("demo", "--out", tmp_path / "a.png").stdout.splitlines()]
        assert words[:5] == [["outcome"], ["key"], ["ready_s"], ["pixels_sha256"], ["picture"]]

    def test_drawing_is_told_after_loading(self, run: Run, tmp_path: Path) -> None:
        result = run("demo", "--out", tmp_path / "a.png", "--json")
        steps = [line.partition("] ")[2] for line in result.stderr.splitlines()]
        assert [step.partition(" - ")[0] for step in steps] == [
            "unet: compiling",
            "unet: compiling",
            "drawing",
            "drawing",
        ]
        assert re.fullmatch(r"drawing - done in \d+\.\d\d s", steps[-1])

    def test_settings_reach_the_cache(self, run: Run, tmp_path: Path) -> None:
        run("demo", "--dir", tmp_path / "v", "--mode", "require", "--out", tmp_path / "a.png")
        assert (FakeCache.used["dir"], FakeCache.used["mode"]) == (tmp_path / "v", "require")
        assert FakeCache.used["shape"] == {"batch_size": 10, "guidance": True}

    def test_without_a_key(self, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(FakeCache, "report", pipevault.Outcome("off", reason="mode is off"))
        result = run("demo", "--out", tmp_path / "a.png", "--json")
        assert (json.loads(result.stdout)["key"], json.loads(result.stdout)["parts"]) == (None, {})
        assert "none" in run("demo", "--out", tmp_path / "a.png").stdout

    @pytest.mark.parametrize("seed", ["-1", str(2**63), "seven"])
    def test_a_seed_that_no_generator_takes(self, run: Run, tmp_path: Path, seed: str) -> None:
        assert run("demo", "--seed", seed, "--out", tmp_path / "a.png").exit_code == 2

    def test_the_largest_seed(self, run: Run, tmp_path: Path) -> None:
        assert run("demo", "--seed", str(demo.LAST_SEED), "--out", tmp_path / "a.png").exit_code == 0

    @pytest.mark.parametrize("out", ["", "none/a.png"])
    def test_a_picture_that_cannot_be_written_is_refused_before_anything_is_compiled(
        self, run: Run, tmp_path: Path, out: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def load(*_: Any, **__: Any) -> None:
            raise AssertionError("loaded")

        monkeypatch.setattr(FakeCache, "load", load)
        result = run("demo", "--out", tmp_path / out)
        assert result.exit_code == 2
        assert "--out" in result.stderr


def test_a_miss_in_mode_require_ends_it(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, real_cache: type[Any]
) -> None:
    monkeypatch.setattr(pipevault, "PipelineCache", real_cache)
    monkeypatch.setattr(demo, "open_pipeline", open_pipeline)
    result = run("demo", "--mode", "require", "--dir", tmp_path / "none", "--out", tmp_path / "a.png", "--json")
    assert (result.exit_code, json.loads(result.stdout)["code"]) == (1, "miss")
    assert result.stderr.startswith("pipevault: miss: ")
    assert not (tmp_path / "a.png").exists()


class TestPictures:
    def test_the_grid_has_five_to_a_row_and_a_word_under_each(self, tmp_path: Path) -> None:
        pictures = [Image.new("RGB", (32, 32), (20 * n, 0, 0)) for n in range(10)]
        demo.save_grid(pictures, tmp_path / "grid.png")
        with Image.open(tmp_path / "grid.png") as grid:
            cell_px = 32 * 5 + 8
            assert grid.width == 5 * cell_px + 8
            for index, word in enumerate(DIGIT_WORDS):
                left_px, top_px = 8 + index % 5 * cell_px, 8 + index // 5 * (cell_px + 24)
                assert grid.getpixel((left_px + 80, top_px + 80)) == (20 * index, 0, 0)
                label = grid.crop((left_px, top_px + 160, left_px + 160, top_px + 184)).convert("L")
                assert label.getextrema()[0] < 100, word

    def test_the_digest_covers_the_pixels_alone(self, tmp_path: Path) -> None:
        picture = Image.new("RGB", (4, 4), (1, 2, 3))
        assert demo.pixels_sha256([picture]) == hashlib.sha256(bytes([1, 2, 3]) * 16).hexdigest()
        assert demo.pixels_sha256([picture.convert("RGBA")]) == demo.pixels_sha256([picture])

    def test_a_picture_that_cannot_be_written(self, tmp_path: Path) -> None:
        with pytest.raises(CannotSaveError, match="Give the path of a file in a folder"):
            demo.save_grid([Image.new("RGB", (4, 4))], tmp_path / "none" / "a.png")
