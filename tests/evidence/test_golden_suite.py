"""Suite files: what can be said in them, and that each thing that cannot is an error that names its field."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from pipevault.errors import BadSuiteError, SettingsError
from pipevault.evidence.golden.suite_file import SUITE_VERSION, Limits, read_suite
from pipevault.evidence.request import Request

HEAD = f'pipevault_suite = {SUITE_VERSION}\nmodel = "org/digits"\n'
CASE = '[[case]]\nname = "seven"\nseed = 7\n'


def suite_file(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "suite.toml"
    path.write_text(text, encoding="utf-8")
    return path


def read(tmp_path: Path, text: str) -> Any:
    return read_suite(suite_file(tmp_path, text))


def test_everything_that_a_suite_can_say(tmp_path: Path) -> None:
    suite = read(
        tmp_path,
        HEAD
        + """dtype = "bfloat16"
        device = "cuda"
        pipeline_class = "StableDiffusionPipeline"
        level = "strict+audit"
        other_machine = true
        other_key = true
        [tolerance]
        pixels_max_abs = 3
        latents_mean_abs = 1e-4
        [[case]]
        name = "seven"
        prompts = ["a seven", "a two"]
        seed = 18446744073709551615
        steps = 12
        guidance_scale = 3.0
        height = 32
        width = 48
        num_frames = 9
        arguments = { negative_prompt = "", eta = 0.5, flags = [true] }
        [case.tolerance]
        pixels_max_abs = 9
        """,
    )
    [case] = suite.cases
    assert (suite.model, suite.dtype, suite.device, suite.level) == ("org/digits", "bfloat16", "cuda", "strict+audit")
    assert (suite.pipeline_class, suite.other_machine, suite.other_key) == ("StableDiffusionPipeline", True, True)
    arguments = {"negative_prompt": "", "eta": 0.5, "flags": [True]}
    assert case.request == Request(("a seven", "a two"), 2**64 - 1, 12, 3.0, 32, 48, 9, arguments)
    assert case.limits == Limits(pixels_max_abs=9, latents_mean_abs=1e-4)


def test_what_is_left_out_is_left_to_the_pipeline(tmp_path: Path) -> None:
    suite = read(tmp_path, HEAD + CASE)
    assert suite.cases[0].request == Request((), 7)
    assert (suite.dtype, suite.device, suite.level, suite.other_machine) == (None, None, None, False)
    assert suite.cases[0].limits == Limits()


def test_the_demo_model_has_defaults_of_its_own(tmp_path: Path) -> None:
    suite = read(tmp_path, f'pipevault_suite = 1\nmodel = "demo"\n{CASE}prompt = "a handwritten seven"\n')
    assert suite.cases[0].request == Request(("a handwritten seven",), 7, 12, 3.0)


def test_a_model_folder_is_looked_for_beside_the_suite(tmp_path: Path) -> None:
    (tmp_path / "weights").mkdir()
    assert read(tmp_path, HEAD.replace("org/digits", "weights") + CASE).model == str(tmp_path / "weights")
    assert read(tmp_path, HEAD.replace("org/digits", "./nothing") + CASE).model == "./nothing"


def test_cases_are_selected_by_name_in_the_order_of_the_suite(tmp_path: Path) -> None:
    suite = read(tmp_path, HEAD + CASE + CASE.replace("seven", "two"))
    assert [case.name for case in suite.selected(())] == ["seven", "two"]
    assert [case.name for case in suite.selected(("two",))] == ["two"]
    with pytest.raises(SettingsError, match=r"no case 'nine'.*seven, two"):
        suite.selected(("nine",))


@pytest.mark.parametrize(
    ("text", "field"),
    [
        ('model = "demo"\n' + CASE, "pipevault_suite"),
        (HEAD.replace("= 1", '= "1"') + CASE, "pipevault_suite"),
        (HEAD.replace("= 1", "= true") + CASE, "pipevault_suite"),
        (HEAD.replace("= 1", "= 0") + CASE, "pipevault_suite"),
        (HEAD.replace("= 1", "= 2") + CASE, "pipevault_suite"),
        ("pipevault_suite = 1\n" + CASE, "model"),
        ("pipevault_suite = 1\nmodel = 5\n" + CASE, "model"),
        ('pipevault_suite = 1\nmodel = ""\n' + CASE, "model"),
        (HEAD + 'modell = "demo"\n' + CASE, "modell"),
        (HEAD + 'dtype = "float33"\n' + CASE, "dtype"),
        (HEAD + "device = 0\n" + CASE, "device"),
        (HEAD + "pipeline_class = 1\n" + CASE, "pipeline_class"),
        (HEAD + 'level = "very"\n' + CASE, "level"),
        (HEAD + "level = 3\n" + CASE, "level"),
        (HEAD + 'other_machine = "yes"\n' + CASE, "other_machine"),
        (HEAD + "other_key = 1\n" + CASE, "other_key"),
        (HEAD + "tolerance = 3\n" + CASE, "tolerance"),
        (HEAD + "tolerance = { pixels = 3 }\n" + CASE, "tolerance.pixels"),
        (HEAD + "tolerance = { pixels_max_abs = -1 }\n" + CASE, "tolerance.pixels_max_abs"),
        (HEAD + "tolerance = { pixels_max_abs = nan }\n" + CASE, "tolerance.pixels_max_abs"),
        (HEAD + "tolerance = { pixels_max_abs = true }\n" + CASE, "tolerance.pixels_max_abs"),
        (HEAD, "case"),
        (HEAD + "case = []\n", "case"),
        (HEAD + 'case = ["seven"]\n', "case[0]"),
        (HEAD + '[case]\nname = "seven"\nseed = 7\n', "case"),
        (HEAD + "[[case]]\nseed = 7\n", "case[0].name"),
        (HEAD + "[[case]]\nname = 7\nseed = 7\n", "case[0].name"),
        (HEAD + CASE.replace("seven", "a/b"), "case[0].name"),
        (HEAD + CASE.replace("seven", ".."), "case[0].name"),
        (HEAD + CASE.replace("seven", "-rf"), "case[0].name"),
        (HEAD + CASE.replace("seven", "s" * 101), "case[0].name"),
        (HEAD + CASE + CASE, "case[1].name"),
        (HEAD + CASE + CASE.replace("seven", "SEVEN"), "case[1].name"),
        (HEAD + '[[case]]\nname = "seven"\n', "case[0].seed"),
        (HEAD + CASE.replace("7", "-1"), "case[0].seed"),
        (HEAD + CASE.replace("7", "1.0"), "case[0].seed"),
        (HEAD + CASE.replace("7", "true"), "case[0].seed"),
        (HEAD + CASE + CASE.replace("seven", "two").replace("7", "18446744073709551616"), "case[1].seed"),
        (HEAD + CASE + "sede = 7\n", "case[0].sede"),
        (HEAD + CASE + "prompt = 7\n", "case[0].prompt"),
        (HEAD + CASE + 'prompts = "a seven"\n', "case[0].prompts"),
        (HEAD + CASE + "prompts = [7]\n", "case[0].prompts[0]"),
        (HEAD + CASE + "prompts = []\n", "case[0].prompts"),
        (HEAD + CASE + 'prompt = "a"\nprompts = ["a"]\n', "case[0].prompts"),
        (HEAD + CASE + "steps = 0\n", "case[0].steps"),
        (HEAD + CASE + "steps = 1.5\n", "case[0].steps"),
        (HEAD + CASE + "height = true\n", "case[0].height"),
        (HEAD + CASE + 'width = "32"\n', "case[0].width"),
        (HEAD + CASE + "num_frames = -1\n", "case[0].num_frames"),
        (HEAD + CASE + "guidance_scale = inf\n", "case[0].guidance_scale"),
        (HEAD + CASE + 'guidance_scale = "3"\n', "case[0].guidance_scale"),
        (HEAD + CASE + "arguments = 3\n", "case[0].arguments"),
        (HEAD + CASE + "arguments = { when = 2026-01-31 }\n", "case[0].arguments.when"),
        (HEAD + CASE + "arguments = { eta = [nan] }\n", "case[0].arguments.eta"),
        (HEAD + CASE + "arguments = { seed = 3 }\n", "case[0].arguments.seed"),
        (HEAD + CASE + "arguments = { num_inference_steps = 3 }\n", "case[0].arguments.num_inference_steps"),
        (HEAD + CASE + "[case.tolerance]\nlatents_max_abs = '1'\n", "case[0].tolerance.latents_max_abs"),
        (HEAD + "model = ", ""),
        ("\x00", ""),
    ],
)
def test_what_cannot_be_used_is_an_error_that_names_the_field(tmp_path: Path, text: str, field: str) -> None:
    path = suite_file(tmp_path, text)
    with pytest.raises(BadSuiteError) as caught:
        read_suite(path)
    assert caught.value.field == field
    assert str(path) in str(caught.value)
    assert field in str(caught.value)


def test_a_newer_suite_asks_for_an_upgrade(tmp_path: Path) -> None:
    with pytest.raises(BadSuiteError, match="Upgrade pipevault"):
        read(tmp_path, HEAD.replace("= 1", "= 99") + CASE)


@pytest.mark.parametrize("name", ["none.toml", ""])
def test_a_path_that_is_no_file(tmp_path: Path, name: str) -> None:
    with pytest.raises(BadSuiteError, match="No file"):
        read_suite(tmp_path / name)


def test_a_file_that_is_no_utf8(tmp_path: Path) -> None:
    (tmp_path / "suite.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(BadSuiteError, match="cannot be read"):
        read_suite(tmp_path / "suite.toml")


@pytest.mark.parametrize("value", [-1, math.inf, math.nan, "3", True])
def test_a_limit_is_a_number_of_zero_or_more(value: Any) -> None:
    with pytest.raises(ValueError, match="pixels_max_abs"):
        Limits.from_json({"pixels_max_abs": value})


def test_limits_lie_over_others() -> None:
    base = Limits(pixels_max_abs=1, latents_max_abs=2)
    assert Limits(pixels_max_abs=0).over(base) == Limits(pixels_max_abs=0, latents_max_abs=2)
