"""Families that make sound."""

from __future__ import annotations

from typing import Any

import diffusers

from families import text
from families.family import CFG, PROMPT, Family, fill, seeded, vary


@seeded
def stable_audio() -> Any:
    transformer = diffusers.StableAudioDiTModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        num_key_value_attention_heads=2,
        cross_attention_dim=16,
        cross_attention_input_dim=16,
        global_states_input_dim=32,
        time_proj_dim=16,
    )
    vae = diffusers.AutoencoderOobleck(
        encoder_hidden_size=8,
        downsampling_ratios=[1, 2],
        channel_multiples=[1, 2],
        decoder_channels=4,
        decoder_input_channels=4,
        sampling_rate=4,
    )
    projection = diffusers.StableAudioProjectionModel(
        text_encoder_dim=16, conditioning_dim=16, min_value=0, max_value=32
    )
    return diffusers.StableAudioPipeline(
        transformer=fill(transformer),
        vae=fill(vae),
        text_encoder=text.t5_text(16),
        projection_model=fill(projection),
        tokenizer=text.t5_tokenizer(),
        # The scheduler of the published pipeline draws its noise with torchsde.
        scheduler=diffusers.EDMDPMSolverMultistepScheduler(
            sigma_min=0.3, sigma_max=500.0, prediction_type="v_prediction", sigma_schedule="exponential"
        ),
    )


AUDIO_FAMILIES = (
    Family(
        "stable_audio",
        stable_audio,
        {
            "prompt": PROMPT,
            "num_inference_steps": 2,
            "audio_end_in_s": 8.0,
            "guidance_scale": 7.0,
            "output_type": "np",
        },
        "transformer",
        vary(
            **CFG,
            several="num_waveforms_per_prompt",
            size={"audio_end_in_s": 5.0},
            without=("callback",),
        ),
        lambda pipe: diffusers.EDMEulerScheduler.from_config(pipe.scheduler.config),
    ),
)
