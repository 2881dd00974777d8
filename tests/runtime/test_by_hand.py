"""``compile_pipe``, ``save_pipe`` and ``load_pipe`` of onediffx, called as OneDiff's users call them."""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onediffx
import pytest
import torch
from onediff.infer_compiler import compile as onediff_compile
from torch import nn

from helpers.pipelines import FAST_BUILD, Block, draw, stable_diffusion
from pipevault.errors import (
    ChangedPartError,
    CorruptEntryError,
    MissError,
    NothingFrozenError,
    SettingsError,
    UnfrozenCallError,
    WrongMachineError,
)
from pipevault.graphs.part import part_state
from pipevault.runtime.by_hand import read_options

pytestmark = pytest.mark.compile

ONLY_UNET = ("text_encoder", "vae")
OPTIONS = {"build_config": FAST_BUILD}


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def eager(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return stable_diffusion(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def saved(eager: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that ``save_pipe`` wrote, and ``pixels.npy`` of the process that compiled."""
    folder = tmp_path_factory.mktemp("by hand") / "cached_pipe"
    pipe = copy.deepcopy(eager)
    options = json.dumps(OPTIONS)
    with torch.no_grad():
        onediffx.compile_pipe(pipe, backend="inductor", ignores=ONLY_UNET, options=options)
        first, second = draw(pipe), draw(pipe)
    assert torch.equal(first, second)
    assert dict(part_state(pipe.unet).uses) == {"frozen": 6}
    onediffx.save_pipe(pipe, dir=str(folder), ignores=ONLY_UNET)
    np.save(folder.parent / "pixels.npy", first.numpy())
    return folder


@pytest.fixture
def loaded(eager: Any, saved: Path) -> Any:
    return load(copy.deepcopy(eager), saved)


def load(pipe: Any, folder: Path, **options: Any) -> Any:
    onediffx.compile_pipe(pipe, backend="inductor", ignores=ONLY_UNET, options={**OPTIONS, **options})
    onediffx.load_pipe(pipe, dir=str(folder), ignores=ONLY_UNET)
    return pipe


def edited(saved: Path, tmp_path: Path, edit: Any) -> Path:
    folder = Path(shutil.copytree(saved, tmp_path / "edited"))
    document = json.loads((folder / "unet").read_bytes())
    edit(document)
    (folder / "unet").write_text(json.dumps(document))
    return folder


class TestSavedAndLoaded:
    def test_a_second_process_draws_the_same_bits_from_the_first_call_on(self, saved: Path, tmp_path: Path) -> None:
        code = f"""
import sys; sys.path.insert(0, {str(Path(__file__).parents[1])!r})
import pipevault, onediffx, torch, numpy as np
from pathlib import Path
from helpers.pipelines import draw, stable_diffusion
pipe = stable_diffusion(Path({str(tmp_path)!r}))
onediffx.compile_pipe(pipe, backend="inductor", ignores={ONLY_UNET!r}, options={OPTIONS!r})
onediffx.load_pipe(pipe, dir={str(saved)!r}, ignores={ONLY_UNET!r})
with torch.no_grad():
    pixels = [draw(pipe).numpy() for _ in range(2)]
expected = np.load({str(saved.parent / "pixels.npy")!r})
print([np.array_equal(p, expected) for p in pixels], pipe.unet.get_graph().uses["frozen"])
print(any(name.startswith("torch._inductor.compile_fx") for name in sys.modules))
"""
        finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert finished.returncode == 0, finished.stderr
        assert finished.stdout.split("\n")[:2] == ["[True, True] 6", "False"]

    def test_a_call_that_was_not_saved_is_an_error(self, loaded: Any) -> None:
        with pytest.raises(UnfrozenCallError, match="on_unfrozen='compile' and save_pipe"):
            draw(loaded, prompt=["a cat", "a dog"])

    def test_compiling_it_again_keeps_the_graphs(self, loaded: Any) -> None:
        part = loaded.unet
        onediffx.compile_pipe(loaded, backend="inductor", ignores=ONLY_UNET, options=OPTIONS)
        assert loaded.unet is part
        assert len(part_state(part).graphs) == 1
        loaded.unet.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
        onediffx.compile_pipe(loaded, backend="inductor", ignores=ONLY_UNET, options=OPTIONS)
        assert part_state(loaded.unet).graphs == []

    def test_saving_before_the_pipeline_ran_is_an_error(self, eager: Any, tmp_path: Path) -> None:
        pipe = onediffx.compile_pipe(copy.deepcopy(eager), backend="inductor", options=OPTIONS)
        with pytest.raises(NothingFrozenError, match="Run the pipeline first"):
            onediffx.save_pipe(pipe, dir=str(tmp_path / "empty"))
        with pytest.raises(NothingFrozenError, match="nothing to save"):
            pipe.unet.save_graph(tmp_path / "empty" / "unet")

    def test_a_part_that_was_saved_and_is_gone(self, eager: Any, saved: Path, tmp_path: Path) -> None:
        folder = Path(shutil.copytree(saved, tmp_path / "lacking"))
        (folder / "pipevault.json").write_text('{"pipevault_saved": 1, "parts": ["text_encoder", "unet"]}')
        with pytest.raises(CorruptEntryError, match="lacks text_encoder, which was saved there"):
            load(copy.deepcopy(eager), folder)


class TestGuard:
    def test_freeu(self, loaded: Any) -> None:
        before = draw(loaded)
        loaded.unet.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
        with pytest.raises(ChangedPartError, match=r"b1 is new.*Undo the change.*compile_pipe\(pipe"):
            draw(loaded)
        loaded.unet.disable_freeu()
        assert torch.equal(draw(loaded), before)

    def test_an_attention_processor(self, loaded: Any) -> None:
        from diffusers.models.attention_processor import AttnProcessor

        loaded.unet.set_attn_processor(AttnProcessor())
        with pytest.raises(ChangedPartError, match="processor"):
            draw(loaded)

    def test_a_lora_that_is_not_fused(self, loaded: Any) -> None:
        from peft import LoraConfig

        loaded.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
        with pytest.raises(ChangedPartError, match=r"Fuse the LoRA"):
            draw(loaded)

    def test_another_scheduler_and_other_weights_are_no_change(self, loaded: Any) -> None:
        from diffusers import DDPMScheduler

        before = draw(loaded)
        loaded.scheduler = DDPMScheduler()
        loaded.unet.conv_out.bias += 1
        assert not torch.equal(draw(loaded), before)
        assert dict(part_state(loaded.unet).uses) == {"frozen": 6}

    def test_saving_what_was_changed(self, loaded: Any, tmp_path: Path) -> None:
        loaded.unet.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
        with pytest.raises(ChangedPartError, match="b1 is new"):
            onediffx.save_pipe(loaded, dir=str(tmp_path), ignores=ONLY_UNET)

    def test_a_change_before_anything_was_frozen_is_none(self, eager: Any) -> None:
        pipe = copy.deepcopy(eager)
        onediffx.compile_pipe(pipe, backend="inductor", ignores=ONLY_UNET, options={"on_unfrozen": "eager"})
        before = draw(pipe)
        pipe.unet.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
        assert not torch.equal(draw(pipe), before)

    def test_a_change_that_cannot_be_judged_is_put_to_the_test(self, loaded: Any) -> None:
        before = draw(loaded)
        loaded.unet.note = "harmless"
        assert torch.equal(draw(loaded), before)
        assert part_state(loaded.unet).trial is None

    def test_a_dropped_pipeline_frees_its_weights_at_once(self, loaded: Any, eager: Any, saved: Path) -> None:
        import gc
        import weakref

        pipe = load(copy.deepcopy(eager), saved)
        draw(pipe)
        gc.collect()
        gc.disable()
        try:
            weight = weakref.ref(pipe.unet.conv_in.weight)
            del pipe
            assert weight() is None
        finally:
            gc.enable()


class TestLoadingWhatDoesNotFit:
    def test_a_pipeline_that_was_changed(self, eager: Any, saved: Path) -> None:
        pipe = copy.deepcopy(eager)
        pipe.unet.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
        with pytest.raises(ChangedPartError, match=r"architecture\.digest is .* there and .* here"):
            load(pipe, saved)

    def test_another_machine(self, eager: Any, saved: Path, tmp_path: Path) -> None:
        folder = edited(saved, tmp_path, lambda document: document["identity"]["machine"].update(threads=64))
        with pytest.raises(WrongMachineError, match=r"machine\.threads is 64 there"):
            load(copy.deepcopy(eager), folder)

    def test_another_torch(self, eager: Any, saved: Path, tmp_path: Path) -> None:
        folder = edited(saved, tmp_path, lambda document: document["identity"]["toolchain"].update(torch="2.9.0"))
        with pytest.raises(MissError, match=r"toolchain.torch is '2\.9\.0' there") as caught:
            load(copy.deepcopy(eager), folder)
        assert caught.value.reason.startswith("toolchain.torch")

    def test_other_options(self, eager: Any, saved: Path) -> None:
        with pytest.raises(MissError, match=r"backend\.config"):
            load(copy.deepcopy(eager), saved, mode="max-autotune")


class TestOptions:
    def test_none_mapping_text_and_file_are_the_same(self, tmp_path: Path) -> None:
        given = {"on_unfrozen": "error", "memory_format": "channels_last"}
        file = tmp_path / "options.json"
        file.write_text(json.dumps(given))
        read = read_options(given)
        assert given == {"on_unfrozen": "error", "memory_format": "channels_last"}
        assert read == read_options(json.dumps(given)) == read_options(str(file)) == read_options(file)
        assert read_options(None) == read_options({}) == read_options({"mode": None})

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"on_unfrosen": "error"}, "no option 'on_unfrosen'. Did you mean on_unfrozen"),
            ({"quantize": True}, "no option 'quantize'. Options: on_unfrozen"),
            ({"on_unfrozen": "never"}, "on_unfrozen must be one of compile, eager, error"),
            ({"weights": "loose"}, "weights must be one of bound, baked"),
            ({"memory_format": "channels_first"}, "memory_format must be one of"),
            ({"mode": "max-optimize:max-autotune"}, "mode must be one of default"),
            ({"dynamic": True}, "each size has a graph of its own"),
            ({"build_config": {"max_autotun": True}}, "Did you mean max_autotune"),
            ({"build_config": {"": True}}, "has no field ''"),
            ({"build_config": 3}, "build_config must be a mapping"),
            ("{", "cannot be read"),
            ("[]", "cannot be read"),
            ("missing.json", "options file missing.json .* cannot be read"),
            (3, "must be a mapping, not a int"),
        ],
    )
    def test_bad_ones(self, options: Any, message: str) -> None:
        with pytest.raises(SettingsError, match=message):
            onediff_compile(Block().eval(), backend="inductor", options=options)

    def test_a_file_that_holds_a_list(self, tmp_path: Path) -> None:
        (tmp_path / "options.json").write_text("[]")
        with pytest.raises(SettingsError, match=r"options file .* must be a mapping"):
            read_options(tmp_path / "options.json")

    def test_a_mode_becomes_options_of_inductor(self) -> None:
        part = onediff_compile(Block().eval(), backend="inductor", options={"mode": "max-autotune"})
        config = part_state(part).options.build.config
        assert config["max_autotune"] is True
        assert not any("cudagraph" in name for name in config)

    def test_memory_format(self) -> None:
        module = nn.Sequential(nn.Conv2d(4, 4, 3), nn.Conv3d(2, 2, 3)).eval()
        onediff_compile(module, backend="inductor", options={"memory_format": "channels_last"})
        assert module[0].weight.is_contiguous(memory_format=torch.channels_last)
        assert module[1].weight.is_contiguous()

    def test_as_decorator_and_on_what_is_no_module(self) -> None:
        assert part_state(onediff_compile(backend="inductor")(Block().eval())).name == "Block"
        with pytest.raises(SettingsError, match="compiles modules, not a int"):
            onediff_compile(3, backend="inductor")
