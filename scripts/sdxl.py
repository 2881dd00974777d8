"""A UNet of Stable Diffusion XL's size (2.57 billion parameters) with random weights, in a pipeline of small parts."""

from __future__ import annotations

from typing import Any

from sd15 import filled, tokenizer


def build() -> Any:
    """Return a ``StableDiffusionXLPipeline`` in float32 whose UNet is configured like that of SDXL 1.0."""
    from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    def text(width: int) -> Any:
        return CLIPTextConfig(
            hidden_size=width,
            intermediate_size=width,
            num_hidden_layers=2,
            num_attention_heads=width // 64,
            projection_dim=width,
            vocab_size=49408,
        )

    unet = {
        "sample_size": 128,
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 10),
        "attention_head_dim": (5, 10, 20),
        "cross_attention_dim": 2048,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    }
    vae = {
        "block_out_channels": (32, 64, 64, 64),
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "sample_size": 1024,
    }
    pipe = StableDiffusionXLPipeline(
        unet=filled(lambda: UNet2DConditionModel(**unet)),
        vae=filled(lambda: AutoencoderKL(**vae)),
        text_encoder=filled(lambda: CLIPTextModel(text(768))),
        text_encoder_2=filled(lambda: CLIPTextModelWithProjection(text(1280))),
        tokenizer=tokenizer(),
        tokenizer_2=tokenizer(),
        scheduler=EulerDiscreteScheduler(),
        add_watermarker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe
