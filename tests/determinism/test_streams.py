"""Each sample of a batch has a stream of its own that can be drawn again alone."""

from __future__ import annotations

import hashlib
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pipevault.determinism.streams import check_device, check_generators, generators, sample_seed
from pipevault.errors import BadCallError, BadSeedError, GeneratorCountError, GeneratorDeviceError


def test_the_derivation_of_sample_seeds_is_fixed() -> None:
    assert [sample_seed(0, index) for index in range(3)] == [
        4334430513956379144,
        2440950710608614359,
        8226343694796210948,
    ]
    assert sample_seed(7, 3) == 3411976877185804603
    assert sample_seed(2**64 - 1, 5) == 7199305875608724974


def test_sample_seeds_differ_by_seed_and_by_index() -> None:
    seeds = {sample_seed(seed, index) for seed in (*range(20), 2**32, 2**64 - 1) for index in range(20)}
    assert len(seeds) == 22 * 20
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert len({seed % 2**32 for seed in seeds}) == len(seeds)


def test_the_numbers_of_a_stream_are_fixed() -> None:
    values = torch.cat([torch.rand(16, generator=generator) for generator in generators(7, 4)])
    assert hashlib.sha256(values.numpy().tobytes()).hexdigest() == (
        "99a51f6d9303124a44b43aa56431a3ca89317e9250046a478b72683629d4262c"
    )


def test_sample_three_of_a_batch_can_be_drawn_again_alone() -> None:
    [alone] = generators(7, 1, first=3)
    batch = generators(7, 8)
    assert alone.initial_seed() == batch[3].initial_seed() == sample_seed(7, 3)
    assert torch.equal(torch.randn(99, generator=alone), torch.randn(99, generator=batch[3]))


def test_generators_are_on_the_cpu_and_a_plain_list() -> None:
    made = generators(7, 3)
    assert type(made) is list  # diffusers asks isinstance(generator, list)
    assert [generator.device.type for generator in made] == ["cpu"] * 3
    assert generators(7, 0) == []
    assert len(generators(7)) == 1


@pytest.mark.parametrize("seed", [None, -1])
def test_a_seed_that_nobody_would_learn_is_refused(seed: Any) -> None:
    with pytest.raises(BadSeedError, match=r"Take one from effective_seed\(") as caught:
        generators(seed, 4)
    assert caught.value.seed == seed


@pytest.mark.parametrize("seed", [-2, 1.5, "7", True, 2**64])
def test_what_is_no_seed_is_refused(seed: Any) -> None:
    for n in (0, 2):
        with pytest.raises(BadSeedError):
            generators(seed, n)


@pytest.mark.parametrize("index", [-1, 0.0, True, None, "1"])
def test_what_is_no_index_is_refused(index: Any) -> None:
    with pytest.raises(BadSeedError, match="Count samples from 0"):
        sample_seed(7, index)


@pytest.mark.parametrize("n", [-1, 2.0, True, None])
def test_what_is_no_count_is_refused(n: Any) -> None:
    with pytest.raises(GeneratorCountError, match="Pass the size of the batch"):
        generators(7, n)


@pytest.mark.parametrize(("given", "n"), [(1, 2), (3, 4), (0, 1), (5, 4)])
def test_too_few_or_too_many_generators_are_refused(given: int, n: int) -> None:
    with pytest.raises(GeneratorCountError, match=f"{given} generators were given for {n} samples. Pass one for each"):
        check_generators(generators(7, given), n)
    assert issubclass(GeneratorCountError, BadCallError)


def test_one_for_each_fits() -> None:
    check_generators(generators(7, 4), 4)
    check_generators(tuple(generators(7, 4)), 4)


def on(device: str) -> Any:
    return SimpleNamespace(device=torch.device(device))


@pytest.mark.parametrize(("own", "needed"), [("cuda", "cpu"), ("cuda:0", "cuda:1"), ("xpu", "cuda"), ("mps", "cpu")])
def test_a_generator_on_the_wrong_device_is_refused(own: str, needed: str) -> None:
    with pytest.raises(GeneratorDeviceError, match=f"A generator on {own} cannot draw noise for {needed}. Pass a CPU"):
        check_device(on(own), torch.device(needed))


@pytest.mark.parametrize(
    ("own", "needed"), [("cpu", "cuda"), ("cpu", "cpu"), ("cuda", "cuda:1"), ("cuda:1", "cuda:1"), ("cuda", "meta")]
)
def test_a_generator_that_fits_is_accepted(own: str, needed: str) -> None:
    check_device(on(own), torch.device(needed))
