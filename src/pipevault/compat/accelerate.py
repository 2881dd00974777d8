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
FORWARD_ATTRIBUTE = "_old_forward"
MOVING_METHODS = frozenset({"to", "cuda", "npu", "xpu", "mlu", "sdaa", "musa"})
"""Methods that ``dispatch_model`` replaces by ones that warn."""

_HOOKS_MODULE = "accelerate.hooks"
_PLACING_PACKAGES = ("accelerate", "diffusers")
_COMPUTING_HOOKS = frozenset({"LayerwiseCastingHook"})  # casts weights for each call, so other numbers come out


def is_hooked(values: Mapping[str, Any]) -> bool:
    """Return whether the module with the attributes ``values`` has a hook of accelerate."""
    return HOOK_ATTRIBUTE in values


def forward_of(values: Mapping[str, Any]) -> Any:
    """Return the ``forward`` that a hooked module had before, or has in spite of the hook; ``None`` for the class's.

    accelerate keeps the former one in ``_old_forward`` and calls it from the ``forward`` that it puts on the module.
    """
    forward = values.get("forward")
    return values.get(FORWARD_ATTRIBUTE) if is_hooked_forward(forward) else forward


def is_hooked_forward(forward: object) -> bool:
    """Return whether ``forward`` is the function that ``add_hook_to_module`` puts in place of a module's own."""
    function = forward.func if isinstance(forward, functools.partial) else None
    return (
        isinstance(function, types.FunctionType)
        and function.__globals__.get("__name__") == _HOOKS_MODULE
        and function.__code__.co_name == "new_forward"
    )


def computing_hooks(hook: Any) -> list[Any]:
    """Return the hooks in ``hook`` that may do more than place and move: those of a program's own, and casting ones."""
    inner = getattr(hook, "hooks", None)
    if isinstance(inner, list | tuple):
        return [found for item in inner for found in computing_hooks(item)]
    cls = type(hook)
    placing = cls.__module__.partition(".")[0] in _PLACING_PACKAGES and cls.__name__ not in _COMPUTING_HOOKS
    return [] if placing else [hook]


def offloaded_weight(module: nn.Module, name: str, tensor: torch.Tensor, device: torch.device) -> torch.Tensor | None:
    """Return a copy on ``device`` of the weight ``name`` of ``module``, which an offloading hook keeps elsewhere.

    ``None`` if no hook keeps it. accelerate leaves a tensor on the meta device and has the values in the
    ``weights_map`` of its ``AlignDevicesHook``; diffusers' group offloading leaves the tensor itself on the CPU.
    """
    if not tensor.is_meta:
        return tensor.detach().to(device)
    for hook in _hooks(module.__dict__.get("_hf_hook")):
        weights = getattr(hook, "weights_map", None)
        if weights is not None and name in weights:
            kept: torch.Tensor = weights[name]
            return kept.to(device)
    return None


def _hooks(hook: Any) -> Iterator[Any]:
    if hook is not None:
        yield hook
        for inner in getattr(hook, "hooks", ()):
            yield from _hooks(inner)
