"""Replaying records: equal bits, and what is named where they differ."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from PIL import Image

import pipevault
from helpers.pipelines import FAST_BUILD, PlainPipeline, stable_diffusion
from pipevault.cache.loaded import loaded_state
from pipevault.calls.describe import describe
from pipevault.cli import replay as replay_command
from pipevault.cli.app import app
from pipevault.determinism.layers import pack
from pipevault.errors import (
    BadCallError,
    BadRecordError,
    ChangedWeightsError,
    DifferentKeyError,
    NoRecordError,
    OtherMachineError,
    PipevaultError,
    RecordDigestError,
    SettingsError,
    UnknownRecordKeyError,
)
from pipevault.evidence import replay as replay_module
from pipevault.evidence.record_files import image_files
from pipevault.evidence.record_files.embed import write_image
from pipevault.graphs.part import FrozenPart
from pipevault.runtime.record import RunRecord


def make_pipeline(tmp_path: Path) -> Any:
    pipe = stable_diffusion(tmp_path / "tokenizer")
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def draw(frozen_vault: Path, tmp_path: Path) -> Callable[..., Any]:
    def draw(*, level: str = "repeatable", **arguments: Any) -> Any:
        cache = pipevault.PipelineCache(frozen_vault, mode="require", build_config=FAST_BUILD, level=level)
        pipe = cache.load(make_pipeline(tmp_path), batch_size=1)
        if "seed" not in arguments and "generator" not in arguments:
            arguments["seed"] = 7
        return pipe(**{"prompt": "a cat", "num_inference_steps": 2, **arguments})

    return draw


@pytest.fixture
def saved(draw: Callable[..., Any], tmp_path: Path) -> Path:
    path = tmp_path / "cat.png"
    pipevault.save(draw(), path)
    return path


@pytest.fixture
def pipe(tmp_path: Path) -> Any:
    """The same model, constructed anew."""
    return make_pipeline(tmp_path)


def changed(record: RunRecord, **fields: Any) -> RunRecord:
    groups: dict[str, Any] = {name: {**getattr(record, name), **value} for name, value in fields.items()}
    return replace(record, **groups)


@pytest.mark.compile
@pytest.mark.parametrize("source", ["cat.png", "cat.png.json"])
def test_a_saved_output_comes_out_again(saved: Path, pipe: Any, frozen_vault: Path, source: str) -> None:
    result = pipevault.replay(saved.with_name(source), pipe, dir=frozen_vault)
    assert result.equal
    assert result.divergences == ()
    assert result.again.results["pixels"] == result.record.results["pixels"]
    assert result.again.weights == result.record.weights
    assert set(result.record.weights) == {"unet", "vae.decoder", "vae.encoder", "text_encoder"}


@pytest.mark.parametrize("call", [{"seed": -1}, {"num_inference_steps": 3, "guidance_scale": 5.0}])
def test_every_argument_is_replayed(
    draw: Callable[..., Any], pipe: Any, frozen_vault: Path, call: dict[str, Any]
) -> None:
    assert pipevault.replay(pipevault.record_of(draw(**call)), pipe, dir=frozen_vault).equal


def test_generators_of_the_caller_are_made_again(draw: Callable[..., Any], pipe: Any, frozen_vault: Path) -> None:
    record = pipevault.record_of(draw(generator=torch.Generator().manual_seed(3)))
    assert pipevault.replay(record, pipe, dir=frozen_vault).equal


def used_generator() -> torch.Generator:
    generator = torch.Generator().manual_seed(3)
    torch.randn(1, generator=generator)
    return generator


@pytest.mark.parametrize("level", ["off", "repeatable"])
@pytest.mark.parametrize(
    "given",
    [lambda: used_generator(), lambda: [used_generator()], lambda: None],
    ids=["one that was drawn from", "a list", "the program's stream"],
)
def test_noise_of_the_caller_comes_out_again(
    draw: Callable[..., Any], pipe: Any, frozen_vault: Path, given: Callable[[], Any], level: str
) -> None:
    torch.manual_seed(5)
    torch.rand(3)
    before = torch.get_rng_state()
    record = pipevault.record_of(draw(level=level, generator=given()))
    torch.manual_seed(77)
    after = torch.get_rng_state()
    result = pipevault.replay(record, pipe, dir=frozen_vault)
    assert result.equal, result.divergences
    assert result.again.seeds == record.seeds
    assert torch.equal(after, torch.get_rng_state())
    assert bool(record.seeds["streams"]) == (given() is None)
    assert not torch.equal(before, after)


@pytest.mark.parametrize(
    ("results", "first"),
    [
        ({"noise": "0" * 64, "latents": "0" * 64, "pixels": ["0" * 64]}, "noise"),
        ({"latents": "0" * 64, "pixels": ["0" * 64]}, "latents"),
        ({"pixels": ["0" * 64]}, "pixels"),
        ({"pixels": []}, "pixels"),
    ],
)
def test_the_first_difference_comes_first(
    saved: Path, pipe: Any, frozen_vault: Path, results: dict[str, Any], first: str
) -> None:
    record = changed(pipevault.read_record(saved), results=results)
    result = pipevault.replay(record, pipe, dir=frozen_vault)
    assert not result.equal
    assert [divergence.what for divergence in result.divergences] == list(results)
    assert result.divergences[0].what == first


def test_an_audit_names_the_step_and_the_part(draw: Callable[..., Any], pipe: Any, frozen_vault: Path) -> None:
    record = pipevault.record_of(draw(level="repeatable+audit"))
    assert pipevault.replay(record, pipe, dir=frozen_vault).equal
    steps = copy.deepcopy(record.results["steps"])
    second = [index for index, step in enumerate(steps) if step["part"] == "unet"][1]
    steps[second]["sha256"] = "0" * 64
    result = pipevault.replay(changed(record, results={"steps": steps}), pipe, dir=frozen_vault)
    assert not result.equal
    assert str(result.divergences[0]) == "step: call 1 of unet returned other bits"
    shorter = pipevault.replay(changed(record, results={"steps": steps[:second]}), pipe, dir=frozen_vault)
    assert f"{len(steps)} calls of parts, {second} recorded" in str(shorter.divergences[0])


def test_a_picture_that_was_painted_over_is_noticed(saved: Path, pipe: Any, frozen_vault: Path) -> None:
    with Image.open(saved) as image:
        picture = image.copy()
    picture.putpixel((3, 3), tuple(255 - value for value in picture.getpixel((3, 3))))
    write_image(picture, saved, pipevault.read_record(saved), index=0)
    result = pipevault.replay(saved, pipe, dir=frozen_vault)
    assert not result.equal
    assert [divergence.what for divergence in result.divergences] == ["file"]


def test_other_weights(saved: Path, pipe: Any, frozen_vault: Path) -> None:
    with torch.no_grad():
        next(pipe.unet.parameters()).add_(1.0)
    with pytest.raises(ChangedWeightsError, match="unet") as caught:
        pipevault.replay(saved, pipe, dir=frozen_vault)
    assert caught.value.parts == ("unet",)


def test_another_machine(saved: Path, pipe: Any, frozen_vault: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = replay_module.machine_factors  # type: ignore[attr-defined]
    monkeypatch.setattr(replay_module, "machine_factors", lambda device: {**real(device), "threads": 77})
    with pytest.raises(OtherMachineError, match=r"machine\.threads 1 then, 77 here") as caught:
        pipevault.replay(saved, pipe, dir=frozen_vault)
    assert caught.value.differences
    result = pipevault.replay(saved, pipe, dir=frozen_vault, allow_other_machine=True)
    assert result.distance is not None
    assert result.distance.differing_share == 0


def test_other_versions_are_told_even_where_the_bits_are_equal(saved: Path, pipe: Any, frozen_vault: Path) -> None:
    record = changed(pipevault.read_record(saved), versions={"pipevault": "0.0.1"})
    result = pipevault.replay(record, pipe, dir=frozen_vault)
    assert result.equal
    assert str(result.divergences[0]) == f"version: pipevault '0.0.1' then, '{pipevault.__version__}' here"


def test_a_vault_without_the_graphs(saved: Path, pipe: Any, plain_vault: Path) -> None:
    with pytest.raises(UnknownRecordKeyError, match="does not hold the graph") as caught:
        pipevault.replay(saved, pipe, dir=plain_vault)
    assert caught.value.key in pipevault.read_record(saved).graphs["text_encoder"]
    assert not any(isinstance(part, FrozenPart) for part in pipe.components.values())


def test_a_record_of_an_older_pipevault_names_no_graph(saved: Path, pipe: Any, frozen_vault: Path) -> None:
    record = replace(pipevault.read_record(saved), graphs={})
    with pytest.raises(UnknownRecordKeyError, match="names no graph"):
        pipevault.replay(record, pipe, dir=frozen_vault)


def test_a_graph_that_was_frozen_again_is_told_even_where_the_bits_are_equal(
    saved: Path, pipe: Any, frozen_vault: Path
) -> None:
    record = pipevault.read_record(saved)
    (key,) = record.graphs["unet"]
    result = pipevault.replay(changed(record, graphs={"unet": {key: "0" * 64}}), pipe, dir=frozen_vault)
    assert result.equal
    assert str(result.divergences[0]) == f"entry: {key[:12]} of unet was frozen again since the record was made"


def test_a_part_of_another_identity(saved: Path, pipe: Any, frozen_vault: Path) -> None:
    pipe.unet.conv_out.padding_mode = "circular"
    with pytest.raises(DifferentKeyError, match=r"unet has another identity .* settings: architecture\."):
        pipevault.replay(saved, pipe, dir=frozen_vault)


def test_another_setting_of_the_pipeline(saved: Path, pipe: Any, frozen_vault: Path) -> None:
    from diffusers import DDPMScheduler

    pipe.scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
    with pytest.raises(DifferentKeyError, match=r"settings: pipeline\.components\.scheduler"):
        pipevault.replay(saved, pipe, dir=frozen_vault)


def test_another_pipeline(saved: Path, pipe: Any, frozen_vault: Path) -> None:
    from diffusers import StableDiffusionImg2ImgPipeline

    other = StableDiffusionImg2ImgPipeline.from_pipe(pipe)
    with pytest.raises(SettingsError, match="is of a StableDiffusionPipeline"):
        pipevault.replay(saved, other, dir=frozen_vault)


class TestInputs:
    IMAGE = Image.new("RGB", (4, 4), (1, 2, 3))

    @pytest.fixture
    def record(self, saved: Path) -> RunRecord:
        record = pipevault.read_record(saved)
        return changed(record, call={"ip_adapter_image": describe(self.IMAGE)})

    def test_one_that_is_missing(self, record: RunRecord, pipe: Any, frozen_vault: Path) -> None:
        with pytest.raises(BadCallError, match="ip_adapter_image by its digest only"):
            pipevault.replay(record, pipe, dir=frozen_vault)

    def test_one_that_is_another(self, record: RunRecord, pipe: Any, frozen_vault: Path) -> None:
        with pytest.raises(BadCallError, match="ip_adapter_image is not what was recorded"):
            pipevault.replay(record, pipe, dir=frozen_vault, inputs={"ip_adapter_image": Image.new("RGB", (4, 4))})

    def test_one_that_was_not_recorded(self, saved: Path, pipe: Any, frozen_vault: Path) -> None:
        with pytest.raises(BadCallError, match="no mask"):
            pipevault.replay(saved, pipe, dir=frozen_vault, inputs={"mask": self.IMAGE})

    def test_one_that_the_pipeline_does_not_take(self, saved: Path, pipe: Any, frozen_vault: Path) -> None:
        record = changed(pipevault.read_record(saved), call={"image": describe(self.IMAGE)})
        with pytest.raises(BadCallError, match="takes no image"):
            pipevault.replay(record, pipe, dir=frozen_vault, inputs={"image": self.IMAGE})


class TestHostileRecords:
    """Whoever edits a record can compute its digest again."""

    @pytest.mark.compile
    @pytest.mark.parametrize("method", ["save_pretrained", "nosuch", "__class__"])
    def test_only_what_generates_is_called(
        self, saved: Path, pipe: Any, frozen_vault: Path, tmp_path: Path, method: str
    ) -> None:
        record = replace(pipevault.read_record(saved), call={"save_directory": str(tmp_path / "written")})
        with pytest.raises(BadRecordError, match="generates nothing"):
            pipevault.replay(changed(record, pipeline={"method": method}), pipe, dir=frozen_vault)
        assert not (tmp_path / "written").exists()

    @pytest.mark.parametrize("call", [{"guidance_scale": {"a": 1}}, {"prompt": 5}, {"nosucharg": 1}])
    def test_arguments_that_no_pipeline_takes(
        self, saved: Path, pipe: Any, frozen_vault: Path, call: dict[str, Any]
    ) -> None:
        with pytest.raises(BadCallError):
            pipevault.replay(changed(pipevault.read_record(saved), call=call), pipe, dir=frozen_vault)

    @pytest.mark.parametrize("shapes", [[], [{"nosuch": 1, "call": None}], [{"call": "<function>"}]])
    def test_shapes_are_nothing_that_a_replay_needs(
        self, saved: Path, pipe: Any, frozen_vault: Path, shapes: Any
    ) -> None:
        record = pipevault.read_record(saved)
        load = {**record.pipeline["load"], "shapes": shapes}
        assert pipevault.replay(changed(record, pipeline={"load": load}), pipe, dir=frozen_vault).equal

    @pytest.mark.parametrize(
        "load",
        [
            {"parts": ["nosuch"]},
            {"backend": "nosuch"},
        ],
    )
    def test_loads_that_cannot_be_done_again(self, saved: Path, pipe: Any, frozen_vault: Path, load: Any) -> None:
        record = pipevault.read_record(saved)
        hostile = changed(record, pipeline={"load": {**record.pipeline["load"], **load}})
        with pytest.raises(PipevaultError):
            pipevault.replay(hostile, pipe, dir=frozen_vault)

    @pytest.mark.parametrize(
        "load",
        [
            {"build_config": {"cpp.cxx": "/bin/sh"}},
            {"build_config": {}},
            {"build": "cpp.cxx=/bin/sh"},
            {"parts": 5},
            {"parts": [5]},
            {"shapes": 5},
            {"weights": 5},
            {"dtype": ["float32"]},
            {"dtype": {"unet": "float32; rm"}},
            {"device": 5},
            {"device": "cpu; rm"},
        ],
    )
    def test_loads_that_are_no_field_of_a_record(self, saved: Path, load: Any) -> None:
        record = pipevault.read_record(saved)
        with pytest.raises(BadRecordError, match=r"pipeline\.load\."):
            changed(record, pipeline={"load": {**record.pipeline["load"], **load}})

    def test_build_options_that_the_vault_does_not_have(self, saved: Path, pipe: Any, frozen_vault: Path) -> None:
        record = pipevault.read_record(saved)
        load = {**record.pipeline["load"], "build": "0" * 64}
        with pytest.raises(DifferentKeyError, match="backend"):
            pipevault.replay(changed(record, pipeline={"load": load}), pipe, dir=frozen_vault)

    @pytest.mark.parametrize(
        "call",
        [
            {"num_images_per_prompt": 50_000_000},
            {"num_images_per_prompt": -1},
            {"num_inference_steps": 10**9},
            {"num_inference_steps": True},
            {"num_inference_steps": "abc"},
            {"height": 1e9},
            {"width": 2**70},
            {"guidance_scale": 1e300},
            {"prompt": "a" * 1_000_000},
            {"prompt": ["a"] * 100_000},
            {"prompt": ["a"] * 600, "num_images_per_prompt": 2},
        ],
        ids=lambda call: f"{next(iter(call))}",
    )
    def test_calls_that_nobody_makes(self, saved: Path, pipe: Any, frozen_vault: Path, call: dict[str, Any]) -> None:
        record = changed(pipevault.read_record(saved), call=call)
        with pytest.raises(BadRecordError, match="a replay takes") as caught:
            pipevault.replay(record, pipe, dir=frozen_vault)
        assert caught.value.field.startswith("call")
        assert len(str(caught.value)) < 200

    @pytest.mark.parametrize(
        "value", ["http://127.0.0.1:9/a.png", "/etc/passwd", "a.png", ["x", "file:///etc/passwd"], {"a": "../b"}]
    )
    def test_texts_that_a_pipeline_would_open(self, saved: Path, pipe: Any, frozen_vault: Path, value: Any) -> None:
        record = changed(pipevault.read_record(saved), call={"ip_adapter_image": value})
        with pytest.raises(BadRecordError, match="may be a file or an address"):
            pipevault.replay(record, pipe, dir=frozen_vault)

    def test_nested_ever_deeper(self, saved: Path, pipe: Any, frozen_vault: Path) -> None:
        value: Any = "a"
        for _ in range(50):
            value = [value]
        with pytest.raises(BadRecordError, match="deep"):
            pipevault.replay(changed(pipevault.read_record(saved), call={"prompt": value}), pipe, dir=frozen_vault)

    @pytest.mark.parametrize(
        "streams",
        [
            {"torch": {"kind": "state", "state": "AAAA"}},
            {"torch": {"kind": "state"}},
            {"torch": {"kind": "seed", "seed": -1}},
            {"torch": {"kind": "state", "state": pack(torch.zeros(5056, dtype=torch.uint8))}},
            {"python": {"kind": "mt19937", "key": "", "position": 1, "gauss": None}},
            {"numpy": {"kind": "PCG64"}},
            {"cuda:0": {"kind": "state", "state": pack(torch.zeros(16, dtype=torch.uint8))}},
            {"os:system": {"kind": "state", "state": pack(torch.zeros(16, dtype=torch.uint8))}},
        ],
        ids=str,
    )
    def test_streams_that_are_none(self, saved: Path, pipe: Any, frozen_vault: Path, streams: Any) -> None:
        hostile = changed(pipevault.read_record(saved), seeds={"source": "global", "root": None, "streams": streams})
        before = torch.get_rng_state()
        with pytest.raises(BadRecordError):
            pipevault.replay(hostile, pipe, dir=frozen_vault)
        assert torch.equal(before, torch.get_rng_state())

    @pytest.mark.parametrize(
        "generator",
        [
            {"seed": -1},
            {"seed": "1"},
            {"device": 5},
            {"device": "nosuch"},
            {"fresh": False},
            {"fresh": False, "state": "A"},
        ],
        ids=str,
    )
    def test_generators_that_cannot_be_made(
        self, saved: Path, pipe: Any, frozen_vault: Path, generator: dict[str, Any]
    ) -> None:
        described = {"kind": "generator", "seed": 1, "device": "cpu", "fresh": True, **generator}
        record = changed(pipevault.read_record(saved), seeds={"source": "generator"}, call={"generator": described})
        with pytest.raises(BadRecordError):
            pipevault.replay(record, pipe, dir=frozen_vault)

    def test_a_load_that_tells_nothing(self, saved: Path, pipe: Any, frozen_vault: Path) -> None:
        hostile = changed(pipevault.read_record(saved), pipeline={"load": {}})
        with pytest.raises(BadRecordError, match="backend"):
            pipevault.replay(hostile, pipe, dir=frozen_vault)

    def test_a_graph_without_a_key(self, saved: Path, pipe: Any, frozen_vault: Path) -> None:
        hostile = changed(pipevault.read_record(saved), graphs={"unet": {"../../etc": "0" * 64}})
        with pytest.raises(BadRecordError, match="Invalid key of a graph"):
            pipevault.replay(hostile, pipe, dir=frozen_vault)

    @pytest.mark.parametrize("part", ["nosuch", "__class__", "scheduler", ""])
    def test_graphs_of_parts_that_there_are_not(self, saved: Path, pipe: Any, frozen_vault: Path, part: str) -> None:
        record = pipevault.read_record(saved)
        with pytest.raises(PipevaultError):
            pipevault.replay(changed(record, graphs={part: record.graphs["unet"]}), pipe, dir=frozen_vault)

    def test_an_entry_that_is_no_graph(self, saved: Path, pipe: Any, frozen_vault: Path) -> None:
        record = pipevault.read_record(saved)
        assert record.key is not None
        with pytest.raises(DifferentKeyError):
            pipevault.replay(changed(record, graphs={"unet": {record.key: "0" * 64}}), pipe, dir=frozen_vault)

    def test_a_key_that_is_no_plan(self, saved: Path, pipe: Any, frozen_vault: Path) -> None:
        record = pipevault.read_record(saved)
        (graph,) = record.graphs["unet"]
        assert pipevault.replay(replace(record, key=graph), pipe, dir=frozen_vault).equal

    def test_generators_that_are_not_described(self, saved: Path, pipe: Any, frozen_vault: Path) -> None:
        record = changed(pipevault.read_record(saved), seeds={"source": "generator"})
        with pytest.raises(BadRecordError, match="does not describe"):
            pipevault.replay(record, pipe, dir=frozen_vault)

    def test_seeds_of_samples_that_were_not_used(self, saved: Path, pipe: Any, frozen_vault: Path) -> None:
        result = pipevault.replay(changed(pipevault.read_record(saved), seeds={"samples": []}), pipe, dir=frozen_vault)
        assert not result.equal
        assert result.divergences[-1].what == "seeds"

    def test_a_sample_that_was_not_drawn(self, saved: Path, pipe: Any, frozen_vault: Path) -> None:
        with Image.open(saved) as image:
            record = replace(pipevault.read_record(saved), sample=9)
            saved.write_bytes(image_files.encode(image.copy(), ".png", record, ""))
        assert pipevault.replay(saved, pipe, dir=frozen_vault).divergences[0].what == "file"

    def test_a_picture_that_cannot_be_read(self, saved: Path, pipe: Any, frozen_vault: Path) -> None:
        data = saved.read_bytes()
        saved.write_bytes(data[: data.index(b"IDAT") + 8] + data[data.index(b"IEND") - 4 :])
        with pytest.raises(NoRecordError, match="cannot be read"):
            pipevault.replay(saved, pipe, dir=frozen_vault)


class TestCommand:
    @pytest.fixture(autouse=True)
    def _pipeline(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        opened: list[str] = []

        def open_pipeline(model: str, **options: Any) -> Any:
            assert options == {
                "dtype": "float32",
                "device": "cpu",
                "pipeline_class": "StableDiffusionPipeline",
                "local_only": False,
            }
            opened.append(model)
            assert len(opened) == 1, "one pipeline serves all files"
            return make_pipeline(tmp_path)

        monkeypatch.setattr(replay_command, "open_pipeline", open_pipeline)

    def run(self, *arguments: Any) -> Any:
        return CliRunner().invoke(app, ["replay", *map(str, arguments)])

    def test_equal_files_succeed(self, draw: Callable[..., Any], frozen_vault: Path, tmp_path: Path) -> None:
        files = [pipevault.save(draw(seed=seed), tmp_path / f"{seed}.png")[0] for seed in range(3)]
        result = self.run(*files, "--model", "here", "--dir", frozen_vault, "--json")
        assert result.exit_code == 0, result.output
        assert [file["equal"] for file in json.loads(result.stdout)["files"]] == [True] * 3

    def test_one_file_that_differs_fails(self, saved: Path, frozen_vault: Path) -> None:
        other = saved.with_name("other.json")
        other.write_text(changed(pipevault.read_record(saved), results={"noise": "0" * 64}).to_json())
        result = self.run(saved, other, other, "--model", "here", "--dir", frozen_vault)
        assert result.exit_code == 1
        assert "noise" in result.stdout

    def test_the_code_of_a_difference(self, saved: Path, frozen_vault: Path) -> None:
        other = saved.with_name("other.json")
        other.write_text(changed(pipevault.read_record(saved), results={"noise": "0" * 64}).to_json())
        document = json.loads(self.run(saved, other, "--model", "here", "--dir", frozen_vault, "--json").stdout)
        assert document["code"] == "different-output"
        assert [file["code"] for file in document["files"]] == [None, "different-output"]

    def test_files_that_cannot_be_replayed(self, saved: Path, frozen_vault: Path) -> None:
        bare = saved.with_name("bare.png")
        Image.new("RGB", (2, 2)).save(bare)
        assert self.run(bare, "--model", "here", "--dir", frozen_vault).exit_code == 1
        edited = saved.with_name("edited.json")
        edited.write_text(saved.with_name("cat.png.json").read_text().replace("a cat", "a dog"))
        result = self.run(bare, edited, saved, bare, "--model", "here", "--dir", frozen_vault, "--json")
        assert result.exit_code == 1, "that of the first failure"
        assert self.run(edited, bare, "--model", "here", "--dir", frozen_vault).exit_code == 3
        document = json.loads(result.stdout)
        assert [file["code"] for file in document["files"]] == ["no-record", "changed-record", None, "no-record"]
        assert document["code"] == "no-record"

    def test_without_a_model_nothing_that_only_the_record_names_is_opened(
        self, saved: Path, frozen_vault: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        result = self.run(saved, "--dir", frozen_vault, "--json")
        assert result.exit_code == 2
        assert "Give it: --model" in result.stdout
        record = pipevault.read_record(saved)
        (saved.parent / "org" / "name").mkdir(parents=True)
        monkeypatch.chdir(saved.parent)
        for model in ("/etc", "./here", "../x/y", "org/name", "~/model", "org/name/more"):
            saved.with_name("named.json").write_text(changed(record, pipeline={"model": model}).to_json())
            result = self.run(saved.with_name("named.json"), "--dir", frozen_vault, "--json")
            assert "what a stranger names is not opened" in result.stdout, model

    def test_a_repository_that_the_record_names_is_looked_for_in_the_local_cache_alone(
        self, saved: Path, frozen_vault: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        asked: list[Any] = []

        def open_pipeline(model: str, **options: Any) -> Any:
            asked.append((model, options["local_only"]))
            raise SettingsError("It is not there.")

        monkeypatch.setattr(replay_command, "open_pipeline", open_pipeline)
        file = saved.with_name("named.json")
        file.write_text(changed(pipevault.read_record(saved), pipeline={"model": "org/name"}).to_json())
        assert self.run(file, "--dir", frozen_vault).exit_code == 2
        assert asked == [("org/name", True)]

    @pytest.mark.parametrize("text", ["image", "=a.png", "image=", "image=absent.png"])
    def test_inputs_that_cannot_be_used(self, saved: Path, text: str) -> None:
        assert self.run(saved, "--input", text).exit_code == 2

    def test_the_new_output_can_be_saved(self, saved: Path, frozen_vault: Path, tmp_path: Path) -> None:
        new = tmp_path / "new.png"
        assert self.run(saved, "--model", "here", "--dir", frozen_vault, "--save", new).exit_code == 0
        with Image.open(saved) as one, Image.open(new) as other:
            assert one.tobytes() == other.tobytes()
        assert self.run(saved, saved, "--model", "here", "--save", new).exit_code == 2


def test_the_picture_that_is_measured_is_the_one_of_the_record() -> None:
    images = [Image.new("RGB", (2, 2), (value, 0, 0)) for value in (1, 2)]
    output = {"latents": torch.zeros(3, 4), "images": images}
    assert replay_module._new_picture(output, {}, 4) is images[1]
    assert replay_module._new_picture(output, {}, 3) is images[0]
    assert replay_module._new_picture(output, {}, 0) is None
    assert replay_module._new_picture(output, {}, 9) is None


class TestLoadedPipelines:
    """One that is loaded already is used as it is, and left as it was."""

    def test_one_that_was_loaded_with_a_function_as_its_call(self, plain_vault: Path, tmp_path: Path) -> None:
        shutil.copytree(plain_vault, tmp_path / "vault")
        cache = pipevault.PipelineCache(tmp_path / "vault", build_config=FAST_BUILD)
        pipe = cache.load(PlainPipeline(), call=lambda pipe: pipe("", generator=None))
        record = pipevault.record_of(pipe("a", seed=3))  # type: ignore[call-arg]
        before = pipevault.outcome(pipe), loaded_state(pipe)
        result = pipevault.replay(record, pipe)
        assert result.equal
        assert result.divergences == ()
        assert (pipevault.outcome(pipe), loaded_state(pipe)) == before
        with pytest.raises(UnknownRecordKeyError, match="Nothing is compiled for a replay unless"):
            pipevault.replay(changed(record, call={"height": 16, "width": 16}), pipe)
        state = loaded_state(pipe)
        assert state is not None
        assert {part.options.policy for part in state.states(pipe).values()} == {"compile"}

    def test_one_of_another_level(self, draw: Callable[..., Any], frozen_vault: Path, tmp_path: Path) -> None:
        record = pipevault.record_of(draw(level="off"))
        cache = pipevault.PipelineCache(frozen_vault, mode="require", build_config=FAST_BUILD)
        pipe = cache.load(make_pipeline(tmp_path), batch_size=1)
        with pytest.raises(SettingsError, match="is of level off, and the pipeline was loaded at repeatable"):
            pipevault.replay(record, pipe)


def test_the_errors_of_records_are_their_own(saved: Path, pipe: Any, frozen_vault: Path) -> None:
    with pytest.raises(NoRecordError):
        pipevault.replay(saved.with_name("absent.png"), pipe, dir=frozen_vault)
    sidecar = saved.with_name("cat.png.json")
    sidecar.write_text(sidecar.read_text().replace('"unet"', '"vnet"'))
    with pytest.raises(RecordDigestError):
        pipevault.replay(sidecar, pipe, dir=frozen_vault)
