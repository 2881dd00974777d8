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
