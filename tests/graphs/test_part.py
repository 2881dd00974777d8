"""Frozen parts on one compiled module; every test loads the saved graph into modules of its own."""

from __future__ import annotations

import copy
import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers.hooks
import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from onediff.infer_compiler import DeployableModule
from onediff.infer_compiler import compile as onediff_compile
from torch import nn
from torch.nn.utils import prune

from helpers.graph_parts import frozen, uses_of
from helpers.pipelines import Block
from pipevault.errors import (
    CannotFreezeError,
    ChangedPartError,
    CorruptEntryError,
    NothingFrozenError,
    SettingsError,
    TrainingModeError,
    UnfrozenCallError,
)
from pipevault.graphs.document import read_part
from pipevault.graphs.freezing import _trains
from pipevault.graphs.inductor import BuildOptions
from pipevault.graphs.part import FrozenPart, obstacle, part_state, release, unfrozen
from pipevault.graphs.state import PartOptions

X = torch.linspace(-1, 1, 32).reshape(2, 16)


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def block(seed: int) -> Block:
    torch.manual_seed(seed)
    return Block().eval()


def frozen_block(folder: Path, module: nn.Module) -> nn.Module:
    part = onediff_compile(module, backend="inductor", options=PartOptions(policy="error"))
    part.load_graph(folder / "block")
    return part


def assert_follows(part: nn.Module, eager: nn.Module, *, scale: float = 2.0) -> None:
    before = uses_of(part).get("frozen", 0)
    expected, actual = eager(X, scale=scale), part(X, scale=scale)
    assert actual.keys() == expected.keys()
    assert actual["scale"] == scale
    assert actual["extra"] is None
    torch.testing.assert_close(actual["sample"], expected["sample"])
    assert uses_of(part) == {"frozen": before + 1}


@pytest.mark.compile
def test_a_loaded_graph_runs_with_the_weights_of_its_own_module(block_folder: Path) -> None:
    one, other = block(1), block(2)
    assert_follows(frozen_block(block_folder, one), copy.deepcopy(one))
    assert_follows(frozen_block(block_folder, other), copy.deepcopy(other))


@pytest.mark.parametrize("scale", [0.0, -1.5, 1e4])
def test_a_number_that_multiplies_is_an_input_of_the_graph(block_folder: Path, scale: float) -> None:
    assert_follows(frozen_block(block_folder, block(1)), block(1), scale=scale)


def test_two_parts_over_one_module_do_not_disturb_each_other(block_folder: Path) -> None:
    module = block(1)
    one, other = frozen_block(block_folder, module), frozen_block(block_folder, module)
    unfrozen(other)
    assert_follows(one, copy.deepcopy(module))
    assert type(copy.deepcopy(module)) is Block


def test_the_graph_runs_and_not_the_eager_code(block_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    part = frozen_block(block_folder, block(1))
    expected = part(X, scale=2.0)
    monkeypatch.setattr(Block, "forward", lambda *args, **kwargs: pytest.fail("eager code ran"))
    assert torch.equal(part(X, scale=2.0)["sample"], expected["sample"])


def test_a_part_stays_an_instance_of_its_class_and_shares_its_state(block_folder: Path) -> None:
    module = block(1)
    part = frozen_block(block_folder, module)
    assert isinstance(part, Block)
    assert isinstance(part, DeployableModule)
    assert (type(part).__name__, type(part).__module__) == ("Block", Block.__module__)
    assert part.first is module.first
    part.note = "kept"
    assert module.note == "kept"
    assert unfrozen(part) is module
    assert type(module) is Block


class TestWeightsThatMove:
    @pytest.mark.compile
    def test_data_of_a_parameter_replaced(self, block_folder: Path) -> None:
        part = frozen_block(block_folder, block(1))
        part(X, scale=2.0)
        part.second.weight.data = torch.randn(16, 16)
        assert_follows(part, copy.deepcopy(part))

    def test_a_parameter_replaced_by_another_object(self, block_folder: Path) -> None:
        part = frozen_block(block_folder, block(1))
        part(X, scale=2.0)
        part.second.weight = nn.Parameter(torch.randn(16, 16))
        assert_follows(part, copy.deepcopy(part))

    def test_weights_changed_in_place_and_loaded(self, block_folder: Path) -> None:
        part = frozen_block(block_folder, block(1))
        part.second.weight.add_(1.0)
        assert_follows(part, copy.deepcopy(part))
        part.load_state_dict(block(5).state_dict())
        assert_follows(part, copy.deepcopy(part))

    def test_old_memory_is_not_read_after_a_move(self, block_folder: Path) -> None:
        part = frozen_block(block_folder, block(1))
        part(X, scale=2.0)
        old = part.second.weight.data
        part.to(torch.float32)._apply(lambda tensor: tensor.clone())  # type: ignore[no-untyped-call]
        old.fill_(float("nan"))
        assert_follows(part, copy.deepcopy(part))

    @pytest.mark.parametrize("change", ["double", "half"])
    def test_weights_of_another_dtype_have_graphs_of_their_own(self, block_folder: Path, change: str) -> None:
        part = frozen_block(block_folder, block(1))
        part(X, scale=2.0)
        getattr(part, change)()
        with pytest.raises(UnfrozenCallError):
            part(X, scale=2.0)
        part.float()
        assert_follows(part, copy.deepcopy(part))

    def test_a_buffer_of_another_dtype_is_an_error_that_names_the_tensor(self, block_folder: Path) -> None:
        part = frozen_block(block_folder, block(1))
        part(X, scale=2.0)
        part.offset = part.offset.double()
        with pytest.raises(ChangedPartError, match=r"offset was float32\[16\].* and is float64"):
            part(X, scale=2.0)

    def test_another_memory_format_is_an_error(self, block_folder: Path) -> None:
        part = frozen_block(block_folder, block(1))
        part.second.weight.data = torch.randn(16, 16).t()
        with pytest.raises(ChangedPartError, match="strides"):
            part(X, scale=2.0)

    def test_the_same_memory_read_in_another_order_is_an_error(self, block_folder: Path) -> None:
        part = frozen_block(block_folder, block(1))
        part(X, scale=2.0)
        part.second.weight.data = part.second.weight.data.t()
        with pytest.raises(ChangedPartError, match="strides"):
            part(X, scale=2.0)

    def test_pruned_weights_are_an_error(self, block_folder: Path) -> None:
        part = frozen_block(block_folder, block(1))
        part(X, scale=2.0)
        prune.l1_unstructured(part.second, "weight", amount=0.5)  # type: ignore[no-untyped-call]
        with pytest.raises(ChangedPartError, match="is gone"):
            part(X, scale=2.0)

    def test_changed_sub_modules_are_looked_at(self, block_folder: Path) -> None:
        seen: list[str] = []

        def verify(shelf: object, module: nn.Module) -> str:
            assert shelf is None
            seen.append(type(module).__name__)
            return "it has another second layer"

        part = onediff_compile(block(1), backend="inductor", options=PartOptions(policy="error", verify=verify))
        part.load_graph(block_folder / "block")
        part(X, scale=2.0)
        assert seen == []
        part.second = copy.deepcopy(part.second)
        with pytest.raises(ChangedPartError, match="another second layer"):
            part(X, scale=2.0)
        assert seen == ["Block"]

    def test_untied_weights_are_an_error(self, block_folder: Path) -> None:
        part = frozen_block(block_folder, block(1))
        part.tied = copy.deepcopy(part.first)
        with pytest.raises(ChangedPartError, match="no longer share"):
            part(X, scale=2.0)

    def test_a_missing_tensor_is_an_error(self, block_folder: Path) -> None:
        part = frozen_block(block_folder, block(1))
        part.second = nn.ParameterDict({"other": torch.ones(16), "names": torch.ones(16)})
        with pytest.raises(ChangedPartError, match="is gone"):
            part(X, scale=2.0)

    def test_a_missing_layer_is_an_error(self, block_folder: Path) -> None:
        part = frozen_block(block_folder, block(1))
        part.second = nn.Identity()
        with pytest.raises((ChangedPartError, UnfrozenCallError)):
            part(X, scale=2.0)


def test_arguments_of_other_strides_give_the_same_bits(block_folder: Path) -> None:
    part = frozen_block(block_folder, block(1))
    transposed = X.t().contiguous().t()
    assert transposed.stride() != X.stride()
    assert torch.equal(part(transposed, scale=2.0)["sample"], part(X, scale=2.0)["sample"])
    expanded = X[:1].expand(2, 16)
    assert torch.equal(part(expanded, scale=2.0)["sample"], part(expanded.contiguous(), scale=2.0)["sample"])


def test_a_call_that_no_graph_fits_names_part_call_frozen_calls_and_what_to_do(block_folder: Path) -> None:
    part = frozen_block(block_folder, block(1))
    with pytest.raises(UnfrozenCallError) as caught:
        part(X[:1], scale=2.0)
    message = str(caught.value)
    for expected in (
        "Block",
        "Called: float32[1,16], scale=float",
        "Frozen: float32[2,16], scale=float",
        "on_unfrozen",
    ):
        assert expected in message
    part_state(part).options = PartOptions(policy="eager")
    torch.testing.assert_close(part(X[:1], scale=2.0), block(1)(X[:1], scale=2.0))
    assert uses_of(part) == {"eager": 1}


class TestGradients:
    def test_a_call_on_tensors_that_need_them_is_refused(self, block_folder: Path) -> None:
        part = frozen_block(block_folder, block(1).requires_grad_(False))
        with torch.enable_grad(), pytest.raises(CannotFreezeError, match="need gradients"):
            part(X.clone().requires_grad_(), scale=2.0)

    def test_a_part_whose_weights_ask_for_them_is_refused_until_they_do_not(self, block_folder: Path) -> None:
        part = frozen_block(block_folder, block(1))
        with torch.enable_grad():
            with pytest.raises(CannotFreezeError, match=r"with weights that ask for gradients.*requires_grad_"):
                part(X, scale=2.0)
            part.requires_grad_(False)
            assert_follows(part, copy.deepcopy(part))
        assert_follows(part, copy.deepcopy(part))


class TestHooks:
    class Doubler(ModelHook):
        def pre_forward(self, module: nn.Module, *args: torch.Tensor, **kwargs: object) -> tuple[object, object]:
            return (args[0] * 2, *args[1:]), kwargs

    def test_a_hook_that_was_there_runs_around_the_graph(
        self, block_folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        module = block(1)
        expected = copy.deepcopy(module)(X * 2, scale=2.0)["sample"]
        add_hook_to_module(module, self.Doubler())
        part = frozen_block(block_folder, module)
        with monkeypatch.context() as patch:
            patch.setattr(Block, "forward", lambda *args, **kwargs: pytest.fail("eager code ran"))
            torch.testing.assert_close(part(X, scale=2.0)["sample"], expected)
        eager = release(part)
        assert type(eager) is Block
        torch.testing.assert_close(eager(X, scale=2.0)["sample"], expected)
        assert uses_of(part) == {"frozen": 1}

    def test_a_hook_added_later_runs_around_the_graph(self, block_folder: Path) -> None:
        part = frozen_block(block_folder, block(1))
        expected = part(X * 2, scale=2.0)["sample"]
        add_hook_to_module(part, self.Doubler())
        assert torch.equal(part(X, scale=2.0)["sample"], expected)
        remove_hook_from_module(part)
        assert_follows(part, copy.deepcopy(part))

    def test_to_tell_the_eager_module_leaves_hooks_alone(self, block_folder: Path) -> None:
        module = block(1)
        add_hook_to_module(module, self.Doubler())
        part = frozen_block(block_folder, module)
        assert unfrozen(part) is module
        part(X, scale=2.0)
        assert uses_of(part) == {"frozen": 1}

    def test_a_released_part_without_its_hook_is_eager(self, block_folder: Path) -> None:
        part = frozen_block(block_folder, block(1))
        add_hook_to_module(part, self.Doubler())
        part(X, scale=2.0)
        module = release(part)
        remove_hook_from_module(module)
        module(X, scale=2.0)
        assert uses_of(part) == {"frozen": 1}

    @pytest.mark.parametrize("is_first", [True, False])
    def test_a_hook_of_diffusers_runs_around_the_graph(self, block_folder: Path, is_first: bool) -> None:
        class Tripler(diffusers.hooks.ModelHook):
            def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
                return (args[0] * 3, *args[1:]), kwargs

            def post_forward(self, module: nn.Module, output: Any) -> Any:
                return {**output, "hooked": True}

        module = block(1)
        expected = copy.deepcopy(module)(X * 3, scale=2.0)["sample"]

        def hook(target: nn.Module) -> None:
            registry = diffusers.hooks.HookRegistry.check_if_exists_or_initialize(target)
            registry.register_hook(Tripler(), "tripler")

        if is_first:
            hook(module)
        part = frozen_block(block_folder, module)
        if not is_first:
            part(X, scale=2.0)
            hook(part)
        before = uses_of(part).get("frozen", 0)
        for _ in range(2):
            output = part(X, scale=2.0)
            assert output["hooked"] is True
            torch.testing.assert_close(output["sample"], expected)
        assert uses_of(part) == {"frozen": before + 2}
        torch.testing.assert_close(release(part)(X, scale=2.0)["sample"], expected)
        assert uses_of(part) == {"frozen": before + 2}

    def test_hooks_of_both_kinds_in_either_order(self, block_folder: Path) -> None:
        class Plain(diffusers.hooks.ModelHook):
            pass

        for order in ("ad", "da"):
            module = block(1)
            part = frozen_block(block_folder, module)
            for kind in order:
                if kind == "a":
                    add_hook_to_module(part, self.Doubler())
                else:
                    diffusers.hooks.HookRegistry.check_if_exists_or_initialize(part).register_hook(Plain(), "plain")
            actual = part(X, scale=2.0)["sample"]
            torch.testing.assert_close(actual, block(1)(X * 2, scale=2.0)["sample"])
            assert uses_of(part) == {"frozen": 1}, order

    def test_forward_hooks_of_torch_run(self, block_folder: Path) -> None:
        part = frozen_block(block_folder, block(1))
        seen: list[str] = []
        part.register_forward_hook(lambda module, args, output: seen.append(type(module).__name__))
        part(X, scale=2.0)
        assert seen == ["Block"]

    def test_a_patched_forward_is_refused(self) -> None:
        module = block(1)
        module.forward = lambda x: x  # type: ignore[assignment, method-assign, misc]
        with pytest.raises(CannotFreezeError, match="forward was replaced"):
            onediff_compile(module, backend="inductor")


class TestOffload:
    """Weights that accelerate keeps elsewhere and brings for each call."""

    def offloaded(self, module: nn.Module) -> nn.Module:
        cpu_offload(module, execution_device=torch.device("cpu"))
        return module

    @pytest.mark.compile
    def test_a_module_that_is_offloaded_before_it_is_frozen(self) -> None:
        part = frozen(self.offloaded(block(1)))
        assert part.second.weight.is_meta
        for scale in (2.0, 3.0):
            torch.testing.assert_close(part(X, scale=scale), block(1)(X, scale=scale))
        assert part_state(part).table.slots[0].refusal == ""
        assert uses_of(part) == {"frozen": 2}
        assert part.second.weight.is_meta

    def test_a_module_that_is_offloaded_afterwards(self, block_folder: Path) -> None:
        part = frozen_block(block_folder, block(1))
        assert_follows(part, block(1))
        self.offloaded(part)
        assert part.second.weight.is_meta
        for scale in (2.0, 3.0):
            torch.testing.assert_close(part(X, scale=scale), block(1)(X, scale=scale))
        assert uses_of(part) == {"frozen": 3}


class TestObstacles:
    def test_torch_compile_is_named(self) -> None:
        module = block(1)
        module.compile()
        assert "torch.compile was applied" in obstacle(module)
        with pytest.raises(CannotFreezeError, match=r"torch\.compile was applied"):
            onediff_compile(module, backend="inductor")
        assert "torch.compile was applied" in obstacle(torch.compile(block(1)))  # type: ignore[arg-type]

    def test_a_plain_a_hooked_and_a_frozen_module_have_none(self) -> None:
        module = block(1)
        assert obstacle(module) == ""
        add_hook_to_module(module, TestHooks.Doubler())
        assert obstacle(module) == ""
        assert obstacle(onediff_compile(module, backend="inductor")) == ""

    def test_a_forward_patched_later_is_an_error(self, block_folder: Path) -> None:
        part = frozen_block(block_folder, block(1))
        part.forward = lambda x, scale: x
        with pytest.raises(ChangedPartError, match="forward was replaced on the instance"):
            part(X, scale=2.0)
        del part.forward
        assert_follows(part, block(1))


def test_a_copy_and_a_pickle_are_eager(block_folder: Path) -> None:
    part = frozen_block(block_folder, block(1))
    for again in (copy.deepcopy(part), pickle.loads(pickle.dumps(part))):
        assert type(again) is Block
        assert not isinstance(again, FrozenPart)
        assert_follows(part, again)


def test_a_copy_and_a_pickle_of_a_hooked_part_are_eager(block_folder: Path) -> None:
    part = frozen_block(block_folder, block(1))
    add_hook_to_module(part, ModelHook())
    part(X, scale=2.0)
    for again in (copy.deepcopy(part), pickle.loads(pickle.dumps(part))):
        assert type(again) is Block
        torch.testing.assert_close(again(X, scale=2.0), block(1)(X, scale=2.0))
    assert uses_of(part) == {"frozen": 1}


class TestFiles:
    def test_an_artifact_with_one_byte_changed_is_not_loaded(self, block_folder: Path, tmp_path: Path) -> None:
        folder = shutil.copytree(block_folder, tmp_path / "copy")
        artifact = max((folder / "artifacts").iterdir(), key=lambda path: path.stat().st_size)
        data = bytearray(artifact.read_bytes())
        data[len(data) // 2] ^= 1
        artifact.write_bytes(bytes(data))
        with pytest.raises(CorruptEntryError, match="is damaged"):
            frozen_block(folder, block(1))

    def test_a_missing_artifact_is_named(self, block_folder: Path, tmp_path: Path) -> None:
        folder = shutil.copytree(block_folder, tmp_path / "copy")
        for artifact in (folder / "artifacts").iterdir():
            artifact.unlink()
        with pytest.raises(CorruptEntryError, match="missing"):
            frozen_block(folder, block(1))

    @pytest.mark.parametrize(
        "data",
        [b"", b"{", b"[]", b'{"pipevault_part": 4}', b'{"pipevault_part": 4, "graphs": [{}]}'],
    )
    def test_a_broken_document_is_an_error(self, tmp_path: Path, data: bytes) -> None:
        (tmp_path / "block").write_bytes(data)
        with pytest.raises(CorruptEntryError, match="block"):
            frozen_block(tmp_path, block(1))

    @pytest.mark.parametrize("version", [2, 99])
    def test_a_document_of_another_version_is_an_error(self, tmp_path: Path, version: int) -> None:
        (tmp_path / "block").write_text(f'{{"pipevault_part": {version}, "graphs": []}}')
        with pytest.raises(CorruptEntryError, match=rf"of version {version} .*, not 4"):
            frozen_block(tmp_path, block(1))

    def test_what_is_saved_again_is_the_same(self, block_folder: Path, tmp_path: Path) -> None:
        frozen_block(block_folder, block(1)).save_graph(tmp_path / "block")
        assert (tmp_path / "block").read_bytes() == (block_folder / "block").read_bytes()
        (document,) = read_part(tmp_path / "block")[0]
        assert str(document.signature) == "float32[2,16], scale=float"
        assert_follows(frozen_block(tmp_path, block(2)), block(2))

    def test_saving_without_graphs_is_an_error(self, tmp_path: Path) -> None:
        part = onediff_compile(block(1), backend="inductor")
        with pytest.raises(NothingFrozenError, match="nothing to save"):
            part.save_graph(tmp_path / "block")


class TestRefusals:
    def test_training_mode(self) -> None:
        part = onediff_compile(block(1).train(), backend="inductor")
        with pytest.raises(TrainingModeError, match="training mode"), torch.no_grad():
            part(X)

    @pytest.mark.parametrize(
        "name", ["aot_inductor.use_runtime_constant_folding", "freezing", "aot_inductor.package_constants_in_so"]
    )
    def test_overrides_that_fold_weights(self, name: str) -> None:
        with pytest.raises(SettingsError, match=f"cannot override {name}"):
            BuildOptions(config={name: True})


def test_what_training_mode_does_not_change_is_let_through() -> None:
    from peft import LoraConfig, get_peft_model

    assert not _trains(nn.Linear(2, 2).train())
    assert not _trains(nn.Dropout(0.0).train())
    assert _trains(nn.Dropout(0.1).train())
    assert _trains(nn.BatchNorm2d(2).train())
    assert _trains(block(1).train())
    assert not _trains(nn.Dropout(0.1).eval())
    adapted = get_peft_model(nn.Sequential(nn.Linear(2, 2)).eval(), LoraConfig(target_modules=["0"])).eval()
    layer = adapted.base_model.model[0].train()
    assert layer.training
    assert not _trains(layer)
