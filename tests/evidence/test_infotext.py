"""The text about an image that other tools read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from helpers.sample_records import SEEDS, fields, picture, sample_record, with_call
from helpers.saved_files import infotext, parsed, png_chunks
from pipevault.calls.describe import pixels_sha256
from pipevault.errors import SettingsError
from pipevault.evidence.record_files.embed import IMAGE_SUFFIXES, read_record, write_image


@pytest.fixture
def png_path(tmp_path: Path) -> Path:
    return write_image(picture(), tmp_path / "out.png", sample_record(), index=0)


def one_result() -> dict[str, Any]:
    return {**fields()["results"], "pixels": [pixels_sha256(picture())]}


class TestInfotext:
    def test_all_of_it(self, png_path: Path) -> None:
        assert infotext(png_path) == (
            "a seven\n"
            "Negative prompt: blurry, dark\n"
            "Steps: 12, Sampler: DDIMScheduler, CFG scale: 3.0, Seed: 1234567, Size: 32x32, Model: org/digits, "
            "Version: pipevault 0.1.0"
        )

    @pytest.mark.parametrize("suffix", IMAGE_SUFFIXES)
    def test_each_image_of_a_batch_has_its_own_seed_and_prompt(self, tmp_path: Path, suffix: str) -> None:
        paths = [
            write_image(picture(index), tmp_path / f"{index}{suffix}", sample_record(), index=index)
            for index in range(3)
        ]
        texts = [parsed(infotext(path)) for path in paths]
        assert [text["Seed"] for text in texts] == [str(seed) for seed in SEEDS]
        assert [text["Prompt"] for text in texts] == ["a seven", "an eight", "a nine"]
        assert [read_record(path).sample for path in paths] == [0, 1, 2]

    def test_several_images_for_each_prompt(self, tmp_path: Path) -> None:
        call = {"prompt": ["a", "b"], "negative_prompt": ["c", "d"], "num_images_per_prompt": 2}
        seeds = {"root": 7, "samples": [10, 11, 12, 13], "source": "argument", "streams": {}}
        record = sample_record(call=call, seeds=seeds)
        paths = [write_image(picture(), tmp_path / f"{index}.png", record, index=index) for index in range(4)]
        texts = [parsed(infotext(path)) for path in paths]
        found = [(text["Prompt"], text["Negative prompt"], text["Seed"]) for text in texts]
        assert found == [("a", "c", "10"), ("a", "c", "11"), ("b", "d", "12"), ("b", "d", "13")]

    def test_a_batch_from_one_generator_tells_which_image_it_is(self, tmp_path: Path) -> None:
        record = sample_record(seeds={"root": None, "samples": [99], "source": "generator", "streams": {}})
        text = parsed(infotext(write_image(picture(), tmp_path / "out.png", record, index=2)))
        assert (text["Seed"], text["Batch size"], text["Batch pos"]) == ("99", "3", "2")

    def test_a_random_seed_is_never_minus_one(self, tmp_path: Path) -> None:
        record = sample_record(
            call={"seed": -1}, seeds={"root": 5, "samples": [], "source": "random", "streams": {}}, results=one_result()
        )
        assert parsed(infotext(write_image(picture(), tmp_path / "out.png", record, index=0)))["Seed"] == "5"

    def test_a_sample_whose_seed_is_not_known_gets_none(self, tmp_path: Path) -> None:
        record = sample_record(seeds={"root": 5, "samples": [1, 2], "source": "generator", "streams": {}})
        assert "Seed" not in parsed(infotext(write_image(picture(), tmp_path / "out.png", record, index=2)))

    def test_size_is_that_of_the_image(self, tmp_path: Path) -> None:
        path = write_image(picture(size=(40, 24)), tmp_path / "out.png", sample_record(), index=0)
        assert parsed(infotext(path))["Size"] == "40x24"

    @pytest.mark.parametrize(
        ("model", "shown"),
        [
            ("org/name", "org/name"),
            ("/home/someone/models/mine", "mine"),
            ("./models/mine", "mine"),
            ("a, b: c", "a, b: c"),
        ],
    )
    def test_model_without_the_folders_of_this_machine(self, tmp_path: Path, model: str, shown: str) -> None:
        record = sample_record(pipeline={"class": "X", "model": model, "revision": None})
        text = parsed(infotext(write_image(picture(), tmp_path / "out.png", record, index=0)))
        assert text["Model"] == shown
        assert "Sampler" not in text

    @pytest.mark.parametrize("index", [-1, 3])
    def test_an_index_that_the_batch_does_not_have(self, tmp_path: Path, index: int) -> None:
        with pytest.raises(SettingsError, match="3 samples"):
            write_image(picture(), tmp_path / "out.png", sample_record(), index=index)

    def test_latin_1_is_text_and_the_rest_international_text(self, tmp_path: Path) -> None:
        for prompt, kind in (("é", b"tEXt"), ("漢", b"iTXt")):
            path = write_image(picture(), tmp_path / "out.png", with_call(prompt=prompt), index=0)
            [found] = [found for found, data in png_chunks(path.read_bytes()) if data.startswith(b"parameters\0")]
            assert found == kind
