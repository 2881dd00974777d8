"""Touch points with accelerate: what its hooks leave on a module that they place and move."""

from __future__ import annotations

import functools
import types
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import nn

HOOK_ATTRIBUTE = "_hf_hook"
_FORWARD_ATTRIBUTE = "_old_forward"
_MOVING_METHODS = frozenset({"to", "cuda", "npu", "xpu", "mlu", "sdaa", "musa"})
"""Methods that ``dispatch_model`` replaces by ones that warn."""

_COMPUTING_HOOKS = frozenset({"LayerwiseCastingHook"})  # casts weights for each call, so other numbers come out


def without_placement(values: Mapping[str, Any]) -> tuple[Mapping[str, Any], list[Any]]:
    """Return the attributes that a module has but for a hook of accelerate, and what in that hook may compute.

    accelerate puts a ``forward`` of its own on the module, and calls the former one, which it keeps in
    ``_old_forward``. A hook may do more than place and move if it is a program's own, or casts.
    """
    if HOOK_ATTRIBUTE not in values:
        return values, []
    left_out = {HOOK_ATTRIBUTE, _FORWARD_ATTRIBUTE, "forward", *_MOVING_METHODS}
    own = {name: value for name, value in values.items() if name not in left_out}
    forward = values.get("forward")
    if _is_hooked_forward(forward):
        forward = values.get(_FORWARD_ATTRIBUTE)
    if forward is not None:
        own["forward"] = forward
    return own, [hook for hook in _single_hooks(values[HOOK_ATTRIBUTE]) if _may_compute(type(hook))]


def _is_hooked_forward(forward: object) -> bool:
    function = forward.func if isinstance(forward, functools.partial) else None
    return (
        isinstance(function, types.FunctionType)
        and function.__globals__.get("__name__") == "accelerate.hooks"
        and function.__code__.co_name == "new_forward"
    )


def _may_compute(cls: type) -> bool:
    is_theirs = cls.__module__.partition(".")[0] in ("accelerate", "diffusers")
    return not is_theirs or cls.__name__ in _COMPUTING_HOOKS


def _single_hooks(hook: Any) -> Iterator[Any]:
    inner = getattr(hook, "hooks", None)
    if isinstance(inner, list | tuple):
        for item in inner:
            yield from _single_hooks(item)
    else:
        yield hook


def offloaded_weight(module: nn.Module, name: str, tensor: torch.Tensor, device: torch.device) -> torch.Tensor | None:
    """Return a copy on ``device`` of the weight ``name`` of ``module``, which an offloading hook keeps elsewhere.

    ``None`` if no hook keeps it. accelerate leaves a tensor on the meta device and has the values in the
    ``weights_map`` of its ``AlignDevicesHook``; diffusers' group offloading leaves the tensor itself on the CPU.
    """
    if not tensor.is_meta:
        return tensor.detach().to(device)
    for hook in _single_hooks(module.__dict__.get(HOOK_ATTRIBUTE)):
        weights = getattr(hook, "weights_map", None)
        if weights is not None and name in weights:
            kept: torch.Tensor = weights[name]
            return kept.to(device)
    return None
