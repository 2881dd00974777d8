"""Records inside files: every format there and back, what other tools read, every bad file."""

from __future__ import annotations

import bisect
import json
import os
import random
import re
import threading
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from helpers.sample_records import FRAMES, SEEDS, picture, sample_record, with_call
from helpers.saved_files import IMAGE_DESCRIPTION, infotext, parsed, png, png_chunks
from pipevault.calls.describe import pixels_sha256
from pipevault.errors import (
    BadRecordError,
    CannotSaveError,
    NewerRecordError,
    NoRecordError,
    RecordDigestError,
    RecordError,
    RecordTooLargeError,
    SettingsError,
)
from pipevault.evidence.record_files.embed import (
    IMAGE_SUFFIXES,
    read_record,
    sidecar_path,
    write_image,
    write_sidecar,
    write_video,
)
from pipevault.runtime.record import RunRecord

LOSSLESS = (".png", ".webp")


def replace_record(path: Path, change: Callable[[bytes], bytes]) -> None:
    """Rewrite the record's iTXt chunk of a PNG, with the right length and CRC."""
    changed = [
        (kind, change(data) if data.startswith(b"pipevault\0") else data)
        for kind, data in png_chunks(path.read_bytes())
    ]
    path.write_bytes(png(changed))


@pytest.fixture
def png_path(tmp_path: Path) -> Path:
    return write_image(picture(), tmp_path / "out.png", sample_record(), index=0)


class TestRoundTrip:
    @pytest.mark.parametrize("suffix", [*IMAGE_SUFFIXES, ".PNG", ".JPG"])
    @pytest.mark.parametrize(
        "prompt",
        ["a seven", "ü漢字😀 «ß»", "two\nlines, with: marks", 'quotes " \\', "", "\0\x07bell", "é only Latin-1"],
        ids=ascii,
    )
    def test_image(self, tmp_path: Path, suffix: str, prompt: str) -> None:
        record = with_call(prompt=prompt)
        path = write_image(picture(), tmp_path / f"out{suffix}", record, index=1)
        assert read_record(path) == record.of_sample(1)
        text = parsed(infotext(path))
        assert text["Prompt"] == prompt.translate(dict.fromkeys((0, 7))).strip()
        assert text["Seed"] == str(SEEDS[1])

    @pytest.mark.parametrize("suffix", LOSSLESS)
    @pytest.mark.parametrize("mode", ["RGB", "RGBA"])
    def test_no_pixel_changes(self, tmp_path: Path, suffix: str, mode: str) -> None:
        image = picture(3, mode=mode, size=(33, 17))
        path = write_image(image, tmp_path / f"out{suffix}", sample_record(), index=0)
        with Image.open(path) as read:
            assert read.mode == mode
            assert np.array_equal(np.asarray(read), np.asarray(image))
            assert pixels_sha256(read) == pixels_sha256(image)

    def test_grey_png_keeps_its_pixels(self, tmp_path: Path) -> None:
        image = picture(mode="L")
        with Image.open(write_image(image, tmp_path / "out.png", sample_record(), index=0)) as read:
            assert pixels_sha256(read) == pixels_sha256(image)

    def test_the_record_costs_a_jpeg_no_quality(self, tmp_path: Path) -> None:
        path = write_image(picture(), tmp_path / "out.jpg", sample_record(), index=0)
        picture().save(tmp_path / "plain.jpg", quality=95, subsampling=0)
        with Image.open(path) as read, Image.open(tmp_path / "plain.jpg") as plain:
            assert pixels_sha256(read) == pixels_sha256(plain)

    @pytest.mark.parametrize("suffix", LOSSLESS)
    def test_huge_prompt(self, tmp_path: Path, suffix: str) -> None:
        record = with_call(prompt="漢" * 2_000_000)
        assert read_record(write_image(picture(), tmp_path / f"out{suffix}", record, index=0)) == record.of_sample(0)

    def test_the_record_as_published(self, tmp_path: Path) -> None:
        """A second implementation finds it there."""
        write_image(picture(), tmp_path / "out.png", sample_record(), index=2)
        write_image(picture(), tmp_path / "out.jpg", sample_record(), index=2)
        expected = sample_record().of_sample(2).to_document()
        with Image.open(tmp_path / "out.png") as image:
            assert json.loads(image.info["pipevault"]) == expected
        with Image.open(tmp_path / "out.jpg") as image:
            assert json.loads(image.getexif()[IMAGE_DESCRIPTION]) == expected

    def test_a_text_chunk_that_another_tool_compressed(self, png_path: Path) -> None:
        with Image.open(png_path) as image:
            info = PngInfo()
            info.add_itxt("comment", "first")
            info.add_itxt("pipevault", image.info["pipevault"], lang="en", tkey="tresor", zip=True)
            image.save(png_path, pnginfo=info)
        assert read_record(png_path) == sample_record().of_sample(0)

    def test_the_name_need_not_fit_the_content(self, png_path: Path) -> None:
        assert read_record(png_path.rename(png_path.with_suffix(".bin"))) == sample_record().of_sample(0)


class TestJpegLimit:
    def test_a_long_record_is_compressed(self, tmp_path: Path) -> None:
        record = with_call(prompt="a seven", notes=["the same again"] * 10_000)
        path = write_image(picture(), tmp_path / "out.jpg", record, index=0)
        assert path.stat().st_size < 65_536
        assert read_record(path) == record.of_sample(0)

    def test_every_length_near_the_limit(self, tmp_path: Path) -> None:
        def is_compressed(length: int) -> bool:
            record = with_call(notes="n" * length)
            path = write_image(picture(), tmp_path / "out.jpg", record, index=0)
            assert read_record(path) == record.of_sample(0)
            return b"pipevault+zlib:" in path.read_bytes()

        longest = bisect.bisect_left(range(65_533), True, key=is_compressed) - 1
        assert [is_compressed(length) for length in range(longest - 8, longest + 10)] == [False] * 9 + [True] * 9

    def test_one_that_does_not_fit(self, tmp_path: Path) -> None:
        noise = random.Random(0).randbytes(60_000).hex()
        with pytest.raises(RecordTooLargeError, match="Save as PNG or WebP"):
            write_image(picture(), tmp_path / "out.jpg", with_call(notes=noise), index=0)
        assert list(tmp_path.iterdir()) == []


class TestChangedRecords:
    def test_one_character_of_a_prompt(self, png_path: Path) -> None:
        replace_record(png_path, lambda data: data.replace(b"a seven", b"a sevem"))
        with pytest.raises(RecordDigestError, match=r"out\.png was changed"):
            read_record(png_path)

    @pytest.mark.parametrize("rest", [b"", b"\0", b"\0\0", b"\0\0\0\0", b"\x01\0\0\0no zlib", b"\0\0\0\0\xff\xfe"])
    def test_a_chunk_that_holds_something_else(self, png_path: Path, rest: bytes) -> None:
        replace_record(png_path, lambda _: b"pipevault\0" + rest)
        with pytest.raises(RecordDigestError):
            read_record(png_path)

    def test_any_character(self, png_path: Path) -> None:
        original = png_path.read_bytes()
        [chunk] = [data for kind, data in png_chunks(original) if data.startswith(b"pipevault\0")]
        for position in random.Random(1).sample(range(len(b"pipevault") + 5, len(chunk)), 150):
            changed = bytearray(chunk)
            changed[position] ^= 1
            replace_record(png_path, lambda _, changed=changed: bytes(changed))  # type: ignore[misc]
            with pytest.raises((RecordDigestError, BadRecordError)):
                read_record(png_path)
            png_path.write_bytes(original)

    def test_an_edit_that_did_not_mend_the_checksum_of_the_chunk(self, png_path: Path) -> None:
        png_path.write_bytes(png_path.read_bytes().replace(b"an eight", b"an eigth"))
        with pytest.raises(RecordDigestError):
            read_record(png_path)

    def test_no_json_any_more(self, png_path: Path) -> None:
        replace_record(png_path, lambda data: data.replace(b'{"call"', b'["call"'))
        with pytest.raises(RecordDigestError):
            read_record(png_path)

    def test_newer(self, png_path: Path) -> None:
        replace_record(png_path, lambda data: data.replace(b'"pipevault_record":2', b'"pipevault_record":3'))
        with pytest.raises(NewerRecordError, match=r"out\.png is of version 3"):
            read_record(png_path)

    @pytest.mark.parametrize("suffix", [".jpg", ".webp"])
    def test_exif(self, tmp_path: Path, suffix: str) -> None:
        path = write_image(picture(), tmp_path / f"out{suffix}", sample_record(), index=0)
        path.write_bytes(path.read_bytes().replace(b"an eight", b"an eigth"))
        with pytest.raises(RecordDigestError):
            read_record(path)

    def test_compressed_exif(self, tmp_path: Path) -> None:
        record = with_call(notes=["the same again"] * 10_000)
        path = write_image(picture(), tmp_path / "out.jpg", record, index=0)
        data = path.read_bytes()
        for old, new in ((b"zlib:eN", b"zlib:xN"), (b"zlib:eN", b"zlib:e!")):
            path.write_bytes(data.replace(old, new))
            with pytest.raises(RecordDigestError):
                read_record(path)

    def test_a_good_sidecar_does_not_hide_it(self, png_path: Path) -> None:
        write_sidecar(png_path, sample_record())
        replace_record(png_path, lambda data: data.replace(b"a seven", b"a sevem"))
        with pytest.raises(RecordDigestError):
            read_record(png_path)

    def test_sidecar(self, tmp_path: Path) -> None:
        sidecar = write_sidecar(tmp_path / "out.png", sample_record())
        sidecar.write_text(sidecar.read_text().replace("a seven", "a three"))
        with pytest.raises(RecordDigestError):
            read_record(sidecar)


class TestNoRecord:
    @pytest.mark.parametrize("suffix", IMAGE_SUFFIXES)
    def test_a_plain_image(self, tmp_path: Path, suffix: str) -> None:
        picture().save(tmp_path / f"plain{suffix}")
        with pytest.raises(NoRecordError, match=rf"plain{re.escape(suffix)} holds no run record.*sidecar \(\.json\)"):
            read_record(tmp_path / f"plain{suffix}")

    def test_no_file(self, tmp_path: Path) -> None:
        with pytest.raises(NoRecordError, match="No file"):
            read_record(tmp_path / "none.png")

    def test_a_folder(self, tmp_path: Path) -> None:
        with pytest.raises(NoRecordError):
            read_record(tmp_path)

    def test_a_file_that_is_no_image(self, tmp_path: Path) -> None:
        (tmp_path / "notes.txt").write_text("hello")
        with pytest.raises(NoRecordError, match="cannot be read as an image"):
            read_record(tmp_path / "notes.txt")

    def test_a_json_that_is_no_record(self, tmp_path: Path) -> None:
        (tmp_path / "notes.json").write_text("{}")
        with pytest.raises(NoRecordError):
            read_record(tmp_path / "notes.json")

    def test_a_caption_of_someone_else(self, tmp_path: Path) -> None:
        exif = Image.Exif()
        exif[IMAGE_DESCRIPTION] = '{"title": "a sunset"}'
        picture().save(tmp_path / "photo.jpg", exif=exif)
        with pytest.raises(NoRecordError, match="holds no run record"):
            read_record(tmp_path / "photo.jpg")

    def test_exif_that_is_cut_short(self, tmp_path: Path) -> None:
        picture().save(tmp_path / "photo.webp", exif=b"II*\0\x08")
        with pytest.raises(NoRecordError, match="cannot be read as an image"):
            read_record(tmp_path / "photo.webp")

    def test_the_parameters_of_another_tool(self, tmp_path: Path) -> None:
        info = PngInfo()
        info.add_text("parameters", "a seven\nSteps: 12, Sampler: Euler a, Seed: -1")
        picture().save(tmp_path / "other.png", pnginfo=info)
        with pytest.raises(NoRecordError):
            read_record(tmp_path / "other.png")

    @pytest.mark.filterwarnings("ignore:Tag data larger than file")
    @pytest.mark.parametrize("suffix", IMAGE_SUFFIXES)
    def test_cut_short_or_damaged_it_is_one_of_our_errors(self, tmp_path: Path, suffix: str) -> None:
        path = write_image(picture(), tmp_path / f"out{suffix}", sample_record(), index=0)
        data = path.read_bytes()
        draw = random.Random(2)
        for _ in range(150):
            damaged = bytearray(data[: draw.randrange(1, len(data))] if draw.random() < 0.5 else data)
            for _ in range(4):
                damaged[draw.randrange(len(damaged))] = draw.randrange(256)
            path.write_bytes(damaged)
            try:
                assert read_record(path) == sample_record().of_sample(0)
            except RecordError:
                continue

    def test_a_chunk_that_expands_without_end(self, png_path: Path) -> None:
        bomb = zlib.compress(b" " * (1 << 27))
        replace_record(png_path, lambda _: b"pipevault\0\x01\0\0\0" + bomb)
        with pytest.raises(BadRecordError, match="longer than 32 MiB"):
            read_record(png_path)


class TestSidecar:
    def test_there_and_back(self, tmp_path: Path) -> None:
        path = write_sidecar(tmp_path / "out.png", with_call(prompt="ü漢😀"))
        assert path == tmp_path / "out.png.json" == sidecar_path(tmp_path / "out.png")
        assert read_record(path) == with_call(prompt="ü漢😀")
        assert "ü漢😀" in path.read_text("utf-8")

    def test_stands_in_where_another_tool_removed_the_record(self, tmp_path: Path) -> None:
        picture().save(tmp_path / "out.png")
        write_sidecar(tmp_path / "out.png", sample_record())
        assert read_record(tmp_path / "out.png") == sample_record()

    def test_the_record_inside_comes_first(self, png_path: Path) -> None:
        write_sidecar(png_path, with_call(prompt="another"))
        assert read_record(png_path) == sample_record().of_sample(0)

    def test_replaces_in_one_step(self, tmp_path: Path) -> None:
        """A reader beside a writer sees one of the two records, always whole."""
        records = [with_call(notes=letter * 50_000) for letter in "ab"]
        sidecar = write_sidecar(tmp_path / "out.png", records[0])
        done = threading.Event()

        def write() -> None:
            for turn in range(60):
                write_sidecar(tmp_path / "out.png", records[turn % 2])
            done.set()

        writer = threading.Thread(target=write)
        writer.start()
        while not done.is_set():
            assert read_record(sidecar) in records
        writer.join()
        assert list(tmp_path.iterdir()) == [sidecar]


class TestFailedWrites:
    def test_a_mode_that_the_format_does_not_hold(self, tmp_path: Path) -> None:
        with pytest.raises(SettingsError, match=r"mode RGBA .*JPEG.*PNG"):
            write_image(picture(mode="RGBA"), tmp_path / "out.jpg", sample_record(), index=0)

    @pytest.mark.parametrize("write", ["image", "video", "sidecar"])
    @pytest.mark.parametrize("place", ["missing", "file"])
    def test_no_folder(self, tmp_path: Path, write: str, place: str) -> None:
        (tmp_path / "file").touch()
        path = tmp_path / place / "out"
        with pytest.raises(CannotSaveError, match="could not be written") as caught:
            {
                "image": lambda: write_image(picture(), path.with_suffix(".png"), sample_record(), index=0),
                "video": lambda: write_video(FRAMES, path.with_suffix(".mp4"), sample_record(), fps=8),
                "sidecar": lambda: write_sidecar(path, sample_record()),
            }[write]()
        assert caught.value.path.parent == path.parent

    def test_a_folder_of_this_name(self, tmp_path: Path) -> None:
        (tmp_path / "out.png").mkdir()
        with pytest.raises(CannotSaveError):
            write_image(picture(), tmp_path / "out.png", sample_record(), index=0)
        assert list(tmp_path.iterdir()) == [tmp_path / "out.png"]

    def test_what_was_there_stays_when_writing_fails(self, png_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        before = png_path.read_bytes()

        def no_space(*_: Any) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "replace", no_space)
        with pytest.raises(CannotSaveError, match="No space left"):
            write_image(picture(1), png_path, sample_record(), index=1)
        assert png_path.read_bytes() == before
        assert list(png_path.parent.iterdir()) == [png_path]


def test_records_read_are_what_was_written_for_each_file_of_a_batch(tmp_path: Path) -> None:
    record = sample_record()
    for index in range(3):
        path = write_image(picture(index), tmp_path / f"{index}.png", record, index=index)
        read = read_record(path)
        assert isinstance(read, RunRecord)
        with Image.open(path) as image:
            assert pixels_sha256(image) == read.results["pixels"][read.sample or 0]
