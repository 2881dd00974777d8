from __future__ import annotations

from typing import Any

from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from pipevault.compat import peft


def adapted() -> Any:
    config = LoraConfig(r=1, target_modules=["0"])
    return inject_adapter_in_model(config, nn.Sequential(nn.Linear(2, 2)), adapter_name="style")[0]


def test_a_layer_without_adapters_is_idle() -> None:
    layer = adapted()
    assert "base_layer" in layer._modules
    assert not peft.is_idle_layer(layer)
    layer.delete_adapter("style")
    assert peft.is_idle_layer(layer)
    assert not peft.is_idle_layer(nn.Linear(2, 2)), "it is no layer of peft"


def test_a_layer_whose_active_adapters_are_merged_is_idle() -> None:
    layer = adapted()
    assert (layer.merged, layer.disable_adapters, layer.active_adapters) == (False, False, ["style"])
    layer.merge()
    assert (layer.merged, layer.merged_adapters) == (True, ["style"])
    assert peft.is_idle_layer(layer)
    layer.enable_adapters(False)
    assert not peft.is_idle_layer(layer), "it takes them out again when it is called"
