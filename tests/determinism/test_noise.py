"""Noise depends on the seed alone, not on the dtype or the device."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pipevault.determinism.noise import host_noise, noise
from pipevault.determinism.seeds import isolated_rng
from pipevault.determinism.streams import generators
from pipevault.errors import BadCallError, BadSeedError, GeneratorDeviceError

SHAPE = (3, 4, 9, 9)
"""The number of values is no multiple of 16, where torch draws the last ones another way in float16."""
LOW = (torch.float16, torch.bfloat16, torch.float8_e4m3fn)


def generator(seed: int = 1) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_the_values_of_noise_are_fixed() -> None:
    # The last bit of randn depends on the CPU's instruction set, so this is no digest.
    found = noise((2, 4, 8, 8), 7).flatten()[:3]
    assert torch.allclose(found, torch.tensor([1.0713143, 0.5690408, -0.9511744]), rtol=1e-6, atol=0)


def test_a_sample_of_noise_alone_is_that_of_the_batch() -> None:
    batch = noise((8, 4, 8, 8), 7)
    assert torch.equal(noise((1, 4, 8, 8), 7, first=3)[0], batch[3])
    assert torch.equal(noise((2, 4, 8, 8), 7, first=5), batch[5:7])
    assert noise((0, 4), 7).shape == (0, 4)


@pytest.mark.parametrize("dtype", LOW)
def test_noise_is_the_same_in_every_dtype(dtype: torch.dtype) -> None:
    assert torch.equal(noise(SHAPE, 7, dtype=dtype).float(), noise(SHAPE, 7).to(dtype).float())


def test_noise_in_float64_has_all_its_digits() -> None:
    values = noise(SHAPE, 7, dtype=torch.float64)
    assert not torch.equal(values, values.float().double())


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool])
def test_there_is_no_normal_noise_in_integers(dtype: torch.dtype) -> None:
    with pytest.raises(BadCallError, match="Give a floating dtype"):
        noise(SHAPE, 7, dtype=dtype)


def test_noise_needs_a_shape_and_a_seed() -> None:
    with pytest.raises(BadCallError, match="a shape"):
        noise((), 7)
    with pytest.raises(BadSeedError):
        noise(SHAPE, None)  # type: ignore[arg-type]


def test_torch_itself_draws_other_numbers_in_float16() -> None:
    drawn = torch.randn(SHAPE, generator=generator(), dtype=torch.float16)
    assert not torch.equal(drawn, torch.randn(SHAPE, generator=generator()).half())


Draw = Callable[[torch.dtype], torch.Tensor]
DRAWS: dict[str, Draw] = {
    "randn": lambda dtype: torch.randn(SHAPE, generator=generator(), dtype=dtype),
    "randn sizes": lambda dtype: torch.randn(*SHAPE, generator=generator(), dtype=dtype, device="cpu"),
    "rand": lambda dtype: torch.rand(SHAPE, generator=generator(), dtype=dtype),
    "normal": lambda dtype: torch.normal(1.0, 2.0, SHAPE, generator=generator(), dtype=dtype),
    "normal mean": lambda dtype: torch.normal(torch.ones(SHAPE, dtype=dtype), 2.0, generator=generator()),
    "normal std": lambda dtype: torch.normal(1.0, torch.ones(SHAPE, dtype=dtype), generator=generator()),
    "normal both": lambda dtype: torch.normal(
        mean=torch.ones(SHAPE, dtype=dtype), std=torch.ones(SHAPE, dtype=dtype), generator=generator()
    ),
    "randn_like": lambda dtype: torch.randn_like(torch.empty(SHAPE, dtype=dtype), generator=generator()),
    "randn_like dtype": lambda dtype: torch.randn_like(input=torch.empty(SHAPE), dtype=dtype, generator=generator()),
    "randn_like channels last": lambda dtype: torch.randn_like(
        torch.empty(SHAPE, dtype=dtype).to(memory_format=torch.channels_last), generator=generator()
    ),
    "rand_like": lambda dtype: torch.rand_like(torch.empty(SHAPE, dtype=dtype), generator=generator()),
    "normal_": lambda dtype: torch.empty(SHAPE, dtype=dtype).normal_(1.0, 2.0, generator=generator()),
    "normal_ of a slice": lambda dtype: torch.empty(3, 9, 9, 9, dtype=dtype)[:, :4].normal_(generator=generator()),
    "uniform_": lambda dtype: torch.empty(SHAPE, dtype=dtype).uniform_(-1, 1, generator=generator()),
    "exponential_": lambda dtype: torch.empty(SHAPE, dtype=dtype).exponential_(generator=generator()),
    "out": lambda dtype: torch.randn(SHAPE, generator=generator(), out=torch.empty(0, dtype=dtype)),
}


@pytest.mark.parametrize("name", DRAWS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_way_to_draw_gives_the_float32_numbers(name: str, dtype: torch.dtype) -> None:
    draw = DRAWS[name]
    with host_noise():
        low, full = draw(dtype), draw(torch.float32)
    assert low.dtype == dtype
    assert low.shape == full.shape
    assert low.stride() == full.stride()
    different = low != full.to(dtype)
    if name in ("rand", "rand_like", "uniform_"):
        assert (full.to(dtype)[different] == 1).all()
        assert low.max() < 1
    else:
        assert not different.any()


@pytest.mark.parametrize("name", sorted(set(DRAWS) - {"normal_ of a slice"}))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_is_in_host_form_is_drawn_as_torch_draws_it(name: str, dtype: torch.dtype) -> None:
    expected = DRAWS[name](dtype)
    with host_noise():
        assert torch.equal(DRAWS[name](dtype), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("lower", "upper"), [(0.0, 1.0), (2.0, 3.0), (-3.0, -2.0), (-1.0, 1.0)])
def test_uniform_numbers_stay_below_their_bound(dtype: torch.dtype, lower: float, upper: float) -> None:
    with host_noise():
        low = torch.empty(20_000, dtype=dtype).uniform_(lower, upper, generator=generator())
        named = torch.empty(20_000, dtype=dtype).uniform_(generator=generator(), to=upper, **{"from": lower})
    full = torch.empty(20_000).uniform_(lower, upper, generator=generator())
    at_the_bound = full.to(dtype) == upper
    assert at_the_bound.any()
    assert torch.equal(low == full.to(dtype), ~at_the_bound)
    assert low.max() < upper
    assert low.min() >= lower
    assert torch.equal(low, named)


def test_integers_are_drawn_as_torch_draws_them() -> None:
    draws: list[Callable[[], torch.Tensor]] = [
        lambda: torch.randint(9, SHAPE, generator=generator()),
        lambda: torch.randint(2, 9, SHAPE, generator=generator(), dtype=torch.int32),
        lambda: torch.randperm(9, generator=generator()),
        lambda: torch.randint_like(torch.zeros(SHAPE), 2, 9, generator=generator()),
    ]
    for draw in draws:
        expected = draw()
        with host_noise():
            found = draw()
        assert torch.equal(found, expected)
        assert found.dtype == expected.dtype


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
def test_complex_half_is_drawn_in_complex64() -> None:
    with host_noise():
        low = torch.randn(8, generator=generator(), dtype=torch.complex32)
    full = torch.randn(8, generator=generator(), dtype=torch.complex64)
    assert torch.equal(torch.view_as_real(low), torch.view_as_real(full).half())


def test_options_of_a_draw_are_kept() -> None:
    with host_noise():
        drawn = torch.randn(4, generator=generator(), dtype=torch.float16, requires_grad=True, layout=torch.strided)
        assert drawn.requires_grad
        assert drawn.is_leaf
        torch.set_default_dtype(torch.bfloat16)
        try:
            by_default = torch.randn(4, generator=generator())
        finally:
            torch.set_default_dtype(torch.float32)
    assert by_default.dtype == torch.bfloat16
    assert torch.equal(by_default, torch.randn(4, generator=generator()).bfloat16())


def test_a_fill_stays_in_its_tensor() -> None:
    target = torch.zeros(SHAPE, dtype=torch.float16)
    with host_noise():
        assert target.normal_(generator=generator()) is target
    assert target.abs().sum() > 0


def test_what_is_given_as_out_is_filled_and_returned() -> None:
    out = torch.empty(0, dtype=torch.float16)
    with host_noise():
        assert torch.randn(SHAPE, generator=generator(), out=out) is out
    assert torch.equal(out, torch.randn(SHAPE, generator=generator()).half())


def test_meta_tensors_hold_no_noise() -> None:
    with host_noise(global_draws=True):
        assert torch.randn(SHAPE, device="meta").is_meta
        assert torch.empty(SHAPE, device="meta").normal_().is_meta


def test_the_mode_ends_with_the_block_and_with_an_exception() -> None:
    plain = DRAWS["randn"](torch.float16)
    with pytest.raises(ValueError, match="stop"), host_noise():
        raise ValueError("stop")
    assert torch.equal(DRAWS["randn"](torch.float16), plain)


def test_other_threads_draw_as_always() -> None:
    plain = DRAWS["randn"](torch.float16)
    found: list[torch.Tensor] = []
    with host_noise():
        thread = threading.Thread(target=lambda: found.append(DRAWS["randn"](torch.float16)))
        thread.start()
        thread.join()
    assert torch.equal(found[0], plain)


def test_a_global_generator_is_left_alone_unless_asked_for() -> None:
    with isolated_rng(7):
        plain = torch.randn(SHAPE, dtype=torch.float16)
    with isolated_rng(7):
        full = torch.randn(SHAPE)
    with isolated_rng(7), host_noise():
        assert torch.equal(torch.randn(SHAPE, dtype=torch.float16), plain)
    with isolated_rng(7), host_noise(global_draws=True):
        assert torch.equal(torch.randn(SHAPE, dtype=torch.float16), full.half())
        assert torch.equal(torch.empty(4, dtype=torch.float16).uniform_() >= 0, torch.ones(4, dtype=torch.bool))


def test_randn_tensor_of_diffusers_is_covered() -> None:
    randn_tensor = pytest.importorskip("diffusers.utils.torch_utils").randn_tensor
    device = torch.device("cpu")
    full = randn_tensor(SHAPE, generator=generator(), device=device, dtype=torch.float32)
    full_list = randn_tensor(SHAPE, generator=generators(7, 3), device=device, dtype=torch.float32)
    assert torch.equal(full_list, noise(SHAPE, 7))
    plain = randn_tensor(SHAPE, generator=generators(7, 3), device=device, dtype=torch.float16)
    assert not torch.equal(plain, full_list.half())
    for dtype in (torch.float16, torch.bfloat16):
        with host_noise():
            one = randn_tensor(SHAPE, generator=generator(), device=device, dtype=dtype)
            several = randn_tensor(SHAPE, generator=generators(7, 3), device=device, dtype=dtype)
            single = randn_tensor((1, *SHAPE[1:]), generator=generators(7, 1), device=device, dtype=dtype)
        assert torch.equal(one, full.to(dtype))
        assert torch.equal(several, full_list.to(dtype))
        assert torch.equal(several, noise(SHAPE, 7, dtype=dtype))
        assert torch.equal(single[0], several[0])


def test_the_posterior_of_a_vae_and_a_scheduler_step_are_covered() -> None:
    autoencoder = pytest.importorskip("diffusers.models.autoencoders.vae")
    moments = torch.linspace(-1, 1, 2 * 8 * 16).reshape(1, 16, 4, 4)

    def sample(dtype: torch.dtype) -> torch.Tensor:
        posterior = autoencoder.DiagonalGaussianDistribution(moments.to(dtype) * 0)
        with host_noise():
            drawn: torch.Tensor = posterior.sample(generator=generator())
        return drawn

    assert torch.equal(sample(torch.float16), sample(torch.float32).half())

    from diffusers import DDPMScheduler

    def step(dtype: torch.dtype) -> torch.Tensor:
        zero = torch.zeros(1, 4, 8, 8, dtype=dtype)
        with host_noise():
            drawn: torch.Tensor = DDPMScheduler().step(zero, 500, zero, generator=generator()).prev_sample
        return drawn

    torch.testing.assert_close(step(torch.float16).float(), step(torch.float32), rtol=2e-3, atol=2e-3)


class Mode:
    """Calls what ``host_noise`` installs with a stand-in for a GPU's generator, which a CPU build cannot make."""

    def __init__(self) -> None:
        from pipevault.determinism.noise import _HostNoise

        self.mode = _HostNoise(False)

    def call(self, func: Any, *args: Any, **kwargs: Any) -> Any:
        return self.mode.__torch_function__(func, (), args, kwargs)


@pytest.mark.parametrize(
    "call",
    [
        lambda mode, gpu: mode.call(torch.randn, 3, generator=gpu, dtype=torch.float16),
        lambda mode, gpu: mode.call(torch.randn, 3, generator=gpu, device="cpu"),
        lambda mode, gpu: mode.call(torch.randn, 3, generator=gpu, out=torch.empty(3)),
        lambda mode, gpu: mode.call(torch.normal, torch.ones(3), 1.0, generator=gpu),
        lambda mode, gpu: mode.call(torch.randn_like, torch.ones(3), generator=gpu),
        lambda mode, gpu: mode.call(torch.Tensor.normal_, torch.ones(3), generator=gpu),
    ],
)
def test_a_gpu_generator_cannot_draw_for_the_cpu(call: Callable[[Mode, Any], Any]) -> None:
    with pytest.raises(GeneratorDeviceError, match="A generator on cuda:0 cannot draw noise for cpu"):
        call(Mode(), SimpleNamespace(device=torch.device("cuda:0")))


def test_the_index_of_a_gpu_is_a_device() -> None:
    """``device=0`` is the first GPU, and not the default device because 0 counts as nothing."""
    no_gpu = pytest.raises((RuntimeError, AssertionError), match=r"CUDA|accelerator")
    with nullcontext() if torch.cuda.is_available() else no_gpu, host_noise():
        drawn = torch.randn(4, dtype=torch.float16, device=0, generator=generator())
        assert drawn.device == torch.device("cuda:0")


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_gpu_gets_the_noise_of_the_host(dtype: torch.dtype) -> None:
    from diffusers.utils.torch_utils import randn_tensor

    expected = noise(SHAPE, 7, dtype=dtype)
    assert torch.equal(noise(SHAPE, 7, dtype=dtype, device="cuda").cpu(), expected)
    with host_noise():
        drawn = randn_tensor(SHAPE, generator=generators(7, 3), device=torch.device("cuda"), dtype=dtype)
        direct = torch.randn(SHAPE, generator=generator(), device="cuda", dtype=dtype)
        like = torch.randn_like(direct, generator=generator())
        filled = torch.empty_like(direct).normal_(generator=generator())
    assert torch.equal(drawn.cpu(), expected)
    assert direct.device.type == like.device.type == filled.device.type == "cuda"
    assert torch.equal(direct.cpu(), torch.randn(SHAPE, generator=generator()).to(dtype))
    assert torch.equal(direct, like)
    assert torch.equal(direct, filled)


@needs_gpu
def test_a_gpu_generator_draws_on_its_gpu() -> None:
    with host_noise():
        drawn = torch.randn(SHAPE, generator=torch.Generator("cuda").manual_seed(1), device="cuda")
    assert torch.equal(drawn, torch.randn(SHAPE, generator=torch.Generator("cuda").manual_seed(1), device="cuda"))
    with pytest.raises(GeneratorDeviceError), host_noise():
        torch.randn(SHAPE, generator=torch.Generator("cuda"), device="cpu")
