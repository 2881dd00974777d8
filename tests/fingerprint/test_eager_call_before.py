"""A model has the same digest before and after it ran: what calls leave on modules does not count."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLWan, FluxTransformer2DModel, WanTransformer3DModel
from diffusers.hooks import HookRegistry, ModelHook
from torch import nn
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, T5Config, T5EncoderModel

from helpers.fresh_python import run_python
from helpers.tiny_models import tiny_text_encoder, tiny_unet
from pipevault.fingerprint.model import architecture, describe_difference, snapshot


class Toy(nn.Module):
    """Fills every kind of cache when it runs."""

    def __init__(self) -> None:
        super().__init__()
        self.cache: dict[Any, Any] = {}
        self.freqs: torch.Tensor | None = None
        self.by_layer: list[Any] = [None, None]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.freqs is None:
            self.freqs = torch.arange(x.shape[-1])
            self.cache[x.shape] = (self.freqs, {"cos": self.freqs.cos()})
            self.by_layer[1] = [self.freqs]
            self.steps = [self.freqs]
        return x + self.freqs


def tokens(count: int = 8) -> torch.Tensor:
    return torch.ones(1, count, dtype=torch.long)


def flux() -> tuple[Any, Callable[[Any], Any]]:
    model: Any = FluxTransformer2DModel(
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=1,
        joint_attention_dim=8,
        pooled_projection_dim=8,
        axes_dims_rope=(4, 4, 8),
    )

    def call(model: Any) -> None:
        with model.cache_context("cond"):
            model(
                hidden_states=torch.ones(1, 4, 4),
                encoder_hidden_states=torch.ones(1, 3, 8),
                pooled_projections=torch.ones(1, 8),
                img_ids=torch.zeros(4, 3),
                txt_ids=torch.zeros(3, 3),
                timestep=torch.ones(1),
            )

    return model, call


def wan() -> tuple[Any, Callable[[Any], Any]]:
    model: Any = WanTransformer3DModel(
        num_attention_heads=1,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=8,
        freq_dim=8,
        ffn_dim=8,
        num_layers=1,
        rope_max_seq_len=32,
    )

    def call(model: Any) -> None:
        with model.cache_context("cond"):
            model(
                hidden_states=torch.ones(1, 4, 1, 4, 4),
                timestep=torch.ones(1),
                encoder_hidden_states=torch.ones(1, 3, 8),
            )

    return model, call


def wan_vae() -> tuple[Any, Callable[[Any], Any]]:
    model: Any = AutoencoderKLWan(
        base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
    )
    return model, lambda model: model.decode(torch.ones(1, 16, 2, 2, 2))


def sdxl_unet() -> tuple[Any, Callable[[Any], Any]]:
    model = tiny_unet(
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=32,
        transformer_layers_per_block=2,
        use_linear_projection=True,
    )
    conditions = {"text_embeds": torch.ones(1, 8), "time_ids": torch.zeros(1, 6)}
    return model, lambda model: model(torch.ones(1, 4, 8, 8), 1, torch.ones(1, 3, 8), added_cond_kwargs=conditions)


def qwen() -> tuple[Any, Callable[[Any], Any]]:
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": 99,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]},
        },
        vision_config={"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16},
    )
    model: Any = Qwen2_5_VLForConditionalGeneration(config)
    return model, lambda model: model(input_ids=tokens(), attention_mask=tokens(), output_hidden_states=True)


def t5() -> tuple[Any, Callable[[Any], Any]]:
    model: Any = T5EncoderModel(T5Config(vocab_size=99, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2))
    return model, lambda model: model(tokens(), output_hidden_states=True)


def clip() -> tuple[Any, Callable[[Any], Any]]:
    return tiny_text_encoder(), lambda model: model(tokens(), output_hidden_states=True)


def toy() -> tuple[Any, Callable[[Any], Any]]:
    return Toy(), lambda model: model(torch.ones(3))


@pytest.mark.parametrize("build", [flux, wan, wan_vae, sdxl_unet, qwen, t5, clip, toy])
def test_an_eager_call_does_not_change_the_digest(build: Callable[[], tuple[Any, Callable[[Any], Any]]]) -> None:
    model, call = build()
    model.eval()
    before, items = architecture(model), snapshot(model)
    with torch.no_grad():
        call(model)
    assert describe_difference(items, snapshot(model)) == ""
    assert architecture(model) == before


def test_a_hook_of_diffusers_counts() -> None:
    model, _ = flux()
    before = architecture(model)
    HookRegistry.check_if_exists_or_initialize(model)
    assert architecture(model) == before
    HookRegistry.check_if_exists_or_initialize(model).register_hook(ModelHook(), "mine")
    assert architecture(model) != before


def test_the_hash_of_a_generation_configuration_does_not_count(tmp_path: Path) -> None:
    """transformers keeps Python's hash of it, which has another salt in every process."""
    code = (
        "import sys; from transformers import T5Config, T5ForConditionalGeneration as Model\n"
        "from pipevault.fingerprint.model import architecture\n"
        "config = T5Config(vocab_size=99, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2,"
        " decoder_start_token_id=0)\n"
        "Model(config).save_pretrained('model'); model = Model.from_pretrained('model')\n"
        "print(model.generation_config._original_object_hash, architecture(model).digest)"
    )
    (hash_1, digest_1), (hash_2, digest_2) = (
        run_python(code, cwd=tmp_path, PYTHONHASHSEED=seed).split() for seed in ("1", "2")
    )
    assert hash_1 != hash_2
    assert digest_1 == digest_2
