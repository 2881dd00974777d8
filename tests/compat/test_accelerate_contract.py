from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from accelerate import cpu_offload, dispatch_model
from accelerate.hooks import (
    AlignDevicesHook,
    CpuOffload,
    LayerwiseCastingHook,
    ModelHook,
    SequentialHook,
    UserCpuOffloadHook,
    add_hook_to_module,
    remove_hook_from_module,
)
from torch import nn

from pipevault.compat import accelerate


class Scaling(ModelHook):
    """A program's own hook, which computes."""


def hooked(hook: Any, **options: Any) -> nn.Module:
    return add_hook_to_module(nn.Linear(2, 2), hook, **options)


def test_a_hooked_module_is_recognised_and_its_forward_is_found() -> None:
    module = hooked(AlignDevicesHook(execution_device="cpu"))
    values = vars(module)
    assert accelerate.is_hooked(values)
    assert accelerate.is_hooked_forward(values["forward"]), "add_hook_to_module replaces forward in another way"
    assert accelerate.forward_of(values).__func__ is nn.Linear.forward
    remove_hook_from_module(module)
    assert not accelerate.is_hooked(vars(module))
    assert not {accelerate.HOOK_ATTRIBUTE, accelerate.FORWARD_ATTRIBUTE} & set(vars(module))


def test_a_forward_that_a_program_put_there_is_found() -> None:
    def forward(x: Any) -> Any:
        return x

    before = nn.Linear(2, 2)
    before.forward = forward  # type: ignore[assignment, method-assign]
    add_hook_to_module(before, AlignDevicesHook(execution_device="cpu"))
    after = hooked(AlignDevicesHook(execution_device="cpu"))
    after.forward = forward
    assert [accelerate.forward_of(vars(module)) for module in (before, after)] == [forward, forward]


def test_hooks_that_place_and_move_compute_nothing() -> None:
    placing = [AlignDevicesHook(), CpuOffload(), ModelHook()]
    for hook in (*placing, SequentialHook(*placing)):
        assert accelerate.computing_hooks(hook) == []


def test_casting_hooks_and_hooks_of_the_program_may_compute() -> None:
    casting, scaling = LayerwiseCastingHook(torch.float16, torch.float32, False), Scaling()
    assert accelerate.computing_hooks(SequentialHook(CpuOffload(), casting, scaling)) == [casting, scaling]


def test_offloading_leaves_nothing_else_on_the_modules() -> None:
    names = {accelerate.HOOK_ATTRIBUTE, accelerate.FORWARD_ATTRIBUTE, "forward"}
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    before = [set(vars(module)) for module in model.modules()]
    cpu_offload(model, execution_device=torch.device("cpu"))
    for module, known in zip(model.modules(), before, strict=True):
        assert set(vars(module)) - known <= names
    assert UserCpuOffloadHook.__module__ == AlignDevicesHook.__module__


def test_the_methods_that_dispatching_replaces_are_known(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    before = set(vars(model))
    dispatch_model(model, {"0": "cpu", "1": "disk"}, main_device="cpu", offload_dir=str(tmp_path))
    added = set(vars(model)) - before - {accelerate.HOOK_ATTRIBUTE, accelerate.FORWARD_ATTRIBUTE, "forward"}
    assert "to" in added
    assert added <= accelerate.MOVING_METHODS | {"hf_device_map"}
