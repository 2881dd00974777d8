"""Traces that training tools, adapters and calls leave on a module without changing what it computes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from pipevault.compat import diffusers, peft
from pipevault.fingerprint.classes import class_identity
from pipevault.fingerprint.names import is_released

if TYPE_CHECKING:
    from torch import nn

BOOKKEEPING_NAMES = diffusers.CALL_COUNTERS | {
    "peft_config",
    "gradient_checkpointing",
    "_gradient_checkpointing_func",
}
_PACKAGES_WITH_TRAINING_HOOKS = ("transformers.", "diffusers.", "peft.")


def computing_module(module: nn.Module) -> nn.Module:
    """``module``, or the base layer of a peft layer that does nothing else than call it.

    That is so where all active adapters are merged into the base layer, or none is left in the layer. A disabled
    layer that holds merged adapters takes them out again when it is called, so it counts as it is.
    """
    while "base_layer" in module._modules and _is_idle(module):
        base = module._modules["base_layer"]
        if base is None:
            break
        module = base
    return module


def named_computing_modules(module: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Every module under each of its names, as if idle peft layers were their base layers."""
    module = computing_module(module)
    yield path, module
    for name, child in module._modules.items():
        if child is not None:
            yield from named_computing_modules(child, f"{path}.{name}" if path else name)


def is_bookkeeping(name: str, value: Any, values: Mapping[str, Any], cls: type) -> bool:
    """Return True if ``name``, of :data:`BOOKKEEPING_NAMES`, can change no inference of a module of ``cls``."""
    released = is_released(cls.__module__)
    if name in diffusers.CALL_COUNTERS:
        return released and cls.__module__.startswith("diffusers.")
    if name == "peft_config":
        return not value or (released and not any(base.__module__.startswith("peft.") for base in cls.__mro__))
    if name == "_gradient_checkpointing_func" and not values.get("gradient_checkpointing"):
        return True
    return released and not values.get("training", False)


def is_training_hook(hook: Any) -> bool:
    """The hook that marks embeddings as needing gradients; it stays when gradient checkpointing is switched off."""
    name, module = getattr(hook, "__qualname__", ""), getattr(hook, "__module__", None) or ""
    return name.endswith(".make_inputs_require_grads") and module.startswith(_PACKAGES_WITH_TRAINING_HOOKS)


def _is_idle(layer: nn.Module) -> bool:
    if not peft.is_adapter_layer(layer) or not is_released(type(layer).__module__):
        return False
    tuner: Any = layer
    own = layer.__dict__
    if "forward" in own or own["_forward_hooks"] or own["_forward_pre_hooks"]:
        return False
    if " code:" in class_identity(type(layer)):
        return False
    if tuner.merged:
        return not tuner.disable_adapters and set(tuner.active_adapters) <= set(tuner.merged_adapters)
    return not peft.adapters_of(tuner)
