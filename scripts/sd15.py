"""A pipeline of Stable Diffusion 1.5's size (1.07 billion parameters) with random weights: nothing is downloaded."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

CALL: dict[str, Any] = {"prompt": "a lighthouse", "num_inference_steps": 1, "height": 256, "width": 256}
"""What a hit costs does not depend on the size of the picture; how long the first run takes does."""


def build() -> Any:
    """Return a ``StableDiffusionPipeline`` in float32, configured like that of Stable Diffusion 1.5."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    text = CLIPTextConfig(
        hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, vocab_size=49408
    )
    vae = {
        "block_out_channels": (128, 256, 512, 512),
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "layers_per_block": 2,
        "sample_size": 512,
    }
    pipe = StableDiffusionPipeline(
        unet=filled(lambda: UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)),
        vae=filled(lambda: AutoencoderKL(**vae)),
        text_encoder=filled(lambda: CLIPTextModel(text)),
        tokenizer=tokenizer(),
        scheduler=DDIMScheduler(clip_sample=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def filled(make: Any) -> Any:
    """A model with small seeded weights, which is much faster than each layer's own initialisation."""
    import torch
    from transformers.initialization import no_init_weights

    torch.manual_seed(0)
    with no_init_weights(), torch.device("meta"):
        model = make()
    model = model.to_empty(device="cpu").eval().requires_grad_(False)
    for name, tensor in model.state_dict().items():
        if name.endswith("position_ids"):
            tensor.copy_(torch.arange(tensor.shape[-1]).expand(tensor.shape))
        else:
            tensor.uniform_(-0.03, 0.03)
    return model


def tokenizer() -> Any:
    from transformers import CLIPTokenizer

    characters = [chr(code) for code in range(33, 127)]
    words = [*characters, *(f"{character}</w>" for character in characters), "<|startoftext|>", "<|endoftext|>"]
    with tempfile.TemporaryDirectory() as folder:
        vocabulary, merges = Path(folder, "vocab.json"), Path(folder, "merges.txt")
        vocabulary.write_text(json.dumps({word: number for number, word in enumerate(words)}))
        merges.write_text("#version: 0.2\n")
        return CLIPTokenizer(str(vocabulary), str(merges), model_max_length=77)
