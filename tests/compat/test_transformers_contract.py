from __future__ import annotations

from typing import Any

import torch
from transformers import CLIPTextConfig, CLIPTextModel, GenerationConfig

from pipevault.compat import transformers


def called_text_encoder() -> Any:
    config = CLIPTextConfig(
        vocab_size=99, hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2, eos_token_id=2
    )
    model: Any = CLIPTextModel(config).eval()
    model(torch.ones(1, 4, dtype=torch.long), output_hidden_states=True)
    return model


def test_hooks_that_capture_outputs_are_recognised() -> None:
    hooks = [hook for module in called_text_encoder().modules() for hook in module._forward_hooks.values()]
    assert hooks, "transformers captures outputs without hooks"
    assert all(transformers.is_output_capturing_hook(hook) for hook in hooks)


def test_the_mark_is_set_on_the_model() -> None:
    marked = [module for module in called_text_encoder().modules() if transformers.CAPTURE_MARK in vars(module)]
    assert marked, f"transformers does not set {transformers.CAPTURE_MARK} any more"


def test_other_hooks_are_not() -> None:
    def output_capturing_hook(*args: Any) -> None:
        return None

    for hook in (output_capturing_hook, print, None):
        assert not transformers.is_output_capturing_hook(hook)


def test_a_generation_configuration_that_was_read_keeps_its_hash(tmp_path: Any) -> None:
    GenerationConfig(num_beams=2).save_pretrained(tmp_path)
    config = GenerationConfig.from_pretrained(tmp_path)
    assert transformers.CONFIG_HASH_ATTRIBUTE in vars(config)
