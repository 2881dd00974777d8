"""Noise that depends on the seed alone: drawn in float32 on the host, then cast and moved.

torch's numbers in float16 and bfloat16 are not those in float32 (torch 2.13 draws the last 16 another way where their
count is not a multiple of 16), and those of a GPU are others, which depend on its number of multiprocessors. float64
and complex128 are drawn as they are. The last bit of normal noise still depends on the CPU's instruction set, because
torch computes its logarithms with vectors where it can.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from pipevault.determinism.streams import check_device, generators
from pipevault.errors import BadCallError

_HOST = torch.device("cpu")
_KEPT_DTYPES = frozenset({torch.float32, torch.float64, torch.complex64, torch.complex128})


def noise(
    shape: Sequence[int],
    seed: int,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    first: int = 0,
) -> torch.Tensor:
    """Return standard normal noise of ``shape`` (samples first), each sample from its own stream.

    ``noise((8, 4, 64, 64), 7)[3]`` equals ``noise((1, 4, 64, 64), 7, first=3)[0]`` bit for bit. Raises
    :class:`BadSeedError` and, for a dtype that is neither floating nor complex, :class:`BadCallError`.
    """
    if not (dtype.is_floating_point or dtype.is_complex):
        raise BadCallError(
            f"Normal noise cannot be drawn in {dtype}. Give a floating dtype, for example torch.float16."
        )
    if not shape:
        raise BadCallError("Noise needs a shape whose first number is that of the samples. Pass (1,) for one value.")
    samples, *rest = shape
    drawn = [
        torch.randn((1, *rest), generator=generator, dtype=_host_dtype(dtype), device=_HOST)
        for generator in generators(seed, samples, first=first)
    ]
    whole = torch.cat(drawn) if drawn else torch.empty(tuple(shape), dtype=_host_dtype(dtype))
    return whole.to(device=device, dtype=dtype)


def host_noise(*, global_draws: bool = False) -> AbstractContextManager[TorchFunctionMode]:
    """Have torch draw with CPU generators in float32 on the host inside, then cast and move.

    Covers the functions in :data:`_DRAWS`, but not what torch's own Python functions draw, such as ``torch.nn.init``. A
    GPU's generator draws on that GPU as always; one for another device raises :class:`GeneratorDeviceError`. With
    ``global_draws`` what is drawn without a generator comes from torch's global CPU generator in the same way.

    Holds for the thread that enters it. Every other torch call costs about four microseconds more inside. Keep export
    and compilation outside: they would trace the mode.
    """
    return _HostNoise(global_draws)


class _HostNoise(TorchFunctionMode):
    def __init__(self, global_draws: bool) -> None:
        super().__init__()
        self.global_draws = global_draws

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        draw = _DRAWS.get(func)
        if draw is None:
            return func(*args) if kwargs is None else func(*args, **kwargs)
        return draw(self, func, args, kwargs or {})

    def draws_on_host(self, generator: torch.Generator | None, device: torch.device) -> bool:
        if device.type == "meta":
            return False
        if generator is None:
            return self.global_draws
        check_device(generator, device)
        return generator.device.type == "cpu"

    def create(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Draw a new tensor. Where the call names no dtype or device, a tensor that it is given has them."""
        positional = args[:2] if func is torch.normal else args[:1] if func in _LIKE else ()
        given = [*positional, *map(kwargs.get, ("input", "mean", "std"))]
        models = [value for value in given if isinstance(value, torch.Tensor)]
        out = kwargs.get("out")
        model = next(iter(models), out)
        if model is None:
            dtype = torch.int64 if func in _INTEGER_DRAWS else torch.get_default_dtype()
            device = torch.get_default_device()
        else:
            dtype, device = model.dtype, model.device
        dtype = kwargs.get("dtype") or dtype
        if kwargs.get("device") is not None:
            device = torch.device(kwargs["device"])
        if not self.draws_on_host(kwargs.get("generator"), device) or _is_host_form(dtype, device):
            return func(*args, **kwargs)
        own = {name: value for name, value in kwargs.items() if name not in _PLACEMENT}
        if func is torch.normal and models:  # which takes neither
            args, own = tuple(map(_on_host, args)), {name: _on_host(value) for name, value in own.items()}
        else:
            own |= {"dtype": _host_dtype(dtype), "device": _HOST}
        values = func(*args, **own)
        cast = _cast(values, dtype, 1.0 if func in (torch.rand, torch.rand_like) else None)
        if out is not None:
            return out.resize_(values.shape).copy_(cast)
        placed = cast.to(device)
        if kwargs.get("pin_memory"):
            placed = placed.pin_memory()
        return placed.requires_grad_() if kwargs.get("requires_grad") else placed

    def fill(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Draw ``tensor.normal_()`` and its kin."""
        target = args[0]
        if not self.draws_on_host(kwargs.get("generator"), target.device):
            return func(*args, **kwargs)
        host_target = torch.empty_like(target, dtype=_host_dtype(target.dtype), device=_HOST, requires_grad=False)
        if _is_host_form(target.dtype, target.device) and host_target.stride() == target.stride():
            return func(*args, **kwargs)
        values = func(host_target, *args[1:], **kwargs)
        below = (*args[2:3], kwargs.get("to", 1.0))[0] if func is torch.Tensor.uniform_ else None
        return target.copy_(_cast(values, target.dtype, below))


_PLACEMENT = ("out", "dtype", "device", "layout", "pin_memory", "requires_grad")
_INTEGER_DRAWS = frozenset({torch.randint, torch.randperm})
_LIKE = frozenset({torch.randn_like, torch.rand_like, torch.randint_like})
_FILLING = ("normal_", "uniform_", "exponential_", "log_normal_", "cauchy_")
_Draw = Callable[[_HostNoise, Any, tuple[Any, ...], dict[str, Any]], Any]
_DRAWS: dict[Any, _Draw] = {
    **dict.fromkeys((torch.randn, torch.rand, torch.normal, *_INTEGER_DRAWS, *_LIKE), _HostNoise.create),
    **{getattr(torch.Tensor, name): _HostNoise.fill for name in _FILLING},
}


def _host_dtype(dtype: torch.dtype) -> torch.dtype:
    if dtype in _KEPT_DTYPES or not (dtype.is_floating_point or dtype.is_complex):
        return dtype
    return torch.complex64 if dtype.is_complex else torch.float32


def _is_host_form(dtype: torch.dtype, device: torch.device) -> bool:
    return device.type == "cpu" and _host_dtype(dtype) is dtype


def _on_host(value: Any) -> Any:
    return value.to(device=_HOST, dtype=_host_dtype(value.dtype)) if isinstance(value, torch.Tensor) else value


def _cast(values: torch.Tensor, dtype: torch.dtype, below: float | None) -> torch.Tensor:
    """Return ``values`` in ``dtype``, less than ``below``: a cast rounds the largest uniform numbers up to it."""
    cast = values.to(dtype)
    if below and cast is not values:
        too_large = cast.to(values.dtype) >= below
        bits = cast.view({1: torch.int8, 2: torch.int16}[dtype.itemsize])
        bits[too_large] -= 1 if below > 0 else -1
    return cast
