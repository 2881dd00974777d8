"""More families that draw images: other tasks of the first kinds, and other transformers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import numpy as np
import PIL.Image
import torch

from families import text
from families.family import CFG, OTHER_PROMPT, PROMPT, Family, fill, seeded, vary
from families.image import (
    CONTROL,
    XL,
    call,
    ddim,
    deep_vae,
    flow,
    flow_vae,
    flux_parts,
    kl_vae,
    picture,
    qwen_image_parts,
    sd_parts,
    sdxl_parts,
    to_dpm_solver,
    to_euler,
    to_flow_unipc,
    to_other_shift,
)


def mask(height: int = 16, width: int = 16) -> PIL.Image.Image:
    """White where the right half of a picture is drawn anew."""
    values = np.zeros((height, width), dtype=np.uint8)
    values[:, width // 2 :] = 255
    return PIL.Image.fromarray(values)


@seeded
def sd15_img2img() -> Any:
    return diffusers.StableDiffusionImg2ImgPipeline(**sd_parts())


@seeded
def sd15_inpaint() -> Any:
    return diffusers.StableDiffusionInpaintPipeline(**sd_parts(in_channels=9))


@seeded
def sdxl_img2img() -> Any:
    return diffusers.StableDiffusionXLImg2ImgPipeline(**sdxl_parts())


@seeded
def sdxl_inpaint() -> Any:
    return diffusers.StableDiffusionXLInpaintPipeline(**sdxl_parts())


@seeded
def sdxl_controlnet() -> Any:
    control = fill(diffusers.ControlNetModel(**(CONTROL | XL)))
    return diffusers.StableDiffusionXLControlNetPipeline(controlnet=control, **sdxl_parts())


@seeded
def sdxl_t2i_adapter() -> Any:
    adapter = diffusers.T2IAdapter(
        in_channels=3, channels=[8, 16, 16, 16], num_res_blocks=1, downscale_factor=4, adapter_type="full_adapter_xl"
    )
    return diffusers.StableDiffusionXLAdapterPipeline(adapter=fill(adapter), **sdxl_parts())


def sdxl_low(dtype: torch.dtype) -> Callable[[], Any]:
    """A builder of the pipeline in ``dtype``, with an autoencoder that asks to run in float32."""

    @seeded
    def build() -> Any:
        parts = sdxl_parts() | {"vae": kl_vae(scaling_factor=0.13025, force_upcast=True)}
        return diffusers.StableDiffusionXLPipeline(**parts).to(dtype=dtype)

    return build


@seeded
def flux_kontext() -> Any:
    return diffusers.FluxKontextPipeline(**flux_parts())


@seeded
def flux2_klein() -> Any:
    transformer = diffusers.Flux2Transformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        timestep_guidance_channels=16,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=False,
    )
    vae = diffusers.AutoencoderKLFlux2(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=16,
    )
    return diffusers.Flux2KleinPipeline(
        transformer=fill(transformer),
        vae=fill(vae),
        text_encoder=text.qwen3_text(),
        tokenizer=text.qwen_tokenizer(),
        scheduler=flow(use_dynamic_shifting=True),
    )


def pixart_transformer(kind: Callable[..., Any], **settings: Any) -> Any:
    base = {
        "sample_size": 8,
        "num_layers": 2,
        "patch_size": 2,
        "attention_head_dim": 8,
        "num_attention_heads": 3,
        "caption_channels": 32,
        "in_channels": 4,
        "cross_attention_dim": 24,
        "out_channels": 8,
        "attention_bias": True,
        "activation_fn": "gelu-approximate",
        "num_embeds_ada_norm": 1000,
        "norm_type": "ada_norm_single",
        "norm_elementwise_affine": False,
        "norm_eps": 1e-6,
    }
    return fill(kind(**(base | settings)))


@seeded
def pixart_sigma() -> Any:
    return diffusers.PixArtSigmaPipeline(
        transformer=pixart_transformer(diffusers.PixArtTransformer2DModel),
        vae=kl_vae(),
        text_encoder=text.t5_text(),
        tokenizer=text.t5_tokenizer(),
        scheduler=diffusers.DPMSolverMultistepScheduler(),
    )


@seeded
def sana() -> Any:
    transformer = diffusers.SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=8,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=16,
        sample_size=8,
    )
    vae = diffusers.AutoencoderDC(
        latent_channels=4,
        attention_head_dim=4,
        encoder_block_types=("ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        encoder_qkv_multiscales=((), (5,)),
        decoder_qkv_multiscales=((), (5,)),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        downsample_block_type="conv",
        upsample_block_type="interpolate",
        scaling_factor=0.41,
    )
    return diffusers.SanaPipeline(
        transformer=fill(transformer),
        vae=fill(vae),
        text_encoder=text.gemma_text(),
        tokenizer=text.gemma_tokenizer(),
        scheduler=flow(),
    )


@seeded
def lumina2() -> Any:
    transformer = diffusers.Lumina2Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        hidden_size=24,
        num_layers=2,
        num_refiner_layers=1,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=8,
        axes_dim_rope=(4, 4, 4),
        axes_lens=(128, 32, 32),
        cap_feat_dim=16,
    )
    return diffusers.Lumina2Pipeline(
        transformer=fill(transformer),
        vae=deep_vae(scaling_factor=1.5, shift_factor=0.06),
        text_encoder=text.gemma_text(),
        tokenizer=text.gemma_tokenizer(),
        scheduler=flow(),
    )


@seeded
def aura_flow() -> Any:
    transformer = diffusers.AuraFlowTransformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_mmdit_layers=1,
        num_single_dit_layers=1,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=32,
        caption_projection_dim=32,
        pos_embed_max_size=64,
    )
    return diffusers.AuraFlowPipeline(
        transformer=fill(transformer),
        vae=kl_vae(scaling_factor=0.13025),
        text_encoder=text.umt5_text(),
        tokenizer=text.t5_tokenizer(),
        scheduler=flow(shift=1.73),
    )


@seeded
def chroma() -> Any:
    transformer = diffusers.ChromaTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        axes_dims_rope=(4, 4, 8),
        approximator_num_channels=16,
        approximator_hidden_dim=32,
        approximator_layers=1,
    )
    return diffusers.ChromaPipeline(
        transformer=fill(transformer),
        vae=flow_vae(),
        text_encoder=text.t5_text(),
        tokenizer=text.t5_tokenizer(),
        scheduler=flow(use_dynamic_shifting=True),
    )


@seeded
def qwen_image_edit() -> Any:
    # The pipeline makes a million pixels of any picture: this autoencoder shrinks each side by 32.
    vae = diffusers.AutoencoderKLQwenImage(
        base_dim=2,
        z_dim=4,
        dim_mult=[1, 1, 2, 2, 4, 4],
        num_res_blocks=1,
        temperal_downsample=[False, False, False, False, True],
        latents_mean=[0.1, -0.1, 0.2, 0.0],
        latents_std=[1.2, 0.9, 1.1, 1.0],
    )
    parts = qwen_image_parts() | {"vae": fill(vae)}
    return diffusers.QwenImageEditPipeline(processor=text.qwen_vl_processor(parts["tokenizer"]), **parts)


@seeded
def z_image() -> Any:
    transformer = diffusers.ZImageTransformer2DModel(
        in_channels=4,
        dim=32,
        n_layers=1,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=16,
        axes_dims=[8, 4, 4],
        axes_lens=[256, 32, 32],
    )
    return diffusers.ZImagePipeline(
        transformer=fill(transformer),
        vae=flow_vae(),
        text_encoder=text.qwen3_text(head=False),
        tokenizer=text.qwen_tokenizer(),
        scheduler=flow(),
    )


@seeded
def hunyuan_dit() -> Any:
    transformer = diffusers.HunyuanDiT2DModel(
        sample_size=4,
        num_layers=2,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=3,
        in_channels=4,
        cross_attention_dim=16,
        cross_attention_dim_t5=32,
        pooled_projection_dim=16,
        hidden_size=24,
        activation_fn="gelu-approximate",
    )
    return diffusers.HunyuanDiTPipeline(
        transformer=fill(transformer),
        vae=deep_vae(),
        text_encoder=text.bert_text(length=77),
        tokenizer=text.bert_tokenizer(77),
        text_encoder_2=text.t5_text(),
        tokenizer_2=text.t5_tokenizer(),
        scheduler=diffusers.DDPMScheduler(
            beta_start=0.00085, beta_end=0.018, prediction_type="v_prediction", steps_offset=1
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


@seeded
def dit() -> Any:
    transformer = diffusers.DiTTransformer2DModel(
        sample_size=8,
        num_layers=2,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=2,
        in_channels=4,
        out_channels=8,
        num_embeds_ada_norm=1000,
    )
    return diffusers.DiTPipeline(transformer=fill(transformer), vae=kl_vae(), scheduler=ddim())


@seeded
def ddpm() -> Any:
    unet = diffusers.UNet2DModel(
        sample_size=16,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=8,
        norm_num_groups=4,
    )
    return diffusers.DDPMPipeline(unet=fill(unet), scheduler=diffusers.DDPMScheduler())


def of_picture(**more: Any) -> dict[str, Any]:
    """A call of a pipeline that takes its size from the picture it starts from."""
    return {
        "prompt": PROMPT,
        "image": picture(),
        "num_inference_steps": 3,
        "strength": 0.8,
        "output_type": "np",
        **more,
    }


WIDER = {"width": 24}
WIDER_PICTURE = {"image": picture(16, 24)}
WIDER_INPAINT = {"width": 24, "image": picture(16, 24), "mask_image": mask(16, 24)}

MORE_IMAGE_FAMILIES = (
    Family(
        "sd15_img2img",
        sd15_img2img,
        of_picture(guidance_scale=7.5),
        "unet",
        vary(**CFG, size=WIDER_PICTURE, steps=5),
        to_euler,
    ),
    Family(
        "sd15_inpaint",
        sd15_inpaint,
        call(guidance_scale=7.5, image=picture(), mask_image=mask()),
        "unet",
        vary(**CFG, size=WIDER_INPAINT),
        to_euler,
    ),
    Family(
        "sdxl_img2img",
        sdxl_img2img,
        of_picture(guidance_scale=5.0),
        "unet",
        vary(**CFG, size=WIDER_PICTURE, steps=5),
        to_dpm_solver,
    ),
    Family(
        "sdxl_inpaint",
        sdxl_inpaint,
        call(guidance_scale=5.0, image=picture(), mask_image=mask(), strength=0.99, num_inference_steps=3),
        "unet",
        vary(**CFG, size=WIDER_INPAINT),
        to_dpm_solver,
    ),
    Family(
        "sdxl_controlnet",
        sdxl_controlnet,
        call(guidance_scale=5.0, image=picture()),
        "unet",
        vary(**CFG, size=WIDER | WIDER_PICTURE),
        to_dpm_solver,
    ),
    Family(
        "sdxl_t2i_adapter",
        sdxl_t2i_adapter,
        call(guidance_scale=5.0, image=picture()),
        "unet",
        vary(
            **CFG,
            size=WIDER | WIDER_PICTURE,
            batch={"prompt": [PROMPT, OTHER_PROMPT], "image": [picture(), picture()]},
            without=("callback",),
        ),
        to_dpm_solver,
    ),
    Family(
        "sdxl_float16",
        sdxl_low(torch.float16),
        call(guidance_scale=5.0),
        "unet",
        vary(**CFG, size=WIDER),
        to_dpm_solver,
        "float16",
    ),
    Family(
        "sdxl_bfloat16",
        sdxl_low(torch.bfloat16),
        call(guidance_scale=5.0),
        "unet",
        vary(**CFG, size=WIDER),
        to_dpm_solver,
        "bfloat16",
    ),
    Family(
        "flux_kontext",
        flux_kontext,
        call(guidance_scale=2.5, max_sequence_length=16, image=picture(), max_area=256, _auto_resize=False),
        "transformer",
        vary(
            guidance={"guidance_scale": 1.5},
            negative={"negative_prompt": "a dog", "true_cfg_scale": 2.0},
            size={"width": 32, "max_area": 512, "image": picture(16, 32)},
        ),
        to_flow_unipc,
    ),
    Family(
        "flux2_klein",
        flux2_klein,
        call(guidance_scale=4.0, max_sequence_length=64, text_encoder_out_layers=(1, 2)),
        "transformer",
        vary(guidance={"guidance_scale": 2.5}, no_guidance={"guidance_scale": 1.0}, size=WIDER),
        to_flow_unipc,
    ),
    Family(
        "pixart_sigma",
        pixart_sigma,
        call(guidance_scale=4.5, max_sequence_length=16, clean_caption=False, use_resolution_binning=False),
        "transformer",
        vary(**CFG, size=WIDER, without=("callback",)),
        lambda pipe: diffusers.DDIMScheduler.from_config(pipe.scheduler.config),
    ),
    Family(
        "sana",
        sana,
        call(
            32,
            32,
            guidance_scale=4.5,
            max_sequence_length=16,
            use_resolution_binning=False,
            complex_human_instruction=None,
        ),
        "transformer",
        vary(**CFG, size={"width": 64}),
        to_flow_unipc,
    ),
    Family(
        "lumina2",
        lumina2,
        call(32, 32, guidance_scale=4.0, max_sequence_length=48, system_prompt="draw"),
        "transformer",
        vary(**CFG, size={"width": 48}),
        to_flow_unipc,
    ),
    Family(
        "aura_flow",
        aura_flow,
        call(guidance_scale=3.5, max_sequence_length=16),
        "transformer",
        vary(**CFG, size=WIDER),
        to_flow_unipc,
    ),
    Family(
        "chroma",
        chroma,
        call(guidance_scale=5.0, max_sequence_length=16),
        "transformer",
        vary(**CFG, size=WIDER),
        to_flow_unipc,
    ),
    Family(
        "qwen_image_edit",
        qwen_image_edit,
        call(128, 128, negative_prompt=" ", true_cfg_scale=4.0, image=picture(32, 32)),
        "transformer",
        vary(
            guidance={"true_cfg_scale": 2.0},
            no_guidance={"negative_prompt": None, "true_cfg_scale": 1.0},
            negative={"negative_prompt": "a dog"},
            size={"width": 192},
            without=("batch_2",),
        ),
        to_flow_unipc,
    ),
    Family(
        "z_image",
        z_image,
        call(guidance_scale=5.0, max_sequence_length=64),
        "transformer",
        vary(
            guidance={"guidance_scale": 2.5},
            no_guidance={"guidance_scale": 0.0},
            negative={"negative_prompt": "a dog"},
            size=WIDER,
        ),
        to_other_shift,
    ),
    Family(
        "hunyuan_dit",
        hunyuan_dit,
        call(32, 32, guidance_scale=5.0, use_resolution_binning=False),
        "transformer",
        vary(**CFG, size={"width": 48}),
        lambda pipe: diffusers.DDIMScheduler.from_config(pipe.scheduler.config),
    ),
    Family(
        "dit",
        dit,
        {"class_labels": [3], "guidance_scale": 4.0, "num_inference_steps": 2, "output_type": "np"},
        "transformer",
        {
            "steps": {"num_inference_steps": 4},
            "guidance": {"guidance_scale": 2.5},
            "no_guidance": {"guidance_scale": 1.0},
            "batch_2": {"class_labels": [3, 7]},
        },
        to_dpm_solver,
    ),
    Family(
        "ddpm",
        ddpm,
        {"batch_size": 1, "num_inference_steps": 3, "output_type": "np"},
        "unet",
        {"steps": {"num_inference_steps": 4}, "batch_2": {"batch_size": 2}},
        lambda pipe: diffusers.DDIMScheduler.from_config(pipe.scheduler.config),
    ),
)
