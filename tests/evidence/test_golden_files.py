"""Goldens on disk: whole or not at all, and what is no longer as it was recorded is noticed."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import pipevault
from helpers.golden_runs import a_golden, a_run, picture
from pipevault.digest import canonical_json, digest_json
from pipevault.errors import (
    BadRecordError,
    CannotSaveError,
    NewerRecordError,
    NoGoldenError,
    RecordDigestError,
    SettingsError,
)
from pipevault.evidence.golden import files as golden_files
from pipevault.evidence.golden.drawn import Drawn, samples_of
from pipevault.evidence.golden.files import Golden, Tolerance, machine_types, read_golden, write_golden
from pipevault.evidence.golden.suite_file import Limits

TOLERANCE = Tolerance(Limits(pixels_max_abs=4, latents_max_abs=0.5), 2.0, {"eager": {"pixels": {"max_abs": 2.0}}})


@pytest.fixture
def golden(tmp_path: Path) -> Golden:
    drawn = a_run(picture(0), picture(1), factors={"machine": {"threads": 1}})
    made = a_golden(tmp_path / "suite.goldens", drawn, tolerance=TOLERANCE)
    write_golden(made)
    return made


def rewrite(golden: Golden, **changes: Any) -> None:
    """Changes fields of ``golden.json`` and makes its digest fit; ``None`` of a name takes the field away."""
    file = golden.path / "golden.json"
    document = {**json.loads(file.read_text("utf-8")), **changes}
    document = {name: value for name, value in document.items() if value != "gone" and name != "digest"}
    file.write_bytes(canonical_json({**document, "digest": digest_json(document).hex}))


def test_what_was_written_is_read(golden: Golden) -> None:
    read = read_golden(golden.path)
    assert read.record == golden.record
    assert (read.case, read.tolerance, read.request) == ("seven", TOLERANCE, None)
    assert read.drawn.factors == {"machine": {"threads": 1}}
    assert [one.tobytes() for one in read.drawn.samples] == [one.tobytes() for one in golden.drawn.samples]
    assert np.array_equal(read.drawn.latents[0], golden.drawn.latents[0])


def test_the_pictures_have_the_run_record_inside(golden: Golden) -> None:
    for index in (0, 1):
        assert pipevault.read_record(golden.path / f"{index}.png") == golden.record.of_sample(index)


def test_a_golden_is_canonical_json_with_a_version(golden: Golden) -> None:
    data = (golden.path / "golden.json").read_bytes()
    assert data == canonical_json(json.loads(data)) + b"\n"
    assert json.loads(data)["pipevault_golden"] == 1


def test_arrays_are_kept_where_there_are_no_pictures(tmp_path: Path) -> None:
    arrays = np.linspace(0, 1, 2 * 4 * 5, dtype=np.float32).reshape(2, 4, 5)
    run = a_run()
    golden = a_golden(tmp_path, Drawn(run.record, samples_of(arrays)))
    write_golden(golden)
    assert sorted(path.name for path in golden.path.iterdir()) == ["golden.json", "samples.safetensors"]
    assert np.array_equal(np.stack([np.asarray(one) for one in read_golden(golden.path).drawn.samples]), arrays)


def test_frames_of_a_video_are_pictures(tmp_path: Path) -> None:
    frames = [[picture(0), picture(1), picture(2)]]
    record = a_run(picture(0)).record
    golden = a_golden(tmp_path, Drawn(record, samples_of(frames)))
    write_golden(golden)
    assert [one.tobytes() for one in read_golden(golden.path).drawn.samples] == [one.tobytes() for one in frames[0]]


def test_a_golden_is_not_replaced_by_accident(golden: Golden) -> None:
    other = Golden(golden.path, "seven", a_run(picture(5)))
    with pytest.raises(SettingsError, match="exists already"):
        write_golden(other)
    assert len(read_golden(golden.path).drawn.samples) == 2
    write_golden(other, overwrite=True)
    assert len(read_golden(golden.path).drawn.samples) == 1
    assert [path.name for path in golden.path.parent.iterdir()] == ["seven"]


def test_a_failure_while_writing_leaves_what_was_there(golden: Golden, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(golden_files, "_write_arrays", fail)
    with pytest.raises(CannotSaveError, match="No space left"):
        write_golden(Golden(golden.path, "seven", a_run()), overwrite=True)
    assert len(read_golden(golden.path).drawn.samples) == 2
    assert [path.name for path in golden.path.parent.iterdir()] == ["seven"]


def test_the_old_golden_comes_back_if_the_new_one_cannot_take_its_place(
    golden: Golden, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename, calls = os.rename, []

    def second_fails(source: Any, target: Any) -> None:
        calls.append(target)
        if len(calls) == 2:
            raise PermissionError(13, "Permission denied")
        rename(source, target)

    monkeypatch.setattr(golden_files.os, "rename", second_fails)  # type: ignore[attr-defined]
    with pytest.raises(CannotSaveError, match="Permission denied"):
        write_golden(Golden(golden.path, "seven", a_run()), overwrite=True)
    assert len(read_golden(golden.path).drawn.samples) == 2
    assert [path.name for path in golden.path.parent.iterdir()] == ["seven"]


def test_the_old_golden_is_next_to_its_place_if_it_cannot_come_back(
    golden: Golden, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename, calls = os.rename, []

    def first_alone_works(source: Any, target: Any) -> None:
        calls.append(target)
        if len(calls) > 1:
            raise OSError(5, "Input/output error")
        rename(source, target)

    monkeypatch.setattr(golden_files.os, "rename", first_alone_works)  # type: ignore[attr-defined]
    with pytest.raises(CannotSaveError, match="Input/output error"):
        write_golden(Golden(golden.path, "seven", a_run()), overwrite=True)
    [aside] = golden.path.parent.iterdir()
    assert aside.name.startswith(".seven-")
    assert len(read_golden(aside).drawn.samples) == 2


def test_the_machine_types_that_have_a_case(golden: Golden) -> None:
    root = golden.path.parent.parent
    assert machine_types(root, "seven") == [golden.path.parent.name]
    assert machine_types(root, "two") == []
    assert machine_types(root / "nothing", "seven") == []
    (golden.path / "golden.json").unlink()
    assert machine_types(root, "seven") == []


class TestDamage:
    def test_nothing_there(self, tmp_path: Path) -> None:
        with pytest.raises(NoGoldenError, match="Record it first"):
            read_golden(tmp_path / "none")

    def test_a_repainted_picture(self, golden: Golden) -> None:
        file = golden.path / "1.png"
        with Image.open(file) as image:
            image.putpixel((3, 3), (255, 0, 0))
            image.save(file)
        with pytest.raises(RecordDigestError, match=r"1\.png"):
            read_golden(golden.path)

    def test_a_picture_that_was_packed_anew_is_the_same(self, golden: Golden) -> None:
        file = golden.path / "1.png"
        with Image.open(file) as image:
            image.load()
            image.save(file, optimize=True)
        assert len(read_golden(golden.path).drawn.samples) == 2

    def test_a_lost_picture(self, golden: Golden) -> None:
        (golden.path / "0.png").unlink()
        with pytest.raises(RecordDigestError, match=r"0\.png: it is missing"):
            read_golden(golden.path)

    def test_a_picture_that_is_none(self, golden: Golden) -> None:
        (golden.path / "0.png").write_text("no picture")
        with pytest.raises(RecordDigestError, match="not a picture"):
            read_golden(golden.path)

    @pytest.mark.parametrize("data", [b"", b"garbage"])
    def test_latents_that_cannot_be_read(self, golden: Golden, data: bytes) -> None:
        (golden.path / "latents.safetensors").write_bytes(data)
        with pytest.raises(RecordDigestError, match="latents"):
            read_golden(golden.path)

    def test_lost_latents(self, golden: Golden) -> None:
        (golden.path / "latents.safetensors").unlink()
        with pytest.raises(RecordDigestError, match="latents 0"):
            read_golden(golden.path)

    @pytest.mark.parametrize("text", ["", "no JSON", "[]", "{}", '{"pipevault_golden": 1, "case": NaN}'])
    def test_a_document_that_is_none(self, golden: Golden, text: str) -> None:
        (golden.path / "golden.json").write_text(text)
        with pytest.raises(RecordDigestError, match="changed after it was recorded"):
            read_golden(golden.path)

    def test_a_document_that_was_edited(self, golden: Golden) -> None:
        file = golden.path / "golden.json"
        file.write_text(file.read_text().replace('"margin":2.0', '"margin":9.0'))
        with pytest.raises(RecordDigestError, match="digest"):
            read_golden(golden.path)

    def test_a_later_version(self, golden: Golden) -> None:
        rewrite(golden, pipevault_golden=2)
        with pytest.raises(NewerRecordError, match="Upgrade"):
            read_golden(golden.path)

    @pytest.mark.parametrize(
        ("field", "value"),
        [
            ("pipevault_golden", 0),
            ("pipevault_golden", True),
            ("pipevault_golden", "1"),
            ("case", 7),
            ("machine_type", None),
            ("record", []),
            ("request", "a seven"),
            ("factors", 1),
            ("samples", "gone"),
            ("latents", {}),
            ("tolerance", 3),
            ("tolerance.margin", {"limits": {}}),
            ("tolerance.limits.pixels_max_abs", {"limits": {"pixels_max_abs": -1}, "margin": 2.0, "measured": {}}),
            ("unheard_of", 1),
        ],
    )
    def test_a_field_that_is_wrong(self, golden: Golden, field: str, value: Any) -> None:
        rewrite(golden, **{field.partition(".")[0]: value})
        with pytest.raises(BadRecordError) as caught:
            read_golden(golden.path)
        assert caught.value.field == field
