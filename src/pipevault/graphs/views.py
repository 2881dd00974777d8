"""A part as it is traced: without the hooks that move its weights about, and with all of them on one device."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import nn

from pipevault.compat.accelerate import offloaded_weight
from pipevault.compat.diffusers import placement_hooks_only
from pipevault.errors import CannotFreezeError

_PLACEMENT = ("forward", "_old_forward", "_hf_hook", "_diffusers_hook")
_LEAST_OUTLINED_BYTES = 1 << 16
"""Smaller tensors keep their values: a constant of a graph may come from one."""


def tracing_view(module: nn.Module, device: torch.device) -> nn.Module:
    """Return ``module`` without hooks of its own, which run around the graph and not inside it.

    Where hooks of accelerate or diffusers move weights of sub-modules, the whole tree is such a view, with copies of
    the weights on ``device``. Raises :class:`CannotFreezeError` for a hook that does more.
    """
    inner = (child.__dict__ for child in module.modules() if child is not module)
    moved = any("_hf_hook" in own or "_diffusers_hook" in own for own in inner)
    if moved or any(p.device.type != device.type for p in module.parameters()):
        _refuse_computing_hooks(module)
        view = _copied(module, lambda owner, name, tensor: _on_device(owner, name, tensor, device), {}, _PLACEMENT)
    else:
        view = _twin(module, _PLACEMENT)
    for hooks in ("_forward_hooks", "_forward_pre_hooks"):
        view.__dict__[hooks] = type(module.__dict__[hooks])()
    return view


def outline(module: nn.Module) -> nn.Module:
    """Return ``module`` with weights of the same layout and without memory, to be sent to another process."""
    weights: dict[Any, torch.Tensor] = {}
    return _copied(module, lambda owner, name, tensor: _outlined(tensor, weights), {})


def with_equal_gradients(module: nn.Module) -> nn.Module:
    """Return ``module`` as if all of its weights asked for gradients, as those do that from_pretrained opens.

    torch decides by it how a product of matrices is computed, also where no gradients are: a graph would depend on it.
    """

    def asks(tensor: torch.Tensor) -> bool:
        can_ask = tensor.is_floating_point() or tensor.is_complex()
        return tensor.requires_grad or not can_ask or type(tensor) is not nn.Parameter

    if all(asks(parameter) for parameter in module.parameters()):
        return module
    known: dict[int, torch.Tensor] = {}

    def asking(owner: nn.Module, name: str, tensor: torch.Tensor) -> torch.Tensor:
        return tensor if asks(tensor) else known.setdefault(id(tensor), nn.Parameter(tensor.detach()))

    return _copied(module, asking, {})


def with_empty_weights(module: nn.Module) -> nn.Module:
    """Give an :func:`outline` weights again, of any values; memory that is never touched takes no room. Return it."""
    known: dict[int, torch.Tensor] = {}
    for child in module.modules():
        for tensors in (child._parameters, child._buffers):
            for name, tensor in tensors.items():
                if tensor is not None and tensor.is_meta:
                    tensors[name] = known.setdefault(id(tensor), _empty(tensor))  # type: ignore[assignment]
    return module


def _copied(
    module: nn.Module,
    tensor_of: Callable[[nn.Module, str, torch.Tensor], torch.Tensor],
    known: dict[int, nn.Module],
    without: Collection[str] = (),
) -> nn.Module:
    """Return a tree like that of ``module``, with what ``tensor_of`` makes of the tensors of each module."""
    if id(module) in known:
        return known[id(module)]
    twin = known[id(module)] = _twin(module, without)
    for kind in ("_parameters", "_buffers"):
        twin.__dict__[kind] = {
            name: tensor if tensor is None else tensor_of(module, name, tensor)
            for name, tensor in module.__dict__[kind].items()
        }
    twin.__dict__["_modules"] = {
        name: child if child is None else _copied(child, tensor_of, known, without)
        for name, child in module._modules.items()
    }
    return twin


def _twin(module: nn.Module, without: Collection[str]) -> nn.Module:
    twin: nn.Module = type(module).__new__(type(module))
    twin.__dict__ = {name: value for name, value in module.__dict__.items() if name not in without}
    return twin


def _outlined(tensor: torch.Tensor, weights: dict[Any, torch.Tensor]) -> torch.Tensor:
    """Tensors that share their memory, as tied weights do, become one."""
    if tensor.numel() * tensor.element_size() < _LEAST_OUTLINED_BYTES:
        return tensor
    place = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, type(tensor))
    if place not in weights:
        weights[place] = _empty(tensor, "meta")
    return weights[place]


def _empty(tensor: torch.Tensor, device: str | None = None) -> torch.Tensor:
    return _like(tensor, torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device))


def _like(tensor: torch.Tensor, content: torch.Tensor) -> torch.Tensor:
    return nn.Parameter(content, requires_grad=False) if isinstance(tensor, nn.Parameter) else content


def _refuse_computing_hooks(module: nn.Module) -> None:
    for path, child in module.named_modules():
        hook = child.__dict__.get("_diffusers_hook")
        if path and hook is not None and not placement_hooks_only(hook):
            raise CannotFreezeError(f"a hook of diffusers on {path} changes what it computes")


def _on_device(module: nn.Module, name: str, tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    if tensor.device.type == device.type:
        return tensor
    found = offloaded_weight(module, name, tensor, device)
    if found is None:
        raise CannotFreezeError(f"its weight {name} is on {tensor.device} and no hook brings it to {device}")
    return _like(tensor, found)
