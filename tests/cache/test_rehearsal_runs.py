"""Eager code that runs while a pipeline is frozen: for the pipeline, once for other values, and no more than that."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import pipevault
from helpers.pipelines import FAST_BUILD
from pipevault.errors import PipevaultError
from pipevault.store.vault import Vault

pytestmark = pytest.mark.compile

RUNS: list[str] = []


class Counted(nn.Module):
    """Notes its runs on numbers; tracing runs it too."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.mix, self.name = nn.Linear(8, 8), name

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not torch.compiler.is_compiling():
            RUNS.append(self.name)
        return x + self.mix(x)


class CountedParts:
    def __init__(self) -> None:
        torch.manual_seed(0)
        self.unet, self.vae = Counted("unet").eval(), Counted("vae").eval()

    def __call__(self, prompt: str = "", generator: torch.Generator | None = None) -> torch.Tensor:
        with torch.no_grad():
            return self.vae(self.unet(torch.randn(2, 8, generator=generator)))


def test_eager_code_runs_for_the_pipeline_and_for_other_values_and_not_again(tmp_path: Path) -> None:
    RUNS.clear()
    pipe = pipevault.PipelineCache(tmp_path, build_config=FAST_BUILD, jobs=1).load(CountedParts(), batch_size=1)
    assert pipevault.outcome(pipe).status == "miss"
    assert RUNS[:2] == ["unet", "vae"]
    assert sorted(RUNS[2:]) == ["unet", "vae"]


class Swapping:
    """Does something with its denoiser for the length of a call."""

    around: Callable[[Any], Callable[[], None]]

    def __init__(self, around: Callable[[Any], Callable[[], None]]) -> None:
        torch.manual_seed(0)
        self.unet: Any = Scaled().eval()
        self.__dict__["around"] = around

    def __call__(self, prompt: str = "", generator: torch.Generator | None = None) -> torch.Tensor:
        with torch.no_grad():
            back = self.around(self.unet)
            try:
                return self.unet(torch.randn(2, 8, generator=generator))
            finally:
                back()


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix, self.scale = nn.Linear(8, 8), 1.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.mix(x) * self.scale


def weights_swapped(unet: Any) -> Callable[[], None]:
    """As a merged adapter does; no version counter shows it."""
    own = unet.mix.weight.data
    unet.mix.weight.data = own * 3
    return lambda: setattr(unet.mix.weight, "data", own)


def scale_set(unet: Any) -> Callable[[], None]:
    unet.scale = 3.0
    return lambda: setattr(unet, "scale", 1.0)


def test_a_part_that_has_other_weights_within_a_call_is_frozen_as_a_part_with_bound_weights(tmp_path: Path) -> None:
    pipe = pipevault.PipelineCache(tmp_path, build_config=FAST_BUILD).load(Swapping(weights_swapped), batch_size=1)
    assert pipevault.outcome(pipe).parts["unet"].status == "frozen"
    eager = Swapping(weights_swapped)(generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(pipe(generator=torch.Generator().manual_seed(1)), eager)


def test_an_attribute_that_is_set_within_a_call_is_seen_again_when_the_call_is_frozen(tmp_path: Path) -> None:
    """What the first run returned is not what the part computes later, and freezes nothing wrong."""
    pipe = Swapping(scale_set)
    with pytest.raises(PipevaultError):
        pipevault.PipelineCache(tmp_path, build_config=FAST_BUILD).load(pipe, batch_size=1)
    eager = Swapping(scale_set)(generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(pipe(generator=torch.Generator().manual_seed(1)), eager)


class Picky(nn.Module):
    """Refuses all values but the zeros that its pipeline gives it."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not torch.compiler.is_compiling() and x.abs().sum() > 0:
            raise ValueError("not zeros")
        return self.mix(x) + 1


class PickyParts:
    def __init__(self) -> None:
        torch.manual_seed(0)
        self.unet = Picky().eval()

    def __call__(self, prompt: str = "", generator: torch.Generator | None = None) -> torch.Tensor:
        with torch.no_grad():
            return self.unet(torch.zeros(2, 8)) + torch.randn(2, 8, generator=generator)


@pytest.mark.parametrize("pipeline", [CountedParts, PickyParts])
def test_eager_code_is_timed_by_a_run_that_is_not_the_first(tmp_path: Path, pipeline: Callable[[], Any]) -> None:
    pipe = pipevault.PipelineCache(tmp_path, build_config=FAST_BUILD).load(pipeline(), batch_size=1)
    assert pipevault.outcome(pipe).parts["unet"].status == "frozen"
    times = [entry.info for entry in Vault.open(tmp_path).manifests() if entry.key.kind == "graph"]
    assert times
    assert all(0 < entry["eager_s"] < 60 for entry in times)
