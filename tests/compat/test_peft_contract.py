from __future__ import annotations

from typing import Any

from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from pipevault.compat import peft


def adapted() -> Any:
    config = LoraConfig(r=1, target_modules=["0"])
    return inject_adapter_in_model(config, nn.Sequential(nn.Linear(2, 2)), adapter_name="style")[0]


def test_an_adapter_layer_is_recognised() -> None:
    assert peft.is_adapter_layer(adapted())
    assert not peft.is_adapter_layer(nn.Linear(2, 2))


def test_its_adapters_are_named() -> None:
    layer = adapted()
    assert peft.adapters_of(layer) == {"style"}
    layer.delete_adapter("style")
    assert peft.adapters_of(layer) == set()


def test_it_says_what_is_merged_and_active() -> None:
    layer = adapted()
    assert (layer.merged, layer.disable_adapters, layer.active_adapters) == (False, False, ["style"])
    layer.merge()
    assert (layer.merged, layer.merged_adapters) == (True, ["style"])
    assert "base_layer" in layer._modules
