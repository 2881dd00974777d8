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


class OneCall:
    """Calls ``unet`` three times, or does with it what a test says, and then ``vae``."""

    def __init__(self, unet: nn.Module, draw: Callable[[Any, torch.Tensor], torch.Tensor] | None = None) -> None:
        self.unet: Any = unet.eval()
        torch.manual_seed(0)
        self.vae: Any = Scaled().eval()
        self.__dict__["draw"] = draw

    draw: Callable[[Any, torch.Tensor], torch.Tensor] | None

    def __call__(self, prompt: str = "", generator: torch.Generator | None = None) -> torch.Tensor:
        with torch.no_grad():
            x = torch.randn(2, 8, generator=generator)
            if self.draw is not None:
                return self.vae(self.draw(self.unet, x))
            for _ in range(3):
                x = self.unet(x)
            return self.vae(x)


def drawn(pipe: Any) -> torch.Tensor:
    result: torch.Tensor = pipe(generator=torch.Generator().manual_seed(1))
    return result


class Pending(nn.Module):
    """Adds to its weight at its first call, as some adapters do."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__()
        self.mix = nn.Linear(8, 8)
        self.pending: torch.Tensor | None = torch.randn(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.pending is not None:
            self.mix.weight.data += self.pending
            self.pending = None
        return x + self.mix(x)


def test_a_part_that_changes_at_its_first_call_changes_once(tmp_path: Path) -> None:
    eager = drawn(OneCall(Pending()))
    pipe = pipevault.PipelineCache(tmp_path, build_config=FAST_BUILD).load(OneCall(Pending()), batch_size=1)
    torch.testing.assert_close(drawn(pipe), eager)
    torch.testing.assert_close(drawn(pipevault.unload(pipe)), eager, rtol=0, atol=0)


class Mixing(nn.Module):
    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__()
        self.mix, self.cross = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        return self.mix(x) if context is x else self.mix(x) + self.cross(context)


def test_a_part_that_asks_whether_two_arguments_are_one_is_never_frozen_wrong(tmp_path: Path) -> None:
    """A copy of the arguments loses that; the pipeline's own output shows it."""

    def draw(unet: Any, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = unet(x, x)
        return result

    pipe = pipevault.PipelineCache(tmp_path, build_config=FAST_BUILD).load(OneCall(Mixing(), draw), batch_size=1)
    assert pipevault.outcome(pipe).parts["unet"].status == "eager"
    torch.testing.assert_close(drawn(pipe), drawn(OneCall(Mixing(), draw)))


class Noisy(nn.Module):
    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__()
        self.mix = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.mix(x) + 0.01 * torch.randn(x.shape)


def test_a_hook_of_the_pipeline_sees_each_call_once(tmp_path: Path) -> None:
    def draw(unet: Any, x: torch.Tensor) -> torch.Tensor:
        features: list[torch.Tensor] = []
        hook = unet.mix.register_forward_hook(lambda module, given, output: features.append(output))
        for _ in range(2):
            x = unet(x)
        hook.remove()
        assert len(features) == 2
        return x + features[0]

    pipe = pipevault.PipelineCache(tmp_path, build_config=FAST_BUILD).load(OneCall(Noisy(), draw), batch_size=1)
    assert pipevault.outcome(pipe).parts["unet"].status == "eager"
    assert pipevault.outcome(pipe).parts["vae"].status == "frozen"


class Value(nn.Module):
    """What torch cannot export: a condition on numbers."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__()
        self.mix = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.tanh(self.mix(x)).sum(1)
        return y + 1 if float(y.sum()) > 1e9 else y


def test_a_pipeline_may_take_the_gradient_of_a_part_that_stays_eager(tmp_path: Path) -> None:
    def draw(unet: Any, x: torch.Tensor) -> torch.Tensor:
        with torch.enable_grad():
            x = x.detach().requires_grad_(True)
            (gradient,) = torch.autograd.grad(unet(x).sum(), x)
        return x.detach() + gradient

    guided = OneCall(Value().requires_grad_(False), draw)
    pipe = pipevault.PipelineCache(tmp_path, build_config=FAST_BUILD).load(guided, batch_size=1)
    assert pipevault.outcome(pipe).parts["unet"].status == "eager"
    torch.testing.assert_close(drawn(pipe), drawn(OneCall(Value().requires_grad_(False), draw)))
