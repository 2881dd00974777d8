"""The main job on a real diffusers pipeline: what one process froze, every other runs, bit for bit."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor

import pipevault
import pipevault.key
from helpers.pipelines import FAST_BUILD, draw, stable_diffusion
from pipevault.errors import ChangedPartError, MissError, TrainingModeError, UnfrozenCallError
from pipevault.graphs.part import FrozenPart, part_state
from pipevault.store.vault import Vault

FRESH_PROCESS = """
import json, sys
from pathlib import Path
import torch
from helpers.pipelines import FAST_BUILD, draw, stable_diffusion
import pipevault

STARTS = {"subprocess.Popen", "os.fork", "os.exec", "os.posix_spawn"}
COMPILER = {"torch._inductor.compile_fx", "torch._inductor.codecache"}

pipe = stable_diffusion(Path(sys.argv[2]))
before, started = set(sys.modules), []
sys.addaudithook(lambda event, args: started.append(event) if event in STARTS else None)
pipevault.PipelineCache(sys.argv[1], mode="require", build_config=FAST_BUILD).load(pipe, batch_size=1)
compiler = sorted((set(sys.modules) - before) & COMPILER)
torch.save(draw(pipe), sys.argv[3])
print(json.dumps({"status": pipevault.outcome(pipe).status, "started": started, "compiler": compiler}))
"""


def load(root: Path, pipe: Any, **options: Any) -> Any:
    return pipevault.PipelineCache(root, mode="require", build_config=FAST_BUILD).load(pipe, **options)


@pytest.fixture
def pipe(tmp_path: Path) -> Any:
    return stable_diffusion(tmp_path / "tokenizer")


def test_a_hit_freezes_every_part_that_the_call_uses(frozen_vault: Path, pipe: Any) -> None:
    assert load(frozen_vault, pipe) is pipe
    outcome = pipevault.outcome(pipe)
    assert outcome.status == "hit"
    assert outcome.stored
    assert {name: part.status for name, part in outcome.parts.items()} == {
        "text_encoder": "frozen",
        "unet": "frozen",
        "vae.decoder": "frozen",
        "vae.encoder": "not called",
    }
    assert {"fingerprint", "lookup"} <= outcome.seconds.keys()
    planned = pipevault.outcome(load(frozen_vault, pipe, batch_size=1))
    assert (planned.status, planned.parts) == ("hit", outcome.parts)
    assert {"fingerprint", "lookup", "load"} <= planned.seconds.keys()


def test_the_pipeline_stays_what_it_was(frozen_vault: Path, pipe: Any, tmp_path: Path) -> None:
    load(frozen_vault, pipe)
    assert isinstance(pipe, StableDiffusionPipeline)
    assert isinstance(pipe.unet, UNet2DConditionModel)
    assert isinstance(pipe.unet, FrozenPart)
    assert isinstance(pipe.vae, AutoencoderKL)
    assert pipe.unet.config.sample_size == 8
    assert pipe.to("cpu") is pipe
    pipe.save_pretrained(tmp_path / "saved")
    index = json.loads((tmp_path / "saved" / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionPipeline"
    assert index["unet"] == ["diffusers", "UNet2DConditionModel"]
    again = StableDiffusionPipeline.from_pretrained(tmp_path / "saved", local_files_only=True)
    assert torch.equal(draw(load(frozen_vault, again)), draw(pipe))


def test_frozen_pixels_are_close_to_eager_ones(frozen_vault: Path, pipe: Any) -> None:
    eager = draw(pipe)
    torch.testing.assert_close(draw(load(frozen_vault, pipe)), eager, atol=1e-3, rtol=0)


def test_a_fresh_process_gives_the_bits_of_the_process_that_compiled(
    frozen_vault: Path, pipe: Any, tmp_path: Path
) -> None:
    results = []
    for number in range(2):
        pixels = tmp_path / f"pixels{number}.pt"
        command = [sys.executable, "-c", FRESH_PROCESS, frozen_vault, tmp_path / "tokenizer", pixels]
        done = subprocess.run(
            [str(item) for item in command],
            cwd=Path(__file__).parent.parent,
            capture_output=True,
            text=True,
            check=True,
        )
        results.append((json.loads(done.stdout.splitlines()[-1]), torch.load(pixels)))
    expected = torch.from_numpy(np.load(frozen_vault.parent / "pixels_of_the_compiling_process.npy"))
    for report, pixels in results:
        assert report == {"status": "hit", "started": [], "compiler": []}
        assert torch.equal(pixels, expected)
    assert torch.equal(draw(load(frozen_vault, pipe)), expected)


def test_a_fine_tune_hits_and_runs_with_its_own_weights(frozen_vault: Path, tmp_path: Path) -> None:
    tuned = stable_diffusion(tmp_path / "tokenizer", seed=7)
    eager = draw(tuned)
    frozen = draw(load(frozen_vault, tuned))
    torch.testing.assert_close(frozen, eager, atol=1e-3, rtol=0)
    assert not torch.allclose(frozen, draw(load(frozen_vault, stable_diffusion(tmp_path / "tokenizer"))), atol=1e-2)


def test_a_fused_lora_is_followed(frozen_vault: Path, pipe: Any) -> None:
    from peft import LoraConfig

    load(frozen_vault, pipe)
    before = draw(pipe)
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
    with pytest.raises(pipevault.errors.ChangedPartError, match="unet"):
        draw(pipe)
    pipe.fuse_lora(components=["unet"])
    fused = draw(pipe)
    pipe.unload_lora_weights()
    assert torch.equal(draw(pipe), fused)
    assert not torch.equal(fused, before)
    pipevault.PipelineCache(mode="off").load(pipe, batch_size=1)
    eager_pipe = stable_diffusion_like(pipe)
    torch.testing.assert_close(fused, draw(eager_pipe), atol=1e-3, rtol=0)


@pytest.mark.parametrize(
    ("change", "undo", "named"),
    [
        (lambda p: p.enable_freeu(0.9, 0.2, 1.1, 1.2), lambda p: p.disable_freeu(), r"up_blocks\.\d+: b1"),
        (lambda p: setattr(p.unet, "conv_act", torch.nn.ReLU()), None, "conv_act"),
        (lambda p: p.unet.set_attn_processor(AttnProcessor()), None, "processor"),
        (lambda p: p.unet.mid_block.register_forward_hook(lambda m, i, o: o * 3), None, "hook"),
        (lambda p: p.vae.enable_tiling(), lambda p: p.vae.disable_tiling(), "use_tiling"),
        (lambda p: setattr(p, "unet", p.components["unet"]), None, "replaced"),
    ],
)
@pytest.mark.parametrize("generate_first", [True, False])
def test_a_changed_graph_is_noticed_before_a_pixel_is_made(
    frozen_vault: Path, pipe: Any, change: Any, undo: Any, named: str, generate_first: bool
) -> None:
    """A VAE's own switches are watched from the first generation on: they are no part's."""
    load(frozen_vault, pipe)
    if generate_first or named == "use_tiling":
        expected = draw(pipe)
        match = named
    else:
        expected, match = None, "was changed after it was frozen"
    change(pipe)
    with pytest.raises(ChangedPartError, match=match):
        draw(pipe)
    if undo:
        undo(pipe)
        assert expected is None or torch.equal(draw(pipe), expected)


def test_a_change_that_may_matter_is_judged_by_what_eager_code_computes(frozen_vault: Path, pipe: Any) -> None:
    load(frozen_vault, pipe)
    expected = draw(pipe)
    pipe.unet.mid_block.resnets[0].note = 1.5  # read by no code
    eager = part_state(pipe.unet).eager
    calls: list[int] = []

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return eager(*args, **kwargs)

    part_state(pipe.unet).eager = counted  # type: ignore[method-assign]
    assert torch.equal(draw(pipe), expected)
    assert torch.equal(draw(pipe), expected)
    assert len(calls) == 1, "it was tried once, and accepted"

    pipe.unet.mid_block.resnets[0].output_scale_factor = 3.0  # divides the block's result
    with pytest.raises(ChangedPartError, match=r"output_scale_factor.*no longer computes what its graph does"):
        draw(pipe)
    with pytest.raises(ChangedPartError, match="output_scale_factor"):
        draw(pipe)
    pipe.unet.mid_block.resnets[0].output_scale_factor = 1.0
    assert torch.equal(draw(pipe), expected)


def test_a_part_that_was_changed_is_noticed_while_another_is_loaded(frozen_vault: Path, pipe: Any) -> None:
    load(frozen_vault, pipe, batch_size=1)
    pipe.unet.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
    with pytest.raises(ChangedPartError, match=r"unet was changed after it was frozen"):
        load(frozen_vault, pipe, parts=["text_encoder"], batch_size=1)
    pipe.unet.disable_freeu()
    assert pipevault.outcome(load(frozen_vault, pipe, parts=["text_encoder"], batch_size=1)).status == "hit"


def test_other_pipelines_can_be_made_of_the_components(frozen_vault: Path, pipe: Any) -> None:
    from diffusers import StableDiffusionImg2ImgPipeline

    load(frozen_vault, pipe)
    other = StableDiffusionImg2ImgPipeline.from_pipe(pipe)
    assert type(other.unet) is UNet2DConditionModel
    assert other.unet.conv_in is pipe.unet.conv_in
    assert isinstance(pipe.unet, FrozenPart)
    draw(pipe)


def test_a_copy_is_eager_and_says_so(frozen_vault: Path, pipe: Any) -> None:
    import copy

    load(frozen_vault, pipe)
    copied = copy.deepcopy(pipe)
    assert not isinstance(copied.unet, FrozenPart)
    with pytest.raises(pipevault.errors.SettingsError, match="was not loaded"):
        pipevault.outcome(copied)
    torch.testing.assert_close(draw(copied), draw(pipe), atol=1e-3, rtol=0)


def test_a_failed_load_leaves_the_pipeline_as_it_was(frozen_vault: Path, pipe: Any) -> None:
    eager = draw(pipe)
    with pytest.raises(MissError):
        load(frozen_vault, pipe, height=32)
    with pytest.raises(pipevault.errors.SettingsError, match="was not loaded"):
        pipevault.outcome(pipe)
    assert not isinstance(pipe.unet, FrozenPart)
    assert torch.equal(draw(pipe), eager)
    frozen = draw(load(frozen_vault, pipe))
    with pytest.raises(MissError):
        load(frozen_vault, pipe, height=32)
    assert pipevault.outcome(pipe).status == "hit"
    assert torch.equal(draw(pipe), frozen)


def stable_diffusion_like(pipe: Any) -> Any:
    import copy

    components = {name: copy.deepcopy(value) for name, value in pipe.components.items()}
    return StableDiffusionPipeline(**components, requires_safety_checker=False)


def test_an_unfrozen_size_is_an_error_that_says_what_is_frozen(frozen_vault: Path, pipe: Any) -> None:
    load(frozen_vault, pipe)
    with pytest.raises(UnfrozenCallError, match=r"unet was called[\s\S]*float32\[2,4,16,16\][\s\S]*pipevault prewarm"):
        draw(pipe, height=32, width=32)


def test_another_size_is_a_miss_that_names_the_factor(frozen_vault: Path, pipe: Any) -> None:
    with pytest.raises(MissError, match=r"call\.height: 16 in the vault, 32 here"):
        load(frozen_vault, pipe, height=32)


def test_explain_does_nothing_and_names_what_differs(frozen_vault: Path, pipe: Any) -> None:
    cache = pipevault.PipelineCache(frozen_vault, mode="require", build_config=FAST_BUILD)
    assert cache.explain(pipe).status == "hit"
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    try:
        explanation = cache.explain(pipe)
    finally:
        torch.set_num_threads(before)
    assert explanation.status == "miss"
    assert [difference.factor for difference in explanation.differences] == ["machine.threads"]
    assert explanation.nearest == cache.key(pipe).digest
    assert not isinstance(pipe.unet, FrozenPart)


def test_training_mode_is_refused_and_the_pipeline_left_eager(pipe: Any, tmp_path: Path) -> None:
    pipe.unet.train()
    pipe.text_encoder.train()
    cache = pipevault.PipelineCache(tmp_path / "vault", build_config=FAST_BUILD)
    with pytest.raises(TrainingModeError, match="is in training mode"):
        cache.load(pipe, batch_size=1)
    assert not isinstance(pipe.unet, FrozenPart)
    assert not isinstance(pipe.vae.decoder, FrozenPart)
    assert list(cache.vault.manifests()) == []


def test_parts_can_be_chosen(frozen_vault: Path, pipe: Any) -> None:
    with pytest.raises(pipevault.errors.SettingsError, match="has no part transformer"):
        load(frozen_vault, pipe, parts=["transformer"])


def test_the_manifests_show_every_factor_and_check(frozen_vault: Path) -> None:
    manifests = list(Vault.open(frozen_vault).manifests())
    (plan,) = [manifest for manifest in manifests if manifest.key.kind == "plan"]
    graphs = {manifest.key.digest.hex: manifest for manifest in manifests if manifest.key.kind == "graph"}
    assert set(plan.key.factors) == set(pipevault.key.FACTOR_GROUPS) - {"signature", "constants"}
    assert plan.parts["unet"]["status"] == "frozen"
    assert {key.hex for key in plan.needs} == graphs.keys()
    assert plan.info["check"]["distance"] <= plan.info["check"]["tolerance"]
    unet = graphs[plan.parts["unet"]["graphs"][0]]
    assert set(unet.key.factors) == set(pipevault.key.FACTOR_GROUPS) - {"pipeline", "call", "constants"}
    (part,) = unet.parts.values()
    checks = part["graphs"][0]["checks"]
    assert checks["calls"] == 2
    assert checks["distance"] <= checks["tolerance"]
    for manifest in manifests:
        assert str(Path.home()) not in json.dumps(dict(manifest.key.factors))
