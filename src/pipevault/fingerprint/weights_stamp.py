"""Noticing cheaply that weights are other tensors, or hold other values, than when they were looked at last."""

from __future__ import annotations

from collections.abc import Iterator
from ctypes import c_uint64
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    import torch

Stamp: TypeAlias = "tuple[Any, ...]"

_PROBE_SIZE_BYTES = 8


def weights_stamp(module: torch.nn.Module) -> Stamp:
    """Equal as long as no weight of ``module`` was replaced or written to; a few microseconds for each tensor.

    Beside address and version counter it holds the first and the middle bytes of each tensor on the host, because what
    is written through ``.data``, as peft does when it merges a LoRA, moves neither. On other devices the first element
    is read, all of them in one transfer.
    """
    seen: list[Any] = []
    elsewhere: list[torch.Tensor] = []
    for tensor in _weights(module):
        if hasattr(tensor, "__tensor_flatten__") or tensor.is_sparse or tensor.is_meta:
            seen.append(id(tensor))
            continue
        address = tensor.data_ptr()
        seen += (address, -1 if tensor.is_inference() else tensor._version)
        if not tensor.is_cpu:
            elsewhere.append(tensor)
        elif (size_bytes := tensor.nbytes) >= _PROBE_SIZE_BYTES and tensor.is_contiguous():
            middle = address + (size_bytes // 2 & -_PROBE_SIZE_BYTES)
            middle = min(middle, address + size_bytes - _PROBE_SIZE_BYTES)
            seen += (c_uint64.from_address(address).value, c_uint64.from_address(middle).value)
    return (*seen, *_first_elements(elsewhere))


def _weights(module: torch.nn.Module) -> Iterator[torch.Tensor]:
    stack = [module]
    while stack:
        owner = stack.pop()
        for tensors in (owner._parameters, owner._buffers):
            yield from (tensor for tensor in tensors.values() if tensor is not None)
        stack += (child for child in owner._modules.values() if child is not None)


def _first_elements(tensors: list[torch.Tensor]) -> list[float]:
    import torch

    firsts = [tensor.detach().reshape(-1)[:1].double() for tensor in tensors if tensor.numel()]
    return torch.cat([first.to(firsts[0].device) for first in firsts]).tolist() if firsts else []
