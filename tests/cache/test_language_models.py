"""Text encoders of newer pipelines: T5 ties its embedding, language models return a key-value cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import pipevault
from helpers.pipelines import FAST_BUILD

pytestmark = pytest.mark.compile


class TwoEncoders:
    """Runs a T5 encoder and a decoder-only language model as the pipelines of video models do."""

    def __init__(self) -> None:
        from transformers import LlamaConfig, LlamaModel, T5Config, T5EncoderModel

        torch.manual_seed(0)
        t5 = T5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
        llama = LlamaConfig(
            vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
        )
        self.text_encoder = T5EncoderModel(t5).eval()
        self.text_encoder_3 = LlamaModel(llama).eval()

    @torch.no_grad()
    def __call__(self, prompt: str = "") -> Any:
        tokens = torch.arange(8).reshape(1, 8)
        mask = torch.ones_like(tokens)
        first = self.text_encoder(tokens, attention_mask=mask)[0]
        second = self.text_encoder_3(tokens, attention_mask=mask, output_hidden_states=True)
        return torch.cat([first, second.hidden_states[-1]])


def test_both_are_frozen_one_through_onediffx_and_one_beside_it(tmp_path: Path) -> None:
    pipe = TwoEncoders()
    assert pipe.text_encoder_3.config.use_cache
    eager = pipe()
    cache = pipevault.PipelineCache(tmp_path / "vault", build_config=FAST_BUILD)
    cache.load(pipe, batch_size=1)
    outcome = pipevault.outcome(pipe)
    assert {name: (part.status, part.reason) for name, part in outcome.parts.items()} == {
        "text_encoder": ("frozen", ""),
        "text_encoder_3": ("frozen", ""),
    }
    torch.testing.assert_close(pipe(), eager)
    tied = pipe.text_encoder
    with torch.no_grad():
        tied.shared.weight.mul_(0.5)
    pipevault.PipelineCache(mode="off").load(pipe, batch_size=1)
    changed = pipe()
    cache.load(pipe, batch_size=1)
    assert pipevault.outcome(pipe).status == "hit"
    torch.testing.assert_close(pipe(), changed)
