"""Noticing cheaply that weights are other tensors, or hold other values, than when they were looked at last."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from ctypes import c_uint64
from typing import Any, TypeAlias

import torch

Stamp: TypeAlias = "tuple[Any, ...]"

_PROBE_SIZE_BYTES = 8


def weights_stamp(module: torch.nn.Module) -> Stamp:
    """Return a value that changes when a weight of ``module`` is replaced or written to, in a few µs for each tensor.

    Next to address and version counter it holds the first and the middle bytes of each tensor on the host, because what
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
        else:
            seen += [c_uint64.from_address(probed).value for probed in _probed(tensor)]
    firsts = [tensor.detach().reshape(-1)[:1].double() for tensor in elsewhere if tensor.numel()]
    if firsts:
        seen += torch.cat([first.to(firsts[0].device) for first in firsts]).tolist()
    return tuple(seen)


class WeightsWatch:
    """A watch over the weights of a module: whether they moved since it was made. It sees what :func:`weights_stamp`
    sees, in a tenth of the time. ``is_plain``: all of them are dense tensors in the host's memory.
    """

    def __init__(self, module: torch.nn.Module) -> None:
        self._module = module
        tables: list[dict[str, Any]] = [
            table for owner in module.modules() for table in (owner._parameters, owner._buffers, owner._modules)
        ]
        self._kept_alive = [value for table in tables for value in table.values()]
        weights = list(_weights(module))
        self.is_plain = all(
            tensor.is_cpu and tensor.layout is torch.strided and not hasattr(tensor, "__tensor_flatten__")
            for tensor in weights
        )
        looks: list[Callable[[], Any]] = [lambda: weights_stamp(module)]
        if self.is_plain:
            counted = [tensor for tensor in weights if not tensor.is_inference()]
            probes = [c_uint64.from_address(address) for tensor in weights for address in _probed(tensor)]
            looks = [
                lambda: [id(value) for table in tables for value in table.values()],
                lambda: [tensor.data_ptr() for tensor in weights],
                lambda: [tensor._version for tensor in counted],
                lambda: [probe.value for probe in probes],
            ]
        self._seen = [(look, look()) for look in looks]

    def watches(self, module: torch.nn.Module) -> bool:
        """Return whether it was made for ``module``, or for one that shares its tables of weights."""
        return module._parameters is self._module._parameters and module._modules is self._module._modules

    def has_moved(self) -> bool:
        # Probes come last: where an address moved, the memory that they point to may be gone.
        return any(look() != seen for look, seen in self._seen)


def _probed(tensor: torch.Tensor) -> tuple[int, ...]:
    """The addresses of the first and the middle bytes of a tensor on the host."""
    size_bytes = tensor.nbytes
    if size_bytes < _PROBE_SIZE_BYTES or not tensor.is_contiguous():
        return ()
    address = tensor.data_ptr()
    middle = address + (size_bytes // 2 & -_PROBE_SIZE_BYTES)
    return address, min(middle, address + size_bytes - _PROBE_SIZE_BYTES)


def _weights(module: torch.nn.Module) -> Iterator[torch.Tensor]:
    stack = [module]
    while stack:
        owner = stack.pop()
        for tensors in (owner._parameters, owner._buffers):
            yield from (tensor for tensor in tensors.values() if tensor is not None)
        stack += (child for child in owner._modules.values() if child is not None)
