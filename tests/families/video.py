"""Families that draw the frames of a video."""

from __future__ import annotations

from typing import Any

import diffusers

from families import text
from families.family import CFG, PROMPT, Family, fill, seeded, vary
from families.image import flow, to_flow_unipc


def wan_vae() -> Any:
    """A causal autoencoder that shrinks each side by 8 and time by 4."""
    vae = diffusers.AutoencoderKLWan(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 1, 2, 2],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.1, -0.1, 0.2, 0.0],
        latents_std=[1.2, 0.9, 1.1, 1.0],
    )
    return fill(vae)


def wan_transformer(**settings: Any) -> Any:
    base = {
        "patch_size": (1, 2, 2),
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "in_channels": 4,
        "out_channels": 4,
        "text_dim": 32,
        "freq_dim": 32,
        "ffn_dim": 32,
        "num_layers": 2,
        "rope_max_seq_len": 32,
    }
    return fill(diffusers.WanTransformer3DModel(**(base | settings)))


@seeded
def wan() -> Any:
    return diffusers.WanPipeline(
        transformer=wan_transformer(),
        vae=wan_vae(),
        text_encoder=text.umt5_text(),
        tokenizer=text.t5_tokenizer(),
        scheduler=flow(),
    )


@seeded
def cogvideox() -> Any:
    transformer = diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        time_embed_dim=8,
        text_embed_dim=32,
        num_layers=2,
        sample_width=4,
        sample_height=4,
        sample_frames=9,
        patch_size=2,
        max_text_seq_length=16,
        use_rotary_positional_embeddings=True,
    )
    vae = diffusers.AutoencoderKLCogVideoX(
        block_out_channels=(8, 8, 8, 8),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=4,
        temporal_compression_ratio=4,
        sample_height=32,
        sample_width=32,
    )
    return diffusers.CogVideoXPipeline(
        transformer=fill(transformer),
        vae=fill(vae),
        text_encoder=text.t5_text(),
        tokenizer=text.t5_tokenizer(),
        scheduler=diffusers.CogVideoXDDIMScheduler(
            beta_start=0.00085, beta_end=0.012, prediction_type="v_prediction", timestep_spacing="trailing"
        ),
    )


def call(height: int = 32, width: int = 32, **more: Any) -> dict[str, Any]:
    return {
        "prompt": PROMPT,
        "num_inference_steps": 2,
        "height": height,
        "width": width,
        "num_frames": 5,
        "output_type": "np",
        **more,
    }


VIDEO_FAMILIES = (
    Family(
        "wan",
        wan,
        call(guidance_scale=5.0, max_sequence_length=16),
        "transformer",
        vary(**CFG, several="num_videos_per_prompt", size={"width": 48, "num_frames": 9}),
        to_flow_unipc,
    ),
    Family(
        "cogvideox",
        cogvideox,
        call(guidance_scale=6.0, max_sequence_length=16) | {"num_frames": 9},
        "transformer",
        vary(**CFG, several=None, size={"width": 48, "num_frames": 17}),
        lambda pipe: diffusers.CogVideoXDPMScheduler.from_config(pipe.scheduler.config),
    ),
)
