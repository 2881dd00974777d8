from __future__ import annotations

import sys
from typing import Any

import pytest
from diffusers import AutoencoderKLWan, FluxTransformer2DModel
from diffusers.hooks import HookRegistry, ModelHook
from diffusers.models.attention_dispatch import attention_backend

from pipevault.compat import diffusers


def tiny_flux() -> Any:
    return FluxTransformer2DModel(
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=1,
        joint_attention_dim=8,
        pooled_projection_dim=8,
        axes_dims_rope=(4, 4, 8),
    )


def test_the_attention_backend_is_read() -> None:
    assert diffusers.attention_backend() == "native"
    with attention_backend("_native_math"):
        assert diffusers.attention_backend() == "_native_math"


def test_without_diffusers_it_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "diffusers.models.attention_dispatch")
    assert diffusers.attention_backend() == "native"


def test_a_cache_context_leaves_an_empty_registry() -> None:
    model = tiny_flux()
    with model.cache_context("cond"):
        pass
    registry = vars(model)[diffusers.REGISTRY_ATTRIBUTE]
    assert diffusers.is_empty_registry(registry)
    assert diffusers.REGISTRY_CACHE_ATTRIBUTE in vars(registry)


def test_a_registry_with_a_hook_is_not_empty() -> None:
    model = tiny_flux()
    HookRegistry.check_if_exists_or_initialize(model).register_hook(ModelHook(), "mine")
    assert not diffusers.is_empty_registry(vars(model)[diffusers.REGISTRY_ATTRIBUTE])
    assert not diffusers.is_empty_registry(None)


def test_a_video_autoencoder_counts_its_convolutions() -> None:
    model: Any = AutoencoderKLWan(
        base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
    )
    before = set(vars(model))
    model.clear_cache()
    assert {name for name in set(vars(model)) - before if "conv" in name} <= diffusers.CALL_COUNTERS
