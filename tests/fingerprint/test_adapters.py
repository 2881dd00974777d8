"""A peft layer that only calls its base layer counts as that layer; what can change a pixel counts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from helpers.tiny_models import Net, tiny_text_encoder, tiny_unet, tiny_vae
from pipevault.fingerprint.model import architecture, describe_difference, snapshot
from pipevault.fingerprint.weights import weights_digest


def digest(module: nn.Module) -> str:
    return str(architecture(module).digest)


def with_adapters(*names: str) -> Any:
    unet = tiny_unet()
    for name in names:
        unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False), name)
    return unet


def tuner_layers(module: nn.Module) -> list[Any]:
    return [layer for layer in module.modules() if isinstance(layer, BaseTunerLayer)]


def test_merged_adapter_counts_as_the_plain_model_with_all_its_names() -> None:
    unet = with_adapters("style")
    unet.fuse_lora()
    assert describe_difference(snapshot(tiny_unet()), snapshot(unet)) == ""
    assert architecture(unet) == architecture(tiny_unet())
    fused = weights_digest(unet)
    assert fused != weights_digest(tiny_unet())
    unet.unload_lora()
    assert weights_digest(unet) == fused


def test_all_of_two_merged_adapters_count_as_the_plain_model() -> None:
    unet = with_adapters("style", "light")
    unet.set_adapters(["style", "light"])
    unet.fuse_lora()
    assert digest(unet) == digest(tiny_unet())


def test_unmerged_adapters_count_by_scale_state_and_number() -> None:
    plain = digest(tiny_unet())
    unet = with_adapters("style")
    active = digest(unet)
    for layer in tuner_layers(unet):
        layer.set_scale("style", 0.25)
    scaled = digest(unet)
    for layer in tuner_layers(unet):
        layer.enable_adapters(False)
    disabled = digest(unet)
    two = with_adapters("style", "light")
    two.set_adapters(["style", "light"])
    assert len({plain, active, scaled, disabled, digest(two)}) == 5


def test_adapter_beside_a_merged_one_counts() -> None:
    unet = with_adapters("style")
    unet.fuse_lora()
    unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False), "light")
    assert digest(unet) != digest(tiny_unet())


def test_merged_layer_that_would_unmerge_when_called_counts() -> None:
    unet = with_adapters("style")
    unet.fuse_lora()
    for layer in tuner_layers(unet):
        layer.enable_adapters(False)
    assert digest(unet) != digest(tiny_unet())


@pytest.mark.parametrize("change", ["hook", "forward"])
def test_merged_layer_with_a_hook_or_another_forward_counts(change: str) -> None:
    unet = with_adapters("style")
    unet.fuse_lora()
    layer = tuner_layers(unet)[0]
    if change == "hook":
        layer.register_forward_hook(lambda module, arguments, result: result * 2)
    else:
        layer.forward = lambda x: x * 2
    assert digest(unet) != digest(tiny_unet())


def test_added_and_deleted_adapter_leaves_the_digest() -> None:
    unet = with_adapters("style")
    unet.delete_adapters("style")
    assert describe_difference(snapshot(tiny_unet()), snapshot(unet)) == ""
    assert (digest(unet), weights_digest(unet)) == (digest(tiny_unet()), weights_digest(tiny_unet()))


def test_text_encoder_with_a_deleted_adapter_has_its_digest() -> None:
    encoder = tiny_text_encoder()
    encoder.add_adapter(LoraConfig(r=2, target_modules=["q_proj"]), "style")
    assert digest(encoder) != digest(tiny_text_encoder())
    encoder.delete_adapter("style")
    assert digest(encoder) == digest(tiny_text_encoder())


@pytest.mark.parametrize("build", [tiny_unet, tiny_vae])
def test_gradient_checkpointing_leaves_the_digest(build: Any) -> None:
    module = build()
    module.enable_gradient_checkpointing()
    assert digest(module) == digest(build())
    module.disable_gradient_checkpointing()
    assert describe_difference(snapshot(build()), snapshot(module)) == ""


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_gradient_checkpointing_of_a_text_encoder_leaves_the_digest() -> None:
    encoder = tiny_text_encoder()
    encoder.gradient_checkpointing_enable()
    encoder.gradient_checkpointing_disable()
    assert describe_difference(snapshot(tiny_text_encoder()), snapshot(encoder)) == ""


def test_gradient_checkpointing_counts_while_training() -> None:
    unet = tiny_unet().train()
    before = digest(unet)
    unet.enable_gradient_checkpointing()
    assert digest(unet) != before


def test_handles_of_hooks_do_not_count() -> None:
    def holding() -> str:
        net: Any = Net()
        net.handle = net.register_forward_hook(print)
        return digest(net)

    assert holding() == holding()


class Caching(Net):
    """Fills a cache when it is called, as rotary embeddings and streaming decoders do."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.cache: Any = {"tensor": None, "list": [], "dict": {}}[kind]
        self.kind = kind

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.kind == "tensor":
            self.cache = x
        elif self.kind == "list":
            self.cache.append(x)
        else:
            self.cache["x"] = x
        return super().forward(x)


@pytest.mark.parametrize("kind", ["tensor", "list", "dict"])
def test_cache_filled_by_the_first_call_does_not_count(kind: str) -> None:
    net = Caching(kind)
    before, readable = digest(net), snapshot(net)
    net(torch.ones(1, 4))
    assert digest(net) == before
    assert describe_difference(readable, snapshot(net)) == ""
