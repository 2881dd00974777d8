"""Families that draw one image, or several."""

from __future__ import annotations

from typing import Any

import diffusers
import numpy as np
import PIL.Image

from families import text
from families.family import CFG, PROMPT, Family, fill, seeded, vary


def picture(height: int = 16, width: int = 16) -> PIL.Image.Image:
    """A picture of two slopes and a chequerboard."""
    rows, columns = np.mgrid[0:height, 0:width]
    channels = [rows * 255 // (height - 1), columns * 255 // (width - 1), (rows // 4 + columns // 4) % 2 * 255]
    return PIL.Image.fromarray(np.stack(channels, axis=-1).astype(np.uint8))


def kl_vae(latent_channels: int = 4, **settings: Any) -> Any:
    """An ``AutoencoderKL`` that halves each side."""
    return fill(
        diffusers.AutoencoderKL(
            **{
                "block_out_channels": (8, 16),
                "down_block_types": ("DownEncoderBlock2D",) * 2,
                "up_block_types": ("UpDecoderBlock2D",) * 2,
                "latent_channels": latent_channels,
                "norm_num_groups": 4,
                "sample_size": 16,
                "force_upcast": False,
                **settings,
            }
        )
    )


def deep_vae(**settings: Any) -> Any:
    """An ``AutoencoderKL`` that shrinks each side by 8."""
    return kl_vae(
        block_out_channels=(8, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        **settings,
    )


# Stable Diffusion 1.5

UNET: dict[str, Any] = {
    "sample_size": 8,
    "layers_per_block": 1,
    "block_out_channels": (8, 16),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "cross_attention_dim": 16,
    "attention_head_dim": 2,
    "norm_num_groups": 4,
}
CONTROL: dict[str, Any] = {
    name: UNET[name]
    for name in (
        "layers_per_block",
        "block_out_channels",
        "down_block_types",
        "cross_attention_dim",
        "attention_head_dim",
        "norm_num_groups",
    )
} | {"conditioning_embedding_out_channels": (4, 8)}


def ddim() -> Any:
    return diffusers.DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False
    )


def euler() -> Any:
    return diffusers.EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")


def to_euler(pipe: Any) -> Any:
    return diffusers.EulerDiscreteScheduler.from_config(pipe.scheduler.config)


def to_dpm_solver(pipe: Any) -> Any:
    return diffusers.DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)


def to_flow_unipc(pipe: Any) -> Any:
    """A multistep scheduler for models that predict the flow."""
    return diffusers.UniPCMultistepScheduler.from_config(
        pipe.scheduler.config, prediction_type="flow_prediction", use_flow_sigmas=True
    )


def to_other_shift(pipe: Any) -> Any:
    """The same scheduler with other noise levels, for pipelines that fail with any other class."""
    return type(pipe.scheduler).from_config(pipe.scheduler.config, shift=1.5)


def sd_parts(**unet: Any) -> dict[str, Any]:
    return {
        "unet": fill(diffusers.UNet2DConditionModel(**(UNET | unet))),
        "vae": kl_vae(),
        "text_encoder": text.clip_text(),
        "tokenizer": text.clip_tokenizer(),
        "scheduler": ddim(),
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
    }


@seeded
def sd15() -> Any:
    return diffusers.StableDiffusionPipeline(**sd_parts())


@seeded
def sd_controlnet() -> Any:
    control = fill(diffusers.ControlNetModel(**CONTROL))
    return diffusers.StableDiffusionControlNetPipeline(controlnet=control, **sd_parts())


# Stable Diffusion XL

XL: dict[str, Any] = {
    "cross_attention_dim": 32,
    "transformer_layers_per_block": (1, 2),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 6 * 8 + 16,
}


def sdxl_parts(**unet: Any) -> dict[str, Any]:
    return {
        "unet": fill(diffusers.UNet2DConditionModel(**(UNET | XL | unet))),
        "vae": kl_vae(scaling_factor=0.13025),
        "text_encoder": text.clip_text(),
        "text_encoder_2": text.clip_text(projection=16),
        "tokenizer": text.clip_tokenizer(),
        "tokenizer_2": text.clip_tokenizer(),
        "scheduler": euler(),
    }


@seeded
def sdxl() -> Any:
    return diffusers.StableDiffusionXLPipeline(**sdxl_parts())


# Transformers with flow matching


def flow(**settings: Any) -> Any:
    return diffusers.FlowMatchEulerDiscreteScheduler(**{"shift": 3.0, **settings})


def flux_parts(**transformer: Any) -> dict[str, Any]:
    settings = {
        "in_channels": 16,
        "num_layers": 1,
        "num_single_layers": 1,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 32,
        "pooled_projection_dim": 16,
        "guidance_embeds": True,
        "axes_dims_rope": (4, 4, 8),
    }
    return {
        "transformer": fill(diffusers.FluxTransformer2DModel(**(settings | transformer))),
        "vae": flow_vae(),
        "text_encoder": text.clip_text(),
        "tokenizer": text.clip_tokenizer(),
        "text_encoder_2": text.t5_text(),
        "tokenizer_2": text.t5_tokenizer(),
        "scheduler": flow(use_dynamic_shifting=True),
    }


def flow_vae(latent_channels: int = 4) -> Any:
    """An ``AutoencoderKL`` as Flux and Stable Diffusion 3 have it."""
    return kl_vae(
        latent_channels, scaling_factor=1.5, shift_factor=0.06, use_quant_conv=False, use_post_quant_conv=False
    )


@seeded
def flux() -> Any:
    return diffusers.FluxPipeline(**flux_parts())


@seeded
def sd3() -> Any:
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=32,
        caption_projection_dim=32,
        pooled_projection_dim=32,
        pos_embed_max_size=16,
        qk_norm="rms_norm",
    )
    return diffusers.StableDiffusion3Pipeline(
        transformer=fill(transformer),
        vae=flow_vae(),
        text_encoder=text.clip_text(projection=16),
        tokenizer=text.clip_tokenizer(),
        text_encoder_2=text.clip_text(projection=16),
        tokenizer_2=text.clip_tokenizer(),
        text_encoder_3=text.t5_text(),
        tokenizer_3=text.t5_tokenizer(),
        scheduler=flow(),
    )


def qwen_image_parts() -> dict[str, Any]:
    transformer = diffusers.QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(4, 4, 8),
    )
    vae = diffusers.AutoencoderKLQwenImage(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 2, 4],
        num_res_blocks=1,
        temperal_downsample=[False, True],
        latents_mean=[0.1, -0.1, 0.2, 0.0],
        latents_std=[1.2, 0.9, 1.1, 1.0],
    )
    return {
        "transformer": fill(transformer),
        "vae": fill(vae),
        "text_encoder": text.qwen_vl_text(),
        "tokenizer": text.qwen_tokenizer(),
        "scheduler": flow(use_dynamic_shifting=True),
    }


@seeded
def qwen_image() -> Any:
    return diffusers.QwenImagePipeline(**qwen_image_parts())


@seeded
def kandinsky22_combined() -> Any:
    unet = diffusers.UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=8,
        layers_per_block=1,
        block_out_channels=(8, 16),
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        cross_attention_dim=16,
        attention_head_dim=4,
        norm_num_groups=4,
        resnet_time_scale_shift="scale_shift",
        addition_embed_type="image",
        encoder_hid_dim=16,
        encoder_hid_dim_type="image_proj",
    )
    movq = diffusers.VQModel(
        block_out_channels=(32, 32),
        down_block_types=("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
        up_block_types=("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
        latent_channels=4,
        vq_embed_dim=4,
        num_vq_embeddings=12,
        norm_num_groups=4,
        norm_type="spatial",
    )
    prior = diffusers.PriorTransformer(
        num_attention_heads=2, attention_head_dim=8, embedding_dim=16, num_layers=1, num_embeddings=text.LENGTH
    )
    fill(prior).clip_std.data.fill_(1.0)
    fill(movq).decoder.conv_out.weight.data.mul_(0.25)
    return diffusers.KandinskyV22CombinedPipeline(
        unet=fill(unet),
        movq=movq,
        scheduler=diffusers.DDPMScheduler(beta_start=0.00085, beta_end=0.012, clip_sample_range=2.0),
        prior_prior=prior,
        prior_image_encoder=text.clip_vision(),
        prior_text_encoder=text.clip_text(projection=16),
        prior_tokenizer=text.clip_tokenizer(),
        prior_scheduler=diffusers.UnCLIPScheduler(
            variance_type="fixed_small_log", prediction_type="sample", clip_sample_range=5.0
        ),
        prior_image_processor=text.clip_images(),
    )


def call(height: int = 16, width: int = 16, **more: Any) -> dict[str, Any]:
    return {
        "prompt": PROMPT,
        "num_inference_steps": 2,
        "height": height,
        "width": width,
        "output_type": "np",
        **more,
    }


IMAGE_FAMILIES = (
    Family("sdxl", sdxl, call(guidance_scale=5.0), "unet", vary(**CFG, size={"width": 24}), to_dpm_solver),
    Family(
        "flux",
        flux,
        call(guidance_scale=3.5, max_sequence_length=16),
        "transformer",
        vary(
            guidance={"guidance_scale": 2.0},
            negative={"negative_prompt": "a dog", "true_cfg_scale": 2.0},
            size={"width": 24},
        ),
        to_flow_unipc,
    ),
    Family(
        "sd3",
        sd3,
        call(guidance_scale=7.0, max_sequence_length=16),
        "transformer",
        vary(**CFG, size={"width": 24}),
        to_flow_unipc,
    ),
    Family(
        "qwen_image",
        qwen_image,
        call(32, 32, negative_prompt=" ", true_cfg_scale=4.0),
        "transformer",
        vary(
            guidance={"true_cfg_scale": 2.0},
            no_guidance={"negative_prompt": None, "true_cfg_scale": 1.0},
            negative={"negative_prompt": "a dog"},
            batch={"prompt": [PROMPT, "red sun"], "negative_prompt": [" ", " "]},
            size={"width": 48},
        ),
        to_flow_unipc,
    ),
    Family(
        "sd_controlnet",
        sd_controlnet,
        call(guidance_scale=7.5, image=picture()),
        "unet",
        vary(**CFG, size={"width": 24, "image": picture(16, 24)}),
        to_euler,
    ),
    Family(
        "kandinsky22_combined",
        kandinsky22_combined,
        call(guidance_scale=4.0, prior_guidance_scale=4.0, prior_num_inference_steps=2),
        "unet",
        vary(
            guidance={"guidance_scale": 2.5, "prior_guidance_scale": 2.5},
            no_guidance={"guidance_scale": 1.0, "prior_guidance_scale": 1.0},
            negative={"negative_prompt": "a dog"},
            size={"width": 24},
        ),
    ),
    Family("sd15", sd15, call(guidance_scale=7.5), "unet", vary(**CFG, size={"width": 24}), to_euler),
)
