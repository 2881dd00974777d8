"""Every layer of randomness is seeded, and comes back as it was."""

from __future__ import annotations

import base64
import random
import zlib
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from pipevault.determinism import layers, seeds
from pipevault.determinism.layers import capture, describe_state, moved, parse_state, put
from pipevault.determinism.seeds import effective_seed, isolated_rng, seed_everything
from pipevault.errors import BadRecordError, BadSeedError, SettingsError


def draw() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), float(torch.rand(()))


@pytest.mark.parametrize("seed", [0, 7, 2**32, 2**63, 2**64 - 1, np.int64(7), np.uint64(2**64 - 1)])
def test_a_seed_is_used_as_it_is(seed: Any) -> None:
    found = effective_seed(seed)
    assert found == seed
    assert type(found) is int
    with isolated_rng(seed):
        pass


@pytest.mark.parametrize("seed", [None, -1, np.int64(-1)])
def test_no_seed_becomes_a_fresh_one_of_63_bits(seed: Any) -> None:
    found = {effective_seed(seed) for _ in range(50)}
    assert len(found) == 50
    assert all(0 <= value < 2**63 for value in found)
    assert max(found) >= 2**56


@pytest.mark.parametrize(
    "seed", [-2, -(2**63), 2**64, True, False, 1.0, float("nan"), "7", "", b"7", [7], np.bool_(True), torch.tensor(7)]
)
def test_what_is_no_seed_is_an_error(seed: Any) -> None:
    with pytest.raises(BadSeedError, match=r"Pass 0 to 2\*\*64 - 1") as caught:
        effective_seed(seed)
    assert caught.value.seed is seed
    assert isinstance(caught.value, (SettingsError, ValueError))
    before = capture()
    for function in (seed_everything, lambda value: isolated_rng(value).__enter__()):
        with pytest.raises(BadSeedError):
            function(seed)
    assert not moved(before, capture())


def test_seed_everything_reaches_every_layer() -> None:
    with isolated_rng(0):
        assert seed_everything(7) == 7
        first = draw()
        seed_everything(7)
        assert draw() == first
        seed_everything(8)
        assert all(other != value for other, value in zip(draw(), first, strict=True))


def test_the_values_of_a_seed_are_those_of_each_library() -> None:
    with isolated_rng(0):
        seed_everything(2**32 + 7)
        found = draw()
        random.seed(2**32 + 7)
        np.random.seed(7)
        torch.manual_seed(2**32 + 7)
        assert draw() == found


def test_a_fresh_seed_is_returned_and_repeats_the_run() -> None:
    with isolated_rng(0):
        seed = seed_everything(None)
        first = draw()
        seed_everything(seed)
        assert draw() == first
    with isolated_rng(-1) as seed:
        first = draw()
    with isolated_rng(seed):
        assert draw() == first


def test_isolated_rng_gives_every_layer_back() -> None:
    before = capture()
    with isolated_rng(7) as seed:
        assert seed == 7
        inside = draw()
        assert moved(before, capture()) == ("python", "numpy", "torch")
    assert not moved(before, capture())
    with isolated_rng(7):
        assert draw() == inside


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, GeneratorExit])
def test_isolated_rng_gives_every_layer_back_after_an_exception(error: type[BaseException]) -> None:
    before = capture()

    def fail() -> None:
        draw()
        raise error

    with pytest.raises(error), isolated_rng(7):
        fail()
    assert not moved(before, capture())


def test_isolated_rng_can_be_nested() -> None:
    with isolated_rng(1):
        expected = [draw(), draw()]
    with isolated_rng(1):
        found = [draw()]
        with isolated_rng(2):
            draw()
        found.append(draw())
    assert found == expected


@pytest.mark.parametrize(
    ("layer", "owner", "setter"),
    [
        ("python", random, "setstate"),
        ("numpy", np.random, "set_state"),
        ("torch", torch, "set_rng_state"),
    ],
)
def test_the_rest_is_restored_when_one_layer_fails(
    monkeypatch: pytest.MonkeyPatch, layer: str, owner: Any, setter: str
) -> None:
    def refuse(_: Any) -> None:
        raise OSError("no such state")

    before = capture()
    monkeypatch.setattr(owner, setter, refuse)
    with pytest.raises(OSError, match="no such state"), isolated_rng(7):
        draw()
    monkeypatch.undo()
    assert moved(before, capture()) == (layer,)
    put({layer: before[layer]})


def test_another_generator_of_numpy_is_kept() -> None:
    numpy_random: Any = np.random
    kept = numpy_random.get_bit_generator()
    numpy_random.set_bit_generator(np.random.MT19937(3))
    try:
        before = capture()
        with isolated_rng(7):
            draw()
        assert not moved(before, capture())
    finally:
        numpy_random.set_bit_generator(kept)


@pytest.mark.parametrize(
    ("layer", "use"),
    [
        ("python", random.random),
        ("python", lambda: random.gauss(0, 1)),
        ("numpy", np.random.rand),
        ("torch", lambda: torch.rand(1)),
    ],
)
def test_who_draws_from_a_global_generator_is_noticed(layer: str, use: Any) -> None:
    with isolated_rng(0):
        before = capture()
        torch.randn(3, generator=torch.Generator().manual_seed(1))
        np.random.default_rng(1).random()
        assert moved(before, capture()) == ()
        use()
        assert moved(before, capture()) == (layer,)


class FakeGpus:
    """What torch.cuda offers for the state of two GPUs."""

    def __init__(self, *, started: bool) -> None:
        self.started = started
        self.states = [torch.tensor([1], dtype=torch.uint8), torch.tensor([2], dtype=torch.uint8)]
        self.seeds: list[int] = []

    def is_initialized(self) -> bool:
        return self.started

    def get_rng_state_all(self) -> list[torch.Tensor]:
        return [state.clone() for state in self.states]

    def set_rng_state(self, state: torch.Tensor, index: int) -> None:
        self.states[index] = state

    def manual_seed_all(self, seed: int) -> None:
        self.seeds.append(seed)


def use_fake(monkeypatch: pytest.MonkeyPatch, gpus: FakeGpus) -> None:
    for module in (layers, seeds):
        monkeypatch.setattr(module, "gpu_modules", lambda: {"cuda": gpus})


def test_the_state_of_every_gpu_that_has_started_is_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus = FakeGpus(started=True)
    use_fake(monkeypatch, gpus)
    before = capture()
    assert {"cuda:0", "cuda:1"} < set(before)
    with isolated_rng(7):
        gpus.states[1][0] = 9
        assert moved(before, capture())[-1] == "cuda:1"
    assert not moved(before, capture())
    assert gpus.seeds == [7]


def test_a_gpu_that_starts_inside_gets_the_seed_from_before(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus = FakeGpus(started=False)
    use_fake(monkeypatch, gpus)
    with isolated_rng(5):
        before = capture()
        assert "cuda:0" not in before
        with isolated_rng(7):
            gpus.started = True
            assert moved(before, before | {"cuda:0": torch.zeros(1)}) == ()
        assert gpus.seeds == [5, 7, 5]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_a_real_gpu_is_seeded_and_restored() -> None:
    torch.rand(1, device="cuda")
    before = capture()
    with isolated_rng(7):
        first = torch.rand(4, device="cuda")
        assert "cuda:0" in moved(before, capture())
    assert not moved(before, capture())
    with isolated_rng(7):
        assert torch.equal(torch.rand(4, device="cuda"), first)


@pytest.mark.parametrize("layer", ["python", "numpy"])
@pytest.mark.parametrize("key", [b"", b"abc", bytes(4 * 623), bytes(4 * 624 + 1)])
def test_a_recorded_state_of_another_size_is_refused(layer: str, key: bytes) -> None:
    described = describe_state(layer, capture()[layer])
    assert not moved({layer: parse_state(layer, described)}, {layer: capture()[layer]})
    described["key"] = base64.b64encode(zlib.compress(key)).decode("ascii")
    with pytest.raises(BadRecordError, match=f"'seeds.streams.{layer}' of the run record is"):
        parse_state(layer, described)


class Augmented(Dataset[Any]):
    """Draws from every layer in ``__getitem__``, as data augmentation does."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> tuple[int, float, float, float]:
        worker = get_worker_info()
        assert worker is not None
        return worker.id, *draw()


def epochs(seed: int) -> list[list[tuple[int, float, float, float]]]:
    with isolated_rng(0):
        seed_everything(seed)
        loader = DataLoader(Augmented(), num_workers=2, batch_size=None)
        return [[tuple(item) for item in loader] for _ in range(2)]


def test_workers_of_a_data_loader_repeat_and_differ() -> None:
    first, second = epochs(7)
    assert epochs(7) == [first, second]
    draws = [value for epoch in (first, second) for _, *values in epoch for value in values]
    assert len(set(draws)) == len(draws) == 2 * 8 * 3
    assert {worker for worker, *_ in first} == {0, 1}
    assert epochs(8)[0] != first
