"""The stamp of weights moves with every write, and with nothing else."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import nn

from pipevault.fingerprint.weights_stamp import WeightsWatch, weights_stamp


@pytest.fixture
def module() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8)).eval()


def test_inference_moves_nothing(module: nn.Module) -> None:
    before, watch = weights_stamp(module), WeightsWatch(module)
    with torch.no_grad():
        module(torch.randn(2, 8))
    assert weights_stamp(module) == before
    assert not watch.has_moved()


def _replace(module: nn.Module) -> None:
    module[0].weight = nn.Parameter(module[0].weight.detach().clone())


CHANGES: dict[str, Callable[[nn.Module], object]] = {
    "in place": lambda m: m[0].weight.detach().mul_(2),
    "through data": lambda m: m[0].weight.data.mul_(2),
    "as peft merges": lambda m: setattr(m[0].weight, "data", m[0].weight.data.add_(1)),
    "new data": lambda m: setattr(m[0].weight, "data", m[0].weight.data + 1),
    "new parameter": _replace,
    "buffer": lambda m: m[1].running_mean.add_(1),
    "dtype": lambda m: m.half(),
    "another module": lambda m: setattr(m, "0", nn.Linear(8, 8)),
    "one more module": lambda m: m.append(nn.Linear(8, 8)),
    "one more buffer": lambda m: m.register_buffer("extra", torch.zeros(4)),
    "removed": lambda m: setattr(m[0], "bias", None),
}


@pytest.mark.parametrize("change", CHANGES)
def test_every_write_moves_it(module: nn.Module, change: str) -> None:
    before, watch = weights_stamp(module), WeightsWatch(module)
    with torch.no_grad():
        CHANGES[change](module)
    assert weights_stamp(module) != before
    assert watch.has_moved()


def test_a_watch_keeps_its_weights_so_that_no_other_tensor_has_their_place(module: nn.Module) -> None:
    weight = weakref.ref(module[0].weight)
    watch = WeightsWatch(module)
    _replace(module)
    gc.collect()
    assert weight() is not None
    assert watch.has_moved()


def test_weights_without_bytes_to_look_at() -> None:
    with torch.device("meta"):
        meta = nn.Linear(2, 2)
    assert weights_stamp(meta) == weights_stamp(meta)
    assert not WeightsWatch(meta).has_moved()
    with torch.inference_mode():
        made_in_inference_mode = nn.Linear(4, 4)
        before, watch = weights_stamp(made_in_inference_mode), WeightsWatch(made_in_inference_mode)
        made_in_inference_mode.weight.mul_(2)
    assert weights_stamp(made_in_inference_mode) != before
    assert watch.has_moved()
    gaps = nn.Linear(2, 2)
    gaps.weight = nn.Parameter(torch.randn(4, 4)[::2, ::2])
    assert weights_stamp(gaps) == weights_stamp(gaps)
