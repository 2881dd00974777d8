"""Freezing the repeated blocks of a part in its place."""

from __future__ import annotations

import copy
import gc
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

import pipevault
from helpers.pipelines import FAST_BUILD, Denoiser, PlainPipeline, draw
from pipevault.cache.regions import choose_regions, repeated_blocks
from pipevault.errors import ChangedPartError, MissError, SettingsError
from pipevault.graphs.part import FrozenPart
from pipevault.store.vault import Vault

pytestmark = pytest.mark.compile

BLOCKS = 8


class Layer(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.mix = nn.Linear(width, width)
        self.scale = 1.0

    def forward(self, x: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
        return x + self.scale * torch.tanh(self.mix(x)) * torch.cos(step)


class Stack(nn.Module):
    """A transformer in outline: something before the blocks, the blocks, something after them."""

    def __init__(self, width: int = 8, blocks: int = BLOCKS) -> None:
        super().__init__()
        self.enter = nn.Linear(8, width)
        self.layers = nn.ModuleList(Layer(width) for _ in range(blocks))
        self.leave = nn.Linear(width, 8)

    def forward(self, latents: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
        x = self.enter(latents)
        for layer in self.layers:
            x = layer(x, step)
        return latents - 0.1 * self.leave(x)


class StackPipeline(PlainPipeline):
    def __init__(self, seed: int = 0, **options: Any) -> None:
        torch.manual_seed(seed)
        self.transformer = Stack(**options).eval()


def cache(root: Path, mode: str = "require", **options: Any) -> pipevault.PipelineCache:
    return pipevault.PipelineCache(root, mode=mode, build_config=FAST_BUILD, **options)


@pytest.fixture(scope="module")
def vault(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("regions") / "vault"
    cache(root, "compile").load(StackPipeline(), batch_size=1)
    return root


@pytest.fixture
def no_compiling(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("something was compiled")

    monkeypatch.setattr("pipevault.graphs.inductor.build_graph", refuse)


def graphs_in(root: Path) -> int:
    return sum(manifest.key.kind == "graph" for manifest in Vault.open(root).manifests())


def test_one_graph_serves_all_blocks(vault: Path, no_compiling: None) -> None:
    eager = draw(StackPipeline())
    pipe = cache(vault).load(StackPipeline(), batch_size=1)
    assert all(isinstance(layer, FrozenPart) for layer in pipe.transformer.layers)
    assert not isinstance(pipe.transformer, FrozenPart)
    assert graphs_in(vault) == 1
    torch.testing.assert_close(draw(pipe), eager, atol=1e-5, rtol=1e-5)
    part = pipevault.outcome(pipe).parts["transformer"]
    assert (part.status, part.graphs, part.regions) == ("frozen", 1, f"{BLOCKS} Layer")
    assert pipevault.outcome(pipe).status == "hit"


def test_the_choice_stands_in_the_plan(vault: Path) -> None:
    [plan] = [manifest for manifest in Vault.open(vault).manifests() if manifest.key.kind == "plan"]
    assert plan.parts["transformer"]["regions"] == f"{BLOCKS} Layer"
    assert plan.key.factors["backend"]["regions"] == {"transformer": f"{BLOCKS} Layer"}


def test_every_call_and_process_gives_the_same_bits(vault: Path, no_compiling: None) -> None:
    pipe = cache(vault).load(StackPipeline())
    first = draw(pipe)
    assert torch.equal(draw(pipe), first)
    assert not torch.equal(draw(pipe, seed=2), first)
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from pathlib import Path\n"
        "from cache.test_regions import StackPipeline, cache, draw\n"
        "print(draw(cache(Path(sys.argv[2])).load(StackPipeline())).numpy().tobytes().hex())"
    )
    tests = str(Path(__file__).parents[1])
    done = subprocess.run([sys.executable, "-c", code, tests, str(vault)], capture_output=True, text=True, check=True)
    assert done.stdout.split()[-1] == first.numpy().tobytes().hex()


def test_each_block_has_its_own_weights(vault: Path) -> None:
    pipe = cache(vault).load(StackPipeline(seed=3))
    torch.testing.assert_close(draw(pipe), draw(StackPipeline(seed=3)), atol=1e-5, rtol=1e-5)


def test_a_longer_model_of_the_same_blocks_needs_no_graph_of_its_own(vault: Path, no_compiling: None) -> None:
    pipe = cache(vault, regions="blocks").load(StackPipeline(blocks=11))
    torch.testing.assert_close(draw(pipe), draw(StackPipeline(blocks=11)), atol=1e-5, rtol=1e-5)
    assert pipevault.outcome(pipe).parts["transformer"].regions == "11 Layer"


def test_weights_that_move_are_bound_again(vault: Path) -> None:
    pipe, other = cache(vault).load(StackPipeline()), StackPipeline(seed=5)
    pipe.transformer.load_state_dict(other.transformer.state_dict())
    torch.testing.assert_close(draw(pipe), draw(other), atol=1e-5, rtol=1e-5)
    for parameter in pipe.transformer.parameters():
        parameter.data = parameter.data * 0.5
    for parameter in other.transformer.parameters():
        parameter.data = parameter.data * 0.5
    torch.testing.assert_close(draw(pipe), draw(other), atol=1e-5, rtol=1e-5)


def test_a_block_that_changes_is_an_error(vault: Path) -> None:
    pipe = cache(vault).load(StackPipeline())
    draw(pipe)
    pipe.transformer.layers[3].scale = 0.0
    with pytest.raises(ChangedPartError, match="transformer"):
        draw(pipe)


def test_what_lies_outside_the_blocks_follows_its_changes(vault: Path) -> None:
    pipe = cache(vault).load(StackPipeline())
    other = StackPipeline()
    for stack in (pipe.transformer, other.transformer):
        nn.init.zeros_(stack.leave.bias)
    torch.testing.assert_close(draw(pipe), draw(other), atol=1e-5, rtol=1e-5)


def test_whole_and_blocks_are_chosen_anew_by_each_load(vault: Path, tmp_path: Path) -> None:
    pipe = cache(vault).load(StackPipeline())
    blocks = draw(pipe)
    cache(tmp_path / "whole", "compile", regions="off").load(pipe, batch_size=1)
    assert isinstance(pipe.transformer, FrozenPart)
    assert not any(isinstance(layer, FrozenPart) for layer in pipe.transformer.layers)
    assert pipevault.outcome(pipe).parts["transformer"].regions == ""
    torch.testing.assert_close(draw(pipe), blocks, atol=1e-5, rtol=1e-5)
    cache(vault).load(pipe)
    assert not isinstance(pipe.transformer, FrozenPart)
    assert torch.equal(draw(pipe), blocks)


def test_a_failed_load_leaves_the_blocks_as_they_were(vault: Path, tmp_path: Path) -> None:
    pipe = cache(vault).load(StackPipeline())
    before, parts = draw(pipe), list(pipe.transformer.layers)
    with pytest.raises(MissError):
        cache(tmp_path / "nothing", regions="off").load(pipe, batch_size=1)
    assert all(now is part for now, part in zip(pipe.transformer.layers, parts, strict=True))
    assert torch.equal(draw(pipe), before)
    plain = StackPipeline()
    with pytest.raises(MissError):
        cache(tmp_path / "nothing").load(plain, batch_size=1)
    assert not any(isinstance(layer, FrozenPart) for layer in plain.transformer.layers)


def test_unloaded_and_copied_blocks_are_eager(vault: Path) -> None:
    pipe = cache(vault).load(StackPipeline())
    copied = copy.deepcopy(pipe.transformer)
    assert not any(isinstance(layer, FrozenPart) for layer in copied.layers)
    pipevault.unload(pipe)
    assert not any(isinstance(layer, FrozenPart) for layer in pipe.transformer.layers)
    assert torch.equal(draw(pipe), draw(StackPipeline()))


def test_a_record_names_each_graph_once_and_replays(vault: Path) -> None:
    pipe: Any = cache(vault).load(StackPipeline())
    output = pipe(prompt="a", seed=4)
    record = pipevault.record_of(output)
    assert {name: len(graphs) for name, graphs in record.graphs.items()} == {"transformer.layers.0": 1}
    assert record.pipeline["load"]["regions"] == "auto"
    again = pipevault.replay(record, StackPipeline(), dir=vault)
    assert again.divergences == ()


def test_blocks_are_found_by_name_or_by_architecture() -> None:
    assert [path for path, _ in repeated_blocks(Stack(blocks=3))] == ["layers.0", "layers.1", "layers.2"]

    class Named(Stack):
        _repeated_blocks: ClassVar[list[str]] = ["Linear"]

    assert [path for path, _ in repeated_blocks(Named(blocks=1))] == ["enter", "layers.0.mix", "leave"]
    shared = Stack(blocks=3)
    shared.again = shared.layers[1]
    assert [path for path, _ in repeated_blocks(shared)] == ["layers.0", "layers.2"]
    mixed = Stack(blocks=2)
    mixed.layers.append(Layer(4))
    assert [path for path, _ in repeated_blocks(mixed)] == ["layers.0", "layers.1"]


@pytest.mark.parametrize(
    ("blocks", "regions", "chosen"),
    [(8, "auto", 8), (7, "auto", 0), (7, "blocks", 7), (8, "off", 0), (1, "auto", 0)],
)
def test_auto_decides_by_number_and_size(blocks: int, regions: str, chosen: int) -> None:
    found = choose_regions(StackPipeline(blocks=blocks), ["transformer"], regions)
    assert sum(len(its.blocks) for its in found.values()) == chosen


def test_auto_leaves_a_part_whole_whose_weights_lie_elsewhere() -> None:
    pipe = StackPipeline()
    pipe.transformer.enter = nn.Sequential(nn.Linear(8, 4096), nn.Linear(4096, 8))
    assert choose_regions(pipe, ["transformer"], "auto") == {}


def test_auto_leaves_a_part_whole_whose_blocks_all_differ() -> None:
    pipe = StackPipeline()
    for index, layer in enumerate(pipe.transformer.layers):
        layer.scale = float(index)
    assert choose_regions(pipe, ["transformer"], "auto") == {}


def test_asked_for_blocks_where_there_are_none_is_an_error(tmp_path: Path) -> None:
    class Plain(PlainPipeline):
        def __init__(self) -> None:
            self.transformer = Denoiser().eval()

    with pytest.raises(SettingsError, match="no repeated blocks"):
        cache(tmp_path / "vault", "compile", regions="blocks").load(Plain(), batch_size=1)
    with pytest.raises(SettingsError, match=r"regions .*: expected one of auto, blocks, off"):
        cache(tmp_path / "vault", regions="some")


@pytest.mark.parametrize(("frozen_s", "status"), [(0.98, "eager"), (0.5, "frozen")])
def test_parts_that_gain_nothing_stay_eager_where_that_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, frozen_s: float, status: str
) -> None:
    from pipevault.graphs import freezing

    compare: Any = freezing._compare

    def timed(*args: Any, **kwargs: Any) -> Any:
        return replace(compare(*args, **kwargs), eager_s=1.0, frozen_s=frozen_s)

    monkeypatch.setattr(freezing, "_compare", timed)

    root = tmp_path / "vault"
    pipe = cache(root, "compile").load(PlainPipeline(), batch_size=1, parts="auto")
    part = pipevault.outcome(pipe).parts["transformer"]
    assert (part.status, part.reason) == (status, "freezing it gains 2 %" if status == "eager" else "")
    assert isinstance(pipe.transformer, FrozenPart) == (status == "frozen")
    torch.testing.assert_close(draw(pipe), draw(PlainPipeline()), atol=1e-5, rtol=1e-5)
    again = cache(root).load(PlainPipeline(), batch_size=1, parts="auto")
    assert pipevault.outcome(again).parts["transformer"].status == status
    key = cache(root).key(PlainPipeline(), batch_size=1, parts="auto")
    assert key.factors["backend"]["parts"] == "auto"
    assert key.digest != cache(root).key(PlainPipeline(), batch_size=1).digest


def offloaded_one_by_one(stack: nn.Module) -> None:
    from accelerate import cpu_offload

    cpu_offload(stack, execution_device=torch.device("cpu"))


def offloaded_by_groups(stack: nn.Module) -> None:
    from diffusers.hooks import apply_group_offloading

    apply_group_offloading(
        stack,
        onload_device=torch.device("cpu"),
        offload_device=torch.device("cpu"),
        offload_type="block_level",
        num_blocks_per_group=1,
    )


@pytest.mark.parametrize("offload", [offloaded_one_by_one, offloaded_by_groups])
@pytest.mark.parametrize("first", [True, False])
def test_blocks_that_are_offloaded(vault: Path, no_compiling: None, offload: Any, first: bool) -> None:
    expected = draw(cache(vault).load(StackPipeline()))
    pipe: Any = StackPipeline()
    pipe._execution_device = torch.device("cpu")  # as pipelines of diffusers tell it
    if first:
        offload(pipe.transformer)
    cache(vault).load(pipe)
    if not first:
        offload(pipe.transformer)
    assert torch.equal(draw(pipe), expected)
    assert torch.equal(draw(pipe), expected)
    part = pipevault.outcome(pipe).parts["transformer"]
    assert (part.status, part.reason) == ("frozen", "")


def test_a_lora_that_is_fused_into_blocks_is_followed(vault: Path, no_compiling: None) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    def fused(pipe: StackPipeline) -> StackPipeline:
        torch.manual_seed(7)
        config = LoraConfig(r=2, target_modules=["mix"], init_lora_weights=False)
        inject_adapter_in_model(config, pipe.transformer)
        for module in pipe.transformer.modules():
            if hasattr(module, "merge"):
                module.merge()
        return pipe

    plain = draw(fused(StackPipeline()))
    assert not torch.allclose(plain, draw(StackPipeline()), atol=1e-4)
    pipe = cache(vault).load(fused(StackPipeline()))
    torch.testing.assert_close(draw(pipe), plain, atol=1e-5, rtol=1e-5)
    assert pipevault.outcome(pipe).parts["transformer"].regions == f"{BLOCKS} Layer"


class Schedule(Stack):
    """Sets a number on its blocks late in a generation, where no guard looks."""

    calls = 0

    def forward(self, latents: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            layer.scale = 0.0 if step >= 6 else 1.0  # type: ignore[assignment]
        drawn = super().forward(latents, step)
        for layer in self.layers:
            layer.scale = 1.0  # type: ignore[assignment]
        return drawn


def test_a_number_that_is_set_on_a_block_within_a_generation_is_followed(vault: Path) -> None:
    def made() -> StackPipeline:
        pipe = StackPipeline()
        pipe.transformer.__class__ = Schedule
        return pipe

    pipe = cache(vault).load(made())
    for steps in (5, 10, 5):
        expected = draw(made(), num_inference_steps=steps)
        torch.testing.assert_close(draw(pipe, num_inference_steps=steps), expected, atol=1e-5, rtol=1e-5)


def test_blocks_of_a_pipeline_that_is_gone_are_eager(vault: Path) -> None:
    pipe = cache(vault).load(StackPipeline())
    other = StackPipeline()
    other.transformer = pipe.transformer
    del pipe
    gc.collect()
    for layer in other.transformer.layers:
        layer.scale = 0.0
    plain = StackPipeline()
    for layer in plain.transformer.layers:
        layer.scale = 0.0
    assert torch.equal(draw(other), draw(plain))


def test_a_failed_load_leaves_the_graphs_of_the_one_before(vault: Path, tmp_path: Path) -> None:
    pipe = cache(vault).load(StackPipeline())
    draw(pipe)
    before = [part.table for part in pipe.__dict__["_pipevault"].states(pipe).values()]
    other = shutil.copytree(vault, tmp_path / "other")
    with pytest.raises(MissError):
        cache(other).load(pipe, batch_size=3)
    states = pipe.__dict__["_pipevault"].states(pipe).values()
    assert all(part.table is table for part, table in zip(states, before, strict=True))
    shelves = {part.table.shelf for part in states}
    assert all(str(vault) in str(shelf.store.settings.dir) for shelf in shelves)


def test_pipelines_that_share_a_part_keep_their_regions(vault: Path, tmp_path: Path) -> None:
    first, second = StackPipeline(), StackPipeline()
    second.transformer = first.transformer
    cache(vault).load(second)
    drawn = draw(second)
    cache(tmp_path / "whole", "compile", regions="off", on_unfrozen="eager").load(first, parts=["transformer"])
    part = pipevault.outcome(first).parts["transformer"]
    assert part.status == "eager"
    assert "another pipeline" in part.reason
    assert torch.equal(draw(second), drawn)


def test_decoders_and_language_models_stay_whole() -> None:
    pipe: Any = StackPipeline()
    pipe.decoder = pipe.transformer
    assert choose_regions(pipe, ["decoder"], "auto") == {}
    pipe.transformer.config = SimpleNamespace(use_cache=True)
    assert choose_regions(pipe, ["transformer"], "auto") == {}
