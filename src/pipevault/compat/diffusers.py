"""Touch points with diffusers: its attention backends and the hook registries on its models."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

REGISTRY_ATTRIBUTE = "_diffusers_hook"
REGISTRY_CACHE_ATTRIBUTE = "_child_registries_cache"
"""A list that a registry fills when a model is called within ``cache_context``."""

CALL_COUNTERS = frozenset({"_conv_num", "_conv_idx", "_enc_conv_num", "_enc_conv_idx"})
"""Names under which autoencoders for videos count their own convolutions each time they are called."""

_PLACEMENT_HOOKS = frozenset({"group_offloading", "layer_execution_tracker", "lazy_prefetch_group_offloading"})
"""Names of ``diffusers.hooks.group_offloading``."""


def attention_backend() -> str:
    """Return the backend that ``diffusers.attention_backend`` chose; its default where diffusers is not in use."""
    dispatch: Any = sys.modules.get("diffusers.models.attention_dispatch")
    if dispatch is None:
        return "native"
    name, _ = dispatch._AttentionBackendRegistry.get_active_backend()
    return str(name.value)


def is_empty_registry(value: Any) -> bool:
    """Return whether ``value`` is a hook registry without hooks: a first call within ``cache_context`` leaves one."""
    hooks: Any = sys.modules.get("diffusers.hooks.hooks")
    return hooks is not None and type(value) is hooks.HookRegistry and not value.hooks


def placement_hooks_only(registry: Any) -> bool:
    """Return whether the hooks of a ``HookRegistry`` do nothing but move weights between devices."""
    return set(getattr(registry, "hooks", {"unknown": None})) <= _PLACEMENT_HOOKS


def without_placement(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the attributes that a module has but for a registry whose hooks do nothing but move its weights."""
    registry = values.get(REGISTRY_ATTRIBUTE)
    if not getattr(registry, "hooks", None) or not placement_hooks_only(registry):
        return values
    return {name: value for name, value in values.items() if name not in (REGISTRY_ATTRIBUTE, "forward")}


def inner_forwards(registry: Any) -> list[tuple[Any, str]]:
    """Return where the hooks of a registry keep the forward that they call: objects, and the name of the attribute."""
    references = getattr(registry, "_fn_refs", ())
    return [(ref, "forward" if ref.original_forward is None else "original_forward") for ref in references]
