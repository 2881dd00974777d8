"""From typed text to a pipeline and its calls."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import pytest

from pipevault import opening
from pipevault.cli.options import CountRange
from pipevault.cli.pipelines import DEMO_SHAPE, parse_size, shape_of
from pipevault.errors import SettingsError
from pipevault.opening import open_pipeline


@pytest.mark.parametrize("text", ["768x512", "768X512", " 768x512 ", "768×512"])  # noqa: RUF001
def test_size_is_width_times_height(text: str) -> None:
    assert parse_size(text) == {"width": 768, "height": 512}


@pytest.mark.parametrize("text", ["", "512", "0x512", "512x", "x512", "-8x8", "8x8x8", "5.5x8", "1e3x8", "9999999x8"])
def test_text_that_is_no_size(text: str) -> None:
    with pytest.raises(SettingsError, match="Invalid size"):
        parse_size(text)


class TestShapes:
    def test_a_size_and_what_is_given(self) -> None:
        assert shape_of("m", "512x256", batch_size=2, num_frames=9, guidance=False) == {
            **{"batch_size": 2, "num_frames": 9, "guidance": False},
            **{"height": 256, "width": 512},
        }

    def test_nothing_given_leaves_everything_to_the_pipeline(self) -> None:
        assert shape_of("m", batch_size=None) == {}

    def test_the_demo_has_its_own_call(self) -> None:
        assert shape_of("demo") == DEMO_SHAPE
        assert shape_of("demo", "64x64", batch_size=1) == {**DEMO_SHAPE, "batch_size": 1, "height": 64, "width": 64}

    def test_a_range_of_sizes_is_two_with_dots_between(self) -> None:
        found = shape_of("./model", "512x256..1024x256", batch_size=(1, 4))
        assert found == {"height": 256, "width": (512, 1024), "batch_size": (1, 4)}
        with pytest.raises(SettingsError, match="Invalid size"):
            shape_of("./model", "512x512..")


class TestOpenPipeline:
    def test_unknown_dtype(self) -> None:
        with pytest.raises(SettingsError, match="float32, float16, bfloat16"):
            open_pipeline("demo", dtype="int8")

    @pytest.mark.parametrize("device", ["abacus", "cuda:977", "cpu:x"])
    def test_unusable_device(self, device: str) -> None:
        with pytest.raises(SettingsError, match=f"Device '{device}' cannot be used"):
            open_pipeline("demo", device=device)

    def test_no_gpu(self, monkeypatch: pytest.MonkeyPatch) -> None:
        import torch

        monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
        for cuda, remedy in ((None, "install a build of torch with CUDA"), ("12.6", "CUDA_VISIBLE_DEVICES")):
            monkeypatch.setattr(torch.version, "cuda", cuda)
            with pytest.raises(SettingsError, match=f"--device cpu.*{remedy}"):
                open_pipeline("demo", device="cuda:977")

    def test_another_gpu(self, monkeypatch: pytest.MonkeyPatch) -> None:
        import torch

        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        with pytest.raises(SettingsError, match=r"Usable here: cpu, cuda:0, cuda:1\."):
            open_pipeline("demo", device="cuda:977")

    @pytest.mark.parametrize("name", ["NoSuchPipeline", "UNet2DConditionModel", "__version__"])
    def test_unknown_pipeline_class(self, name: str) -> None:
        with pytest.raises(SettingsError, match="no pipeline class"):
            open_pipeline("demo", pipeline_class=name)

    def test_a_folder_without_a_pipeline(self, tmp_path: Path) -> None:
        with pytest.raises(SettingsError, match=r"model_index\.json"):
            open_pipeline(str(tmp_path), device="cpu")

    @pytest.mark.parametrize("model", ["nosuchmodel", "nobody/nothing"])
    def test_a_model_that_is_nowhere_and_no_hub_to_ask(self, model: str) -> None:
        with pytest.raises(SettingsError) as info:
            open_pipeline(model, device="cpu")
        expected = (
            f"The folder {model} does not exist, and the hub cannot be asked (HF_HUB_OFFLINE=1). Give a folder with"
        )
        assert str(info.value).startswith(expected)

    @pytest.mark.parametrize("model", ["./no/model", "/no/model", "no/such/model", "~/no-such-model"])
    def test_a_path_that_is_nowhere(self, model: str) -> None:
        with pytest.raises(SettingsError) as info:
            open_pipeline(model, device="cpu")
        assert str(info.value).startswith(f"The folder {model} does not exist. Give a folder with")

    @pytest.mark.parametrize(
        ("cause", "text"),
        [
            (
                ConnectionError("Cannot reach the hub.\nMore text"),
                "did not give a pipeline: Cannot reach the hub. Give",
            ),
            (KeyError("_class_name"), "did not give a pipeline: KeyError '_class_name'. Give"),
        ],
    )
    def test_a_hub_that_does_not_answer_is_told_with_its_cause(
        self, monkeypatch: pytest.MonkeyPatch, cause: Exception, text: str
    ) -> None:
        import diffusers
        from huggingface_hub import constants

        def from_pretrained(*_: Any, **__: Any) -> None:
            raise OSError("Please check out the root cause in the stacktrace above.") from cause

        monkeypatch.setattr(constants, "is_offline_mode", lambda: False)
        monkeypatch.setattr(diffusers.DiffusionPipeline, "from_pretrained", from_pretrained)
        with pytest.raises(SettingsError) as info:
            open_pipeline("nobody/nothing", device="cpu")
        assert text in str(info.value)
        assert "stacktrace" not in str(info.value)

    def test_a_model_index_without_a_class(self, tmp_path: Path) -> None:
        (tmp_path / "model_index.json").write_text("{}")
        with pytest.raises(SettingsError, match="cannot be opened as a diffusers pipeline: KeyError '_class_name'"):
            open_pipeline(str(tmp_path), device="cpu")

    def test_a_model_index_that_is_no_json(self, tmp_path: Path) -> None:
        (tmp_path / "model_index.json").write_text("{")
        with pytest.raises(SettingsError, match="cannot be opened"):
            open_pipeline(str(tmp_path), device="cpu")

    def test_a_demo_model_that_was_not_installed(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setattr(opening, "MODEL_DIR", tmp_path)
        with pytest.raises(SettingsError, match="demo model is missing"):
            open_pipeline("demo")

    def test_the_demo(self) -> None:
        import torch
        from diffusers import StableDiffusionPipeline

        pipe: Any = open_pipeline("demo", dtype="bfloat16")
        assert isinstance(pipe, StableDiffusionPipeline)
        assert {pipe.unet.dtype, pipe.vae.dtype, pipe.text_encoder.dtype} == {torch.bfloat16}
        assert pipe.device.type == "cpu"
        assert open_pipeline("demo").unet.dtype == torch.float32


@pytest.mark.parametrize(("text", "value"), [("4", 4), ("1..4", (1, 4)), (" 2 .. 8 ", (2, 8))])
def test_a_count_or_a_range(text: str, value: Any) -> None:
    assert CountRange().convert(text, None, None) == value


@pytest.mark.parametrize("text", ["", "0", "-1", "1.5", "a", "1..", "1..2..3", "..", "\u0664"])
def test_what_is_no_count(text: str) -> None:
    with pytest.raises(click.BadParameter, match="expected a whole number above 0"):
        CountRange().convert(text, None, None)
