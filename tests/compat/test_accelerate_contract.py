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


PUT_ON_MODULES = {"_hf_hook", "_old_forward", "forward"}


def forward_of(module: nn.Module) -> Any:
    return accelerate.without_placement(vars(module))[0].get("forward")


def computing_hooks(hook: Any) -> list[Any]:
    return accelerate.without_placement(vars(hooked(hook)))[1]


def test_a_hooked_module_is_recognised_and_its_forward_is_found() -> None:
    module = hooked(AlignDevicesHook(execution_device="cpu"))
    assert vars(module).keys() >= PUT_ON_MODULES, "add_hook_to_module leaves something else"
    assert forward_of(module).__func__ is nn.Linear.forward, "add_hook_to_module replaces forward in another way"
    remove_hook_from_module(module)
    assert accelerate.without_placement(vars(module)) == (vars(module), [])
    assert not {"_hf_hook", "_old_forward"} & set(vars(module))


def test_a_forward_that_a_program_put_there_is_found() -> None:
    def forward(x: Any) -> Any:
        return x

    before = nn.Linear(2, 2)
    before.forward = forward  # type: ignore[assignment, method-assign]
    add_hook_to_module(before, AlignDevicesHook(execution_device="cpu"))
    after = hooked(AlignDevicesHook(execution_device="cpu"))
    after.forward = forward
    assert [forward_of(module) for module in (before, after)] == [forward, forward]


def test_hooks_that_place_and_move_compute_nothing() -> None:
    placing = [AlignDevicesHook(), CpuOffload(), ModelHook()]
    for hook in (*placing, SequentialHook(*placing)):
        assert computing_hooks(hook) == []


def test_casting_hooks_and_hooks_of_the_program_may_compute() -> None:
    casting, scaling = LayerwiseCastingHook(torch.float16, torch.float32, False), Scaling()
    assert computing_hooks(SequentialHook(CpuOffload(), casting, scaling)) == [casting, scaling]


def test_offloading_leaves_nothing_else_on_the_modules() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    before = [set(vars(module)) for module in model.modules()]
    cpu_offload(model, execution_device=torch.device("cpu"))
    for module, known in zip(model.modules(), before, strict=True):
        assert set(vars(module)) - known <= PUT_ON_MODULES
    assert UserCpuOffloadHook.__module__ == AlignDevicesHook.__module__


def test_the_methods_that_dispatching_replaces_are_known(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    before = set(vars(model))
    dispatch_model(model, {"0": "cpu", "1": "disk"}, main_device="cpu", offload_dir=str(tmp_path))
    assert "to" in set(vars(model)) - before
    left = set(accelerate.without_placement(vars(model))[0])
    assert left - before <= {"forward", "hf_device_map"}
