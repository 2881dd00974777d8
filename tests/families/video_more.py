"""More families that draw the frames of a video."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import diffusers
import transformers
from diffusers.pipelines.wan import pipeline_wan_i2v
from diffusers.utils import is_ftfy_available

from families import text
from families.family import CFG, PROMPT, Family, fill, seeded, vary
from families.image import UNET, ddim, flow, kl_vae, picture, to_euler, to_flow_unipc, to_other_shift
from families.image_more import pixart_transformer
from families.video import call, wan_transformer, wan_vae


@seeded
def wan_i2v() -> Any:
    vision = transformers.CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
    )
    if not is_ftfy_available():  # without it, this pipeline fails where the others leave the text as it is
        vars(pipeline_wan_i2v)["ftfy"] = SimpleNamespace(fix_text=str)
    return diffusers.WanImageToVideoPipeline(
        transformer=wan_transformer(in_channels=12, image_dim=16, added_kv_proj_dim=24),
        vae=wan_vae(),
        text_encoder=text.umt5_text(),
        tokenizer=text.t5_tokenizer(),
        image_encoder=fill(transformers.CLIPVisionModel(vision)),
        image_processor=text.clip_images(),
        scheduler=flow(),
    )


@seeded
def ltx() -> Any:
    transformer = diffusers.LTXVideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=2,
        attention_head_dim=12,
        cross_attention_dim=24,
        num_layers=2,
        caption_channels=32,
    )
    vae = diffusers.AutoencoderKLLTXVideo(
        latent_channels=8,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1),
        spatio_temporal_scaling=(True, True, False, False),
        decoder_spatio_temporal_scaling=(True, True, False, False),
        patch_size=2,
    )
    return diffusers.LTXPipeline(
        transformer=fill(transformer),
        vae=fill(vae),
        text_encoder=text.t5_text(),
        tokenizer=text.t5_tokenizer(),
        scheduler=flow(use_dynamic_shifting=True),
    )


@seeded
def mochi() -> Any:
    transformer = diffusers.MochiTransformer3DModel(
        patch_size=2,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        pooled_projection_dim=16,
        in_channels=12,
        text_embed_dim=32,
        time_embed_dim=16,
        max_sequence_length=16,
    )
    vae = diffusers.AutoencoderKLMochi(
        encoder_block_out_channels=(32, 32, 32, 32),
        decoder_block_out_channels=(32, 32, 32, 32),
        layers_per_block=(1, 1, 1, 1, 1),
    )
    fill(vae).decoder.proj_out.weight.data.mul_(0.25)
    return diffusers.MochiPipeline(
        transformer=fill(transformer),
        vae=vae,
        text_encoder=text.t5_text(),
        tokenizer=text.t5_tokenizer(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=True),
    )


@seeded
def latte() -> Any:
    return diffusers.LattePipeline(
        transformer=pixart_transformer(diffusers.LatteTransformer3DModel, video_length=2),
        vae=kl_vae(),
        text_encoder=text.t5_text(),
        tokenizer=text.t5_tokenizer(),
        scheduler=ddim(),
    )


@seeded
def allegro() -> Any:
    transformer = diffusers.AllegroTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        cross_attention_dim=24,
        sample_width=4,
        sample_height=4,
        sample_frames=6,
        caption_channels=32,
    )
    vae = diffusers.AutoencoderKLAllegro(
        block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4, sample_size=320
    )
    vae.kernel, vae.stride = (24, 32, 32), (16, 16, 16)  # tiles of a small video: without tiles it does not run
    vae.enable_tiling()
    return diffusers.AllegroPipeline(
        transformer=fill(transformer),
        vae=fill(vae),
        text_encoder=text.t5_text(),
        tokenizer=text.t5_tokenizer(),
        scheduler=diffusers.EulerAncestralDiscreteScheduler(),
    )


@seeded
def hunyuan_video() -> Any:
    transformer = diffusers.HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=10,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        text_embed_dim=16,
        pooled_projection_dim=16,
        rope_axes_dim=(2, 4, 4),
    )
    vae = diffusers.AutoencoderKLHunyuanVideo(
        latent_channels=4, block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4
    )
    return diffusers.HunyuanVideoPipeline(
        transformer=fill(transformer),
        vae=fill(vae),
        text_encoder=text.llama_text(),
        tokenizer=text.llama_tokenizer(),
        text_encoder_2=text.clip_text(length=77),
        tokenizer_2=text.clip_tokenizer(77),
        scheduler=flow(shift=7.0),
    )


@seeded
def animatediff() -> Any:
    adapter = diffusers.MotionAdapter(
        block_out_channels=(8, 16), motion_layers_per_block=1, motion_norm_num_groups=4, motion_num_attention_heads=2
    )
    pipe = diffusers.AnimateDiffPipeline(
        unet=diffusers.UNet2DConditionModel(**UNET),
        motion_adapter=fill(adapter),
        vae=kl_vae(),
        text_encoder=text.clip_text(),
        tokenizer=text.clip_tokenizer(),
        scheduler=ddim(),
    )
    fill(pipe.unet)  # the pipeline has made one model of the two
    return pipe


@seeded
def svd() -> Any:
    unet = diffusers.UNetSpatioTemporalConditionModel(
        sample_size=8,
        block_out_channels=(32, 32),
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        layers_per_block=1,
        cross_attention_dim=16,
        num_attention_heads=(2, 2),
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=24,
        num_frames=2,
    )
    vae = diffusers.AutoencoderKLTemporalDecoder(
        block_out_channels=(32, 32), down_block_types=("DownEncoderBlock2D",) * 2, sample_size=16
    )
    return diffusers.StableVideoDiffusionPipeline(
        unet=fill(unet),
        vae=fill(vae),
        image_encoder=text.clip_vision(size=224),
        feature_extractor=text.clip_images(224),
        scheduler=diffusers.EulerDiscreteScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            prediction_type="v_prediction",
            timestep_type="continuous",
            timestep_spacing="leading",
            steps_offset=1,
            sigma_min=0.002,
            sigma_max=700.0,
            use_karras_sigmas=True,
        ),
    )


VIDEOS = "num_videos_per_prompt"
WIDER = {"width": 48, "num_frames": 9}

MORE_VIDEO_FAMILIES = (
    Family(
        "wan_i2v",
        wan_i2v,
        call(guidance_scale=5.0, max_sequence_length=16, image=picture(32, 32)),
        "transformer",
        vary(**CFG, several=None, size=WIDER | {"image": picture(32, 48)}),
        to_flow_unipc,
    ),
    Family(
        "ltx",
        ltx,
        call(guidance_scale=3.0, max_sequence_length=16),
        "transformer",
        vary(**CFG, several=VIDEOS, size={"width": 64, "num_frames": 9}),
        to_flow_unipc,
    ),
    Family(
        "mochi",
        mochi,
        call(guidance_scale=4.5, max_sequence_length=16) | {"num_frames": 7},
        "transformer",
        vary(**CFG, several=VIDEOS, size={"width": 48, "num_frames": 13}),
        to_other_shift,
    ),
    Family(
        "latte",
        latte,
        {
            "prompt": PROMPT,
            "num_inference_steps": 2,
            "height": 16,
            "width": 16,
            "video_length": 2,
            "guidance_scale": 7.5,
            "clean_caption": False,
            "output_type": "np",
        },
        "transformer",
        vary(**CFG, size={"width": 24}),
        to_euler,
    ),
    Family(
        "allegro",
        allegro,
        call(guidance_scale=7.5, max_sequence_length=16, clean_caption=False) | {"num_frames": 24},
        "transformer",
        vary(**CFG, several=None, size={"width": 48}, without=("batch_2",)),
        to_euler,
    ),
    Family(
        "hunyuan_video",
        hunyuan_video,
        call(guidance_scale=6.0, max_sequence_length=16, prompt_template={"template": "{}", "crop_start": 0}),
        "transformer",
        vary(
            guidance={"guidance_scale": 2.0},
            negative={"negative_prompt": "a dog", "true_cfg_scale": 2.0},
            several=VIDEOS,
            size=WIDER,
        ),
        to_flow_unipc,
    ),
    Family(
        "animatediff",
        animatediff,
        call(16, 16, guidance_scale=7.5) | {"num_frames": 2},
        "unet",
        vary(**CFG, several=None, size={"width": 24, "num_frames": 4}),
        to_euler,
    ),
    Family(
        "svd",
        svd,
        {
            "image": picture(),
            "num_inference_steps": 2,
            "height": 16,
            "width": 16,
            "num_frames": 2,
            "min_guidance_scale": 1.0,
            "max_guidance_scale": 3.0,
            "output_type": "np",
        },
        "unet",
        vary(
            guidance={"max_guidance_scale": 2.0},
            no_guidance={"max_guidance_scale": 1.0},
            batch={"image": [picture(), picture().rotate(90)]},
            several=VIDEOS,
            size={"width": 24, "num_frames": 4},
            without=("longer_prompt",),
        ),
        lambda pipe: type(pipe.scheduler).from_config(pipe.scheduler.config, use_karras_sigmas=False),
    ),
)
