"""The architecture digest changes with everything that decides a graph, comes back when the change is undone,
and with nothing else."""

from __future__ import annotations

import copy
import functools
import types
import warnings
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.models import attention_processor
from peft import LoraConfig
from torch import nn
from transformers import CLIPTextModel

from helpers.fresh_python import run_python
from helpers.tiny_models import Net, tiny_text_encoder, tiny_unet, tiny_vae
from pipevault.fingerprint import model as fingerprint
from pipevault.fingerprint.model import architecture
from pipevault.fingerprint.names import original_class
from pipevault.fingerprint.weights import weights_digest

PlainProcessor: Any = attention_processor.AttnProcessor
FlashProcessor: Any = attention_processor.AttnProcessor2_0


def digest(module: nn.Module) -> str:
    return str(architecture(module).digest)


# --- what must not count


@pytest.mark.parametrize("build", [tiny_unet, tiny_vae, tiny_text_encoder])
def test_other_weights_of_the_same_architecture_have_the_same_digest(build: Callable[..., nn.Module]) -> None:
    assert architecture(build(seed=1)) == architecture(build(seed=2))


def test_summary_is_readable() -> None:
    summary = architecture(Net())
    assert summary.class_name == "Net"
    assert summary.parameters == 4 * 4 + 4 + 4 * 4
    assert summary.tensors == 4
    assert summary.dtypes == {"float32": 4}
    assert len(summary.digest) == 64


@pytest.mark.parametrize(
    ("build", "loader"),
    [
        (tiny_unet, UNet2DConditionModel),
        (tiny_vae, AutoencoderKL),
        (tiny_text_encoder, CLIPTextModel),
    ],
)
def test_folder_that_a_model_was_loaded_from_does_not_count(
    build: Callable[..., Any], loader: Any, tmp_path: Path
) -> None:
    for name in ("one", "two"):
        build().save_pretrained(tmp_path / name)
    config = tmp_path / "two" / "config.json"
    config.write_text(config.read_text().replace("{", '{"_name_or_path": "/somewhere/else",', 1))
    digests = {digest(loader.from_pretrained(tmp_path / name).eval()) for name in ("one", "two")}
    assert digests == {digest(build())}


def test_digest_is_the_same_in_other_processes(tmp_path: Path) -> None:
    code = (
        "from helpers.tiny_models import *; from pipevault.fingerprint.model import architecture as a;"
        "print(*(a(m).digest for m in (Net(), tiny_unet(), tiny_vae(), tiny_text_encoder())))"
    )
    (tmp_path / "elsewhere").mkdir()
    first = run_python(code, cwd=tmp_path, PYTHONHASHSEED="1")
    second = run_python(code, cwd=tmp_path / "elsewhere", PYTHONHASHSEED="2", USER="someone", HOME=str(tmp_path))
    here = " ".join(map(digest, (Net(), tiny_unet(), tiny_vae(), tiny_text_encoder())))
    assert first == second == here


def test_local_class_has_the_same_digest_as_a_script_and_as_an_import(tmp_path: Path) -> None:
    script = tmp_path / "local_model.py"
    script.write_text(
        "import torch\nclass Local(torch.nn.Module):\n    def forward(self, x):\n        return x + 1\n"
        "if __name__ == '__main__':\n    from pipevault.fingerprint.model import architecture\n"
        "    print(architecture(Local()))\n"
    )
    as_script = run_python(f"import runpy; runpy.run_path({str(script)!r}, run_name='__main__')", cwd=tmp_path)
    as_import = run_python(
        f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import local_model\n"
        "from pipevault.fingerprint.model import architecture; print(architecture(local_model.Local()))",
        cwd=tmp_path,
    )
    assert as_script == as_import


def test_device_does_not_count() -> None:
    net: Any = Net()
    before = digest(net)
    net.device = torch.device("cuda", 3)
    net.places = [torch.device("cuda", 1)]
    one = digest(net)
    net.places = [torch.device("cpu")]
    assert digest(net) == one
    del net.places
    assert digest(net.to("meta")) == before


def test_requires_grad_does_not_count() -> None:
    net: Any = Net()
    before = digest(net)
    assert digest(net.requires_grad_(False)) == before


def test_paths_do_not_count() -> None:
    net: Any = Net()
    before = digest(net)
    net.source_folder = "/home/someone/models/sd15"
    net.weights_file = Path("model.safetensors")
    net._name_or_path = "someone/model"
    assert digest(net) == before


def test_what_pipevault_puts_on_a_module_does_not_count() -> None:
    def forward(*args: Any) -> Any:
        return args[0]

    forward.__module__ = "pipevault.graphs.part"
    net: Any = Net()
    before = architecture(net)
    net._pipevault_state = 3
    net._deployable_module_dpl_graph = [1]
    net.forward = forward
    net.register_forward_pre_hook(forward)
    net.__class__ = type("Frozen", (Net,), {"_pipevault_original_class": Net})
    assert type(net) is not Net
    assert original_class(net) is Net
    assert architecture(net) == before


def test_order_in_which_attributes_were_set_does_not_count() -> None:
    one: Any = Net()
    two: Any = Net()
    one.a, one.b = 1, 2
    two.b, two.a = 2, 1
    assert digest(one) == digest(two)


def test_addresses_never_get_in() -> None:
    class Odd:
        __slots__ = ("value",)

    def build() -> Any:
        net: Any = Net()
        net.odd = [object(), Odd(), Net, functools.partial(torch.add, 1), lambda x: x + 1]
        net.bound = net.inner.forward
        return net

    one, two = build(), build()
    assert digest(one) == digest(two)
    assert not any("0x" in text for text in fingerprint.snapshot(one).values())


def test_objects_that_refer_to_each_other_end() -> None:
    net: Any = Net()
    holder = types.SimpleNamespace(net=net, items=[])
    holder.items.append(holder)
    net.holder = holder
    other = copy.deepcopy(net)
    assert digest(net) == digest(other)


# --- what must count, and must come back


def set_attribute(name: str, value: Any) -> Callable[[Any], None]:
    return lambda module: setattr(module, name, value)


Change = tuple[Callable[[], Any], Callable[[Any], Any], Callable[[Any], Any]]

CHANGES: dict[str, Change] = {
    "scalar": (Net, set_attribute("scale", 2.0), set_attribute("scale", 1.0)),
    "int against float": (Net, set_attribute("scale", 1), set_attribute("scale", 1.0)),
    "nested scalar": (Net, set_attribute("extra", {"a": [1, (2, None)]}), lambda m: delattr(m, "extra")),
    "dtype attribute": (Net, set_attribute("kind", torch.float16), lambda m: delattr(m, "kind")),
    "numpy scalar": (Net, set_attribute("kind", np.float32(2)), lambda m: delattr(m, "kind")),
    "function": (Net, set_attribute("act", nn.functional.relu), lambda m: delattr(m, "act")),
    "lambda": (Net, set_attribute("act", lambda x: x * 3), lambda m: delattr(m, "act")),
    "replaced forward": (Net, set_attribute("forward", lambda x: x), lambda m: delattr(m, "forward")),
    "buffer": (
        Net,
        lambda m: m.register_buffer("more", torch.ones(2)),
        lambda m: delattr(m, "more"),
    ),
    "buffer persistence": (
        Net,
        lambda m: m.register_buffer("steps", m.steps, persistent=False),
        lambda m: m.register_buffer("steps", m.steps),
    ),
    "training": (Net, lambda m: m.inner[0].eval(), lambda m: m.inner[0].train()),
    "dtype": (Net, lambda m: m.half(), lambda m: m.float()),
    "one dtype": (Net, lambda m: m.inner[2].bfloat16(), lambda m: m.inner[2].float()),
    "child class": (
        Net,
        lambda m: m.inner.__setitem__(1, nn.ReLU()),
        lambda m: m.inner.__setitem__(1, nn.SiLU()),
    ),
    "freeu": (
        tiny_unet,
        lambda m: m.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4),
        lambda m: m.disable_freeu(),
    ),
    "attention processor": (
        tiny_unet,
        lambda m: m.set_attn_processor(PlainProcessor()),
        lambda m: m.set_attn_processor(FlashProcessor()),
    ),
    "one attention processor": (
        tiny_unet,
        lambda m: setattr(m.mid_block.attentions[0].transformer_blocks[0].attn2, "processor", PlainProcessor()),
        lambda m: setattr(m.mid_block.attentions[0].transformer_blocks[0].attn2, "processor", FlashProcessor()),
    ),
    "attention slicing": (
        tiny_unet,
        lambda m: m.set_attention_slice(1),
        lambda m: m.set_attention_slice(None) or m.set_attn_processor(FlashProcessor()),
    ),
    "fused projections": (tiny_unet, lambda m: m.fuse_qkv_projections(), lambda m: None),
    "channels last": (
        tiny_unet,
        lambda m: m.to(memory_format=torch.channels_last),
        lambda m: m.to(memory_format=torch.contiguous_format),
    ),
    "vae tiling": (tiny_vae, lambda m: m.enable_tiling(), lambda m: m.disable_tiling()),
    "vae slicing": (tiny_vae, lambda m: m.enable_slicing(), lambda m: m.disable_slicing()),
    "vae tile size": (
        tiny_vae,
        set_attribute("tile_sample_min_size", 64),
        set_attribute("tile_sample_min_size", 32),
    ),
    "text encoder config": (
        tiny_text_encoder,
        lambda m: setattr(m.config, "output_hidden_states", True),
        lambda m: setattr(m.config, "output_hidden_states", False),
    ),
    "attention implementation": (
        tiny_text_encoder,
        lambda m: m.set_attn_implementation("eager"),
        lambda m: m.set_attn_implementation("sdpa"),
    ),
}
IRREVERSIBLE = {"fused projections"}


@pytest.mark.parametrize("name", CHANGES)
def test_change_counts_and_undoing_it_restores_the_digest(name: str) -> None:
    build, change, undo = CHANGES[name]
    module = build()
    before = digest(module)
    snapshot = fingerprint.snapshot(module)
    change(module)
    assert digest(module) != before
    assert fingerprint.describe_difference(snapshot, fingerprint.snapshot(module))
    if name not in IRREVERSIBLE:
        undo(module)
        difference = fingerprint.describe_difference(snapshot, fingerprint.snapshot(module))
        assert (digest(module), difference) == (before, "")


@pytest.mark.parametrize("register", ["register_forward_hook", "register_forward_pre_hook"])
def test_hooks_count(register: str) -> None:
    def hook(*_: Any) -> None:
        return None

    net: Any = Net()
    before = digest(net)
    handle = getattr(net.inner, register)(hook)
    with_hook = digest(net)
    assert with_hook != before
    handle.remove()
    assert digest(net) == before
    getattr(net.inner, register)(hook, with_kwargs=True)
    assert digest(net) not in (before, with_hook)


def test_hooks_of_accelerate_that_place_do_not_count() -> None:
    from accelerate import cpu_offload
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module

    net: Any = Net()
    before = digest(net)
    add_hook_to_module(net.inner[0], AlignDevicesHook(execution_device="cpu"))
    assert digest(net) == before
    remove_hook_from_module(net.inner[0])
    assert digest(net) == before
    cpu_offload(net, execution_device=torch.device("cpu"))
    assert digest(net) == before


def test_a_forward_below_a_hook_of_accelerate_counts() -> None:
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    net: Any = Net()
    net.forward = lambda x: x
    replaced = digest(net)
    add_hook_to_module(net, AlignDevicesHook(execution_device="cpu"))
    assert digest(net) == replaced != digest(Net())


def test_a_hook_of_the_program_counts_though_accelerate_calls_it() -> None:
    from accelerate.hooks import AlignDevicesHook, ModelHook, add_hook_to_module, remove_hook_from_module

    class Doubling(ModelHook):
        def post_forward(self, module: nn.Module, output: Any) -> Any:
            return output * 2

    net: Any = Net()
    before = digest(net)
    add_hook_to_module(net.inner[0], Doubling())
    doubling = digest(net)
    add_hook_to_module(net.inner[0], AlignDevicesHook(execution_device="cpu"), append=True)
    assert digest(net) == doubling != before
    remove_hook_from_module(net.inner[0])
    assert digest(net) == before


def test_lora_counts_and_unloading_it_restores_the_digest() -> None:
    unet = tiny_unet()
    before = digest(unet)
    snapshot = fingerprint.snapshot(unet)
    unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False), "style")
    loaded = digest(unet)
    unet.set_adapters("style", weights=0.5)
    scaled = digest(unet)
    unet.disable_lora()
    disabled = digest(unet)
    unet.enable_lora()
    unet.fuse_lora()
    fused = digest(unet)
    assert len({before, loaded, scaled, disabled}) == 4
    assert fused == before
    unet.unfuse_lora()
    assert digest(unet) == scaled
    unet.fuse_lora(lora_scale=0.7)
    unet.unload_lora()
    assert fingerprint.describe_difference(snapshot, fingerprint.snapshot(unet)) == ""
    assert digest(unet) == before


def test_lora_of_another_rank_or_place_counts() -> None:
    def with_lora(rank: int, target: str) -> str:
        unet = tiny_unet()
        unet.add_adapter(LoraConfig(r=rank, target_modules=[target], base_model_name_or_path=f"at-{rank}"), "style")
        return digest(unet)

    assert with_lora(2, "to_q") == with_lora(2, "to_q")
    assert len({with_lora(2, "to_q"), with_lora(3, "to_q"), with_lora(2, "to_k")}) == 3


def test_ties_between_weights_count() -> None:
    tied, untied = (nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)]) for _ in range(2))
    tied[1].weight = tied[0].weight
    assert digest(tied) != digest(untied)


def test_stride_of_a_dimension_of_size_one_does_not_count() -> None:
    def holding(stride: tuple[int, ...]) -> str:
        module = nn.Module()
        module.register_buffer("weight", torch.zeros(8).as_strided((8, 1), stride))
        return digest(module)

    assert holding((1, 1)) == holding((1, 8))
    assert holding((1, 1)) != holding((0, 1))


def test_shared_module_counts() -> None:
    layer = nn.Linear(4, 4)
    assert digest(nn.Sequential(layer, layer)) != digest(nn.Sequential(layer, nn.Linear(4, 4)))


def test_order_of_modules_counts() -> None:
    one, two = nn.Sequential(), nn.Sequential()
    one.add_module("a", nn.ReLU())
    one.add_module("b", nn.SiLU())
    two.add_module("b", nn.SiLU())
    two.add_module("a", nn.ReLU())
    assert digest(one) != digest(two)


def list_in_itself() -> list[Any]:
    items: list[Any] = []
    items.append(items)
    return items


CACHES: dict[str, Callable[[], Any]] = {
    "tensor": lambda: torch.ones(2),
    "tensor in a list": lambda: [torch.ones(2)],
    "tensor beside other items": lambda: [1, None, torch.ones(2)],
    "tensor in a nest": lambda: {"a": (1, [{"b": deque([torch.ones(2)])}])},
    "empty": dict,
    "empty nest": lambda: [{}, [], (None, [None])],
    "nothing": lambda: [None, None],
    "a container in itself": list_in_itself,
}


@pytest.mark.parametrize("name", CACHES)
def test_what_a_call_fills_does_not_count(name: str) -> None:
    net: Any = Net()
    before = digest(net)
    net.cache = CACHES[name]()
    assert digest(net) == before


@pytest.mark.parametrize("value", [[1], [None, 1], {"a": [0.5]}, ((),) * 2 + (False,), ["x"], torch.Size([])])
def test_a_container_with_values_counts(value: Any) -> None:
    net: Any = Net()
    before = digest(net)
    net.extra = value
    assert digest(net) != before


def test_a_container_of_weights_counts() -> None:
    net: Any = Net()
    net.shared = [net.inner[0].weight]
    before = digest(net)
    net.shared = [net.inner[2].weight, net.inner[0].weight]
    assert digest(net) != before


def test_a_very_deep_container_ends() -> None:
    net: Any = Net()
    net.deep = []
    for _ in range(5000):
        net.deep = [net.deep]
    assert digest(net) == digest(net)


def test_a_tensor_that_an_object_holds_does_not_count_as_models_fill_such_caches() -> None:
    net: Any = Net()
    net.helper = types.SimpleNamespace(constant=None, scale=1)
    before = digest(net)
    net.helper.constant = torch.zeros(2)  # a graph that has it as a constant compares it
    assert digest(net) == before
    net.helper.scale = 2
    assert digest(net) != before


def test_weights_of_a_module_outside_the_tree_count() -> None:
    net: Any = Net()
    net.others = [nn.Linear(2, 2, bias=False)]
    before = digest(net)
    with torch.no_grad():
        net.others[0].weight.zero_()
    assert digest(net) != before


def test_a_list_of_registered_weights_does_not_make_their_values_count() -> None:
    assert digest(nn.LSTM(2, 2)) == digest(nn.LSTM(2, 2))


def test_decoder_alone_is_a_part() -> None:
    vae = tiny_vae()
    before = digest(vae.decoder)
    vae.enable_tiling()
    assert digest(vae.decoder) == before
    assert architecture(vae.decoder).class_name.endswith(".Decoder")
    vae.decoder.conv_in.half()
    assert digest(vae.decoder) != before


class Scaled(torch.Tensor):
    """A wrapper of two plain tensors, as quantization packages make them."""

    payload: torch.Tensor
    scale: torch.Tensor

    def __tensor_flatten__(self) -> tuple[list[str], dict[str, int]]:
        return ["payload", "scale"], {"bits": 8}


def scaled(scale: torch.Tensor) -> Scaled:
    wrapper = torch.ones(2).as_subclass(Scaled)
    wrapper.payload, wrapper.scale = torch.ones(2, dtype=torch.int8), scale
    return wrapper


def test_tensor_wrapper_is_described_by_its_parts() -> None:
    digests = []
    for buffer in (torch.ones(2), scaled(torch.ones(1)), scaled(torch.zeros(1)), scaled(torch.ones(2))):
        net: Any = Net()
        net.register_buffer("wrapped", buffer)
        digests.append(digest(net))
    assert digests[1] == digests[2]
    assert len(set(digests)) == 3


def test_lazy_module_has_a_digest() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lazy = nn.LazyLinear(4)
    assert digest(lazy) != digest(nn.Linear(4, 4))


def test_a_scripted_module_has_a_fingerprint() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        scripted = torch.jit.script(nn.Linear(2, 2))
    module = nn.Sequential(scripted)
    assert architecture(module) == architecture(module)
    assert weights_digest(module) == weights_digest(module)
