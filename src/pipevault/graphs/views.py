"""A part as it is traced: without the hooks that move its weights about, and with all of them on one device."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from pipevault.compat.accelerate import offloaded_weight
from pipevault.compat.diffusers import placement_hooks_only
from pipevault.errors import CannotFreezeError

_PLACEMENT = ("forward", "_old_forward", "_hf_hook", "_diffusers_hook")


def tracing_view(module: nn.Module, device: torch.device) -> nn.Module:
    """Return ``module`` without hooks of its own, which run around the graph and not inside it.

    Where hooks of accelerate or diffusers move weights of sub-modules, the whole tree is such a view, with copies of
    the weights on ``device``. Raises :class:`CannotFreezeError` for a hook that does more.
    """
    moved = any(_is_moved(child) for child in module.modules() if child is not module)
    moved = moved or any(p.device.type != device.type for p in module.parameters())
    view = _view(module, device, {}, "") if moved else _twin(module)
    for hooks in ("_forward_hooks", "_forward_pre_hooks"):
        view.__dict__[hooks] = type(module.__dict__[hooks])()
    return view


_LEAST_OUTLINED_BYTES = 1 << 16
"""Smaller tensors keep their values: a constant of a graph may come from one."""


def outline(module: nn.Module) -> nn.Module:
    """Return ``module`` with weights of the same layout and without memory, to be sent to another process."""
    return _outline(module, {}, {})


def _outline(module: nn.Module, known: dict[int, nn.Module], weights: dict[Any, torch.Tensor]) -> nn.Module:
    if id(module) in known:
        return known[id(module)]
    twin: Any = type(module).__new__(type(module))
    twin.__dict__ = dict(module.__dict__)
    known[id(module)] = twin
    for kind in ("_parameters", "_buffers"):
        twin.__dict__[kind] = {
            name: tensor if tensor is None else _outlined(tensor, weights)
            for name, tensor in module.__dict__[kind].items()
        }
    twin.__dict__["_modules"] = {
        name: child if child is None else _outline(child, known, weights) for name, child in module._modules.items()
    }
    result: nn.Module = twin
    return result


def _outlined(tensor: torch.Tensor, weights: dict[Any, torch.Tensor]) -> torch.Tensor:
    """Tensors that share their memory, as tied weights do, become one."""
    if tensor.numel() * tensor.element_size() < _LEAST_OUTLINED_BYTES:
        return tensor
    place = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, type(tensor))
    if place not in weights:
        empty = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
        weights[place] = nn.Parameter(empty, requires_grad=False) if isinstance(tensor, nn.Parameter) else empty
    return weights[place]


def with_empty_weights(module: nn.Module) -> nn.Module:
    """Give an :func:`outline` weights again, of any values; memory that is never touched takes no room. Return it."""
    known: dict[int, torch.Tensor] = {}
    for child in module.modules():
        for tensors in (child._parameters, child._buffers):
            for name, tensor in tensors.items():
                if tensor is not None and tensor.is_meta:
                    tensors[name] = known.setdefault(id(tensor), _filled(tensor))  # type: ignore[assignment]
    return module


def _filled(tensor: torch.Tensor) -> torch.Tensor:
    empty = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
    return nn.Parameter(empty, requires_grad=False) if isinstance(tensor, nn.Parameter) else empty


def _is_moved(module: nn.Module) -> bool:
    own = module.__dict__
    return "_hf_hook" in own or "_diffusers_hook" in own


def _twin(module: nn.Module) -> nn.Module:
    twin: Any = type(module).__new__(type(module))
    twin.__dict__ = {name: value for name, value in module.__dict__.items() if name not in _PLACEMENT}
    view: nn.Module = twin
    return view


def _view(module: nn.Module, device: torch.device, known: dict[int, nn.Module], path: str) -> nn.Module:
    if id(module) in known:
        return known[id(module)]
    hook = module.__dict__.get("_diffusers_hook")
    if path and hook is not None and not placement_hooks_only(hook):
        raise CannotFreezeError(f"a hook of diffusers on {path} changes what it computes")
    view = known[id(module)] = _twin(module)
    for kind in ("_parameters", "_buffers"):
        view.__dict__[kind] = {
            name: tensor if tensor is None else _on_device(module, name, tensor, device)
            for name, tensor in module.__dict__[kind].items()
        }
    view.__dict__["_modules"] = {
        name: child if child is None else _view(child, device, known, f"{path}.{name}" if path else name)
        for name, child in module._modules.items()
    }
    return view


def _on_device(module: nn.Module, name: str, tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    if tensor.device.type == device.type:
        return tensor
    found = offloaded_weight(module, name, tensor, device)
    if found is None:
        raise CannotFreezeError(f"its weight {name} is on {tensor.device} and no hook brings it to {device}")
    return nn.Parameter(found, requires_grad=False) if isinstance(tensor, nn.Parameter) else found
