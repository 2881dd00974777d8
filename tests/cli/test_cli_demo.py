"""``demo`` and ``explain`` with a cache that freezes nothing: what they print and write, and how they fail."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import pipevault
from helpers.command_runner import Run
from helpers.stand_ins import KEY, NEAREST, FakeCache, FlatPipeline, fake_outcome
from pipevault.cache.outcome import PartOutcome
from pipevault.cli import demo, explain
from pipevault.demo import DIGIT_WORDS
from pipevault.errors import MissError, SettingsError
from pipevault.store.vault import Vault


@pytest.fixture(autouse=True)
def _stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipevault, "PipelineCache", FakeCache, raising=False)
    monkeypatch.setattr(pipevault, "outcome", fake_outcome, raising=False)
    for module in (demo, explain):
        monkeypatch.setattr(module, "open_pipeline", lambda model, **options: FlatPipeline())


def flat_pixels_sha256(seed: int) -> str:
    pixels = b"".join(bytes([seed + digit, 0, 0]) * 32 * 32 for digit in range(10))
    return hashlib.sha256(pixels).hexdigest()


class TestDemo:
    def test_json_has_exactly_the_promised_keys_and_stdout_nothing_else(self, run: Run, tmp_path: Path) -> None:
        result = run("demo", "--dir", tmp_path, "--out", tmp_path / "a.png", "--seed", "7", "--json")
        assert result.exit_code == 0, result.output
        document = json.loads(result.stdout)
        assert list(document) == ["outcome", "key", "ready_s", "pixels_sha256", "parts"]
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

    def test_an_error_of_the_cache_sets_the_exit_code(
        self, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def load(*_: Any, **__: Any) -> None:
            raise MissError("The vault holds no entry.", KEY.digest.hex, "empty")

        monkeypatch.setattr(FakeCache, "load", load)
        result = run("demo", "--mode", "require", "--out", tmp_path / "a.png")
        assert (result.exit_code, result.stderr) == (4, "pipevault: The vault holds no entry.\n")
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
        with pytest.raises(SettingsError, match="--out"):
            demo.save_grid([Image.new("RGB", (4, 4))], tmp_path / "none" / "a.png")


class TestExplain:
    def test_text_names_each_factor_that_differs(self, run: Run, tmp_path: Path) -> None:
        result = run("explain", "demo", "--dir", tmp_path)
        assert result.exit_code == 0, result.output
        assert NEAREST.short in result.stdout
        [row] = [line for line in result.stdout.splitlines() if "machine.threads" in line]
        assert row.split() == ["machine.threads", "2", "1"]

    def test_json(self, run: Run, tmp_path: Path) -> None:
        document = json.loads(run("explain", "demo", "--dir", tmp_path, "--json").stdout)
        assert document == {
            "status": "miss",
            "reason": "no entry has this key",
            "mode": "compile",
            "load": "would compile and store an entry",
            "key": KEY.digest.hex,
            "vault": str(tmp_path),
            "tier": "",
            "problems": [],
            "parts": {},
            "nearest": NEAREST.hex,
            "differences": [{"factor": "machine.threads", "ours": 2, "theirs": 1}],
        }

    def test_a_miss_in_mode_require_would_be_an_error(self, run: Run, tmp_path: Path) -> None:
        result = run("explain", "demo", "--dir", tmp_path, "--mode", "require")
        assert result.exit_code == 0, result.output
        assert "would be an error: mode is require" in result.stdout

    def test_mode_off_would_do_nothing(self, run: Run, tmp_path: Path) -> None:
        assert "would leave the pipeline as it is" in run("explain", "demo", "--dir", tmp_path, "--mode", "off").stdout

    @pytest.fixture
    def _entry(self, monkeypatch: pytest.MonkeyPatch) -> None:
        explanation = pipevault.Explanation(KEY, "hit", "entry 1 is in the vault", parts=self.parts())
        monkeypatch.setattr(FakeCache, "explanation", explanation)

    def parts(self) -> dict[str, PartOutcome]:
        return {
            "unet": PartOutcome("frozen", "", 1),
            "vae.decoder": PartOutcome("eager", "it keeps state"),
            "vae.encoder": PartOutcome("not called"),
        }

    @pytest.mark.usefixtures("_entry")
    def test_an_entry_with_an_eager_part_is_partial_and_says_why(self, run: Run, tmp_path: Path) -> None:
        document = json.loads(run("explain", "demo", "--dir", tmp_path, "--json").stdout)
        assert document["status"] == "partial"
        assert document["reason"] == "entry 1 is in the vault; vae.decoder: it keeps state"
        assert document["load"] == "would load the entry; some parts would run eagerly"
        assert document["parts"]["vae.decoder"] == {
            "status": "eager",
            "reason": "it keeps state",
            "graphs": 0,
            "regions": "",
        }

    @pytest.mark.usefixtures("_entry")
    def test_an_entry_whose_called_parts_are_frozen_is_a_hit(
        self, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        parts = {**self.parts(), "vae.decoder": PartOutcome("frozen", "", 1)}
        explanation = replace(FakeCache.explanation, parts=parts, tier="/shared", problems=("tier /old is no vault",))
        monkeypatch.setattr(FakeCache, "explanation", explanation)
        document = json.loads(run("explain", "demo", "--dir", tmp_path, "--mode", "require", "--json").stdout)
        assert (document["status"], document["load"]) == ("hit", "would load the entry")
        assert (document["tier"], document["problems"]) == ("/shared", ["tier /old is no vault"])
        text = run("explain", "demo", "--dir", tmp_path).stdout
        assert re.search(r"tier +/shared\n", text)
        assert re.search(r"problem +tier /old is no vault\n", text)

    def test_a_miss_of_a_vault_that_cannot_be_written_would_be_an_error(
        self, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        vault = Vault.open(tmp_path / "vault")
        monkeypatch.setattr(Vault, "of", lambda settings: replace(vault, writable=False))
        assert "would be an error: the vault cannot be written" in run("explain", "demo", "--dir", vault.root).stdout
        monkeypatch.setenv("PIPEVAULT_ON_UNFROZEN", "eager")
        assert "cannot be written" not in run("explain", "demo", "--dir", vault.root).stdout

    def test_the_demo_is_explained_for_the_call_that_demo_makes(self, run: Run, tmp_path: Path) -> None:
        run("demo", "--out", tmp_path / "a.png")
        demo_shape = FakeCache.used["shape"]
        run("explain", "demo")
        assert FakeCache.used["shape"] == {**demo_shape, "parts": None}

    def test_options_become_the_shape(self, run: Run) -> None:
        run("explain", "m", "--size", "768x512", "--batch-size", "2", "--frames", "9", "--no-guidance")
        assert FakeCache.used["shape"] == {
            "batch_size": 2,
            "num_frames": 9,
            "guidance": False,
            "height": 512,
            "width": 768,
            "parts": None,
        }

    def test_weights_and_parts(self, run: Run) -> None:
        run("explain", "m", "--weights", "baked", "--parts", "unet, vae.decoder", "--parts", "text_encoder")
        assert FakeCache.used["weights"] == "baked"
        assert FakeCache.used["shape"]["parts"] == ("unet", "vae.decoder", "text_encoder")

    @pytest.mark.parametrize("names", ["", ",", "unet,,vae"])
    def test_a_part_without_a_name(self, run: Run, names: str) -> None:
        result = run("explain", "m", "--parts", names)
        assert (result.exit_code, "--parts takes names" in result.stderr) == (2, True)

    def test_a_size_that_is_none(self, run: Run) -> None:
        result = run("explain", "demo", "--size", "big")
        assert result.exit_code == 2
        assert "'big' is no size" in result.stderr

    @pytest.mark.parametrize("option", ["--batch-size", "--frames"])
    def test_numbers_below_one(self, run: Run, option: str) -> None:
        assert run("explain", "demo", option, "0").exit_code == 2
