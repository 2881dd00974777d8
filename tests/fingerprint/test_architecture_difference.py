from __future__ import annotations

from peft import LoraConfig
from torch import nn

from helpers.tiny_models import Net, tiny_text_encoder, tiny_unet, tiny_vae
from pipevault.fingerprint.model import describe_difference, snapshot


def test_nothing_changed() -> None:
    assert describe_difference(snapshot(Net()), snapshot(Net())) == ""


def test_changed_scalar_is_named_with_both_values() -> None:
    unet = tiny_unet()
    unet.enable_freeu(s1=0.9, s2=0.2, b1=1.0, b2=1.4)
    before = snapshot(unet)
    unet.up_blocks[1].b1 = 1.2
    assert describe_difference(before, snapshot(unet)) == "up_blocks.1: b1 changed from 1.0 to 1.2"


def test_change_of_the_part_itself() -> None:
    vae = tiny_vae()
    before = snapshot(vae)
    vae.enable_tiling()
    assert describe_difference(before, snapshot(vae)) == "the part itself: use_tiling changed from False to True"


def test_new_and_lost_attributes() -> None:
    net = Net()
    before = snapshot(net)
    net.extra = 3  # type: ignore[assignment]
    with_extra = snapshot(net)
    assert describe_difference(before, with_extra) == "the part itself: extra is new: 3"
    assert describe_difference(with_extra, before) == "the part itself: extra is gone, it was 3"


def test_replaced_module_is_one_change_whatever_it_holds() -> None:
    net = Net()
    before = snapshot(net)
    net.inner[1] = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    assert describe_difference(before, snapshot(net)) == "inner.1: SiLU became Sequential"


def test_lora_names_both_classes_in_full_where_the_short_names_are_equal() -> None:
    unet = tiny_unet()
    before = snapshot(unet)
    name = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    unet.add_adapter(LoraConfig(r=2, target_modules=[name]), "style")
    text = describe_difference(before, snapshot(unet))
    assert f"{name}: torch.nn.modules.linear.Linear became peft.tuners.lora.layer.Linear" in text
    assert "lora_A" not in text


def test_removed_module_is_one_change() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.ReLU(), nn.Linear(2, 2)))
    before = snapshot(net)
    del net[1]
    assert describe_difference(before, snapshot(net)) == "1: torch.nn.modules.container.Sequential is gone"


def test_long_values_are_cut_to_where_they_differ() -> None:
    encoder = tiny_text_encoder()
    before = snapshot(encoder)
    encoder.config.vocab_size = 123
    text = describe_difference(before, snapshot(encoder), limit=1)
    assert "vocab_size=99" in text
    assert "vocab_size=123" in text
    assert "hidden_size" not in text


def test_only_the_first_changes_are_named() -> None:
    unet = tiny_unet()
    before = snapshot(unet)
    unet.half()
    text = describe_difference(before, snapshot(unet), limit=2)
    assert text.startswith("conv_in: bias changed from [4] float32 stride [1] parameter to [4] float16")
    assert text.count("changed") == 2
    assert text.endswith("; and 206 more")
