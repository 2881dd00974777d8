"""The table behind :mod:`pipevault.calls.samples`: the role of each argument of a diffusion pipeline.

A role belongs to a name, whatever the length of its value. It was read from the source of every pipeline of diffusers
0.42, and of Pyramid-Flow; what a pipeline class does otherwise stands in ``_OF_CLASS``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum


class ArgumentKind(Enum):
    """The way in which the values of an argument go with the samples of a call."""

    SHARED = "one value for all samples"
    PROMPT = "one entry for each prompt"
    CONDITION = "one entry for each prompt, in an order of the pipeline's own where prompts are drawn repeatedly"
    CONTROL = "one entry for each prompt, or one for each of several ControlNets or adapters"
    SAMPLE = "one entry for each sample"
    GENERATOR = "one generator for each sample, or one for all"
    REPEATS = "how often each prompt is drawn"
    ENSEMBLE = "how many draws make one result"
    BATCH_SIZE = "how many samples there are, where no prompt says it"
    UNPLACED = "more than one value cannot be placed"


@dataclass(frozen=True)
class Form:
    """The form of one entry: ``item`` its dimensions, ``leaf`` those of a value without a shape, such as a PIL image.

    A value of no more dimensions is a single entry. Without ``item`` every list, array and tensor is a row of entries.
    """

    item: int | None = None
    leaf: int = 0
    one_prompt: bool = False
    """A value that is a single entry is meant for a call about one prompt."""


ROW_OF_ENTRIES = Form()
VECTOR = Form(1)
WAVEFORM = Form(2)
MASK = Form(2, 2)
PICTURE = Form(3, 3)
VIDEO = Form(4, 3)
PICTURES = Form(4, 3, one_prompt=True)
GRID = Form(5, 3)


@dataclass(frozen=True)
class Role:
    kind: ArgumentKind
    form: Form = ROW_OF_ENTRIES


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


PROMPTS = ("prompt", "prompt_2", "prompt_3", "prompt_4")
NEGATIVE_PROMPTS = tuple(f"negative_{name}" for name in PROMPTS)
REPEATS = ("num_images_per_prompt", "num_videos_per_prompt", "num_waveforms_per_prompt")

MARIGOLD = ("MarigoldDepthPipeline", "MarigoldIntrinsicsPipeline", "MarigoldNormalsPipeline")

COUNTED = (
    *("prompt", "task_prompt", "prompt_embeds", "prompt_embeds_qwen", "pooled_prompt_embeds"),
    *("connector_video_embeds", "messages", "input_ids", "class_labels"),
)
"""The arguments that a call is about, in the order of diffusers: the first that is a row of entries counts."""

COUNTED_OF_CLASS: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(MARIGOLD, ("image",)),
    "ConsistencyModelPipeline": (),
    "Kandinsky6SRPipeline": ("video",),
    "KandinskyV22ControlnetImg2ImgPipeline": ("image_embeds",),
    "KandinskyV22ControlnetPipeline": ("image_embeds",),
    "KandinskyV22Img2ImgPipeline": ("image_embeds",),
    "KandinskyV22InpaintPipeline": ("image_embeds",),
    "KandinskyV22Pipeline": ("image_embeds",),
    "LDMSuperResolutionPipeline": ("image",),
    "LTX2LatentUpsamplePipeline": ("latents",),
    "LTX2VideoDiffusionDecodePipeline": ("latents",),
    "LTXLatentUpsamplePipeline": ("latents",),
    "PaintByExamplePipeline": ("image",),
    "RFD4ProteinaPipeline": ("padding_mask",),
    "RePaintPipeline": ("image",),
    "ShapEImg2ImgPipeline": ("image",),
    "StableDiffusionImageVariationPipeline": ("image",),
    "StableUnCLIPImg2ImgPipeline": ("prompt", "prompt_embeds", "image"),
    "StableVideoDiffusionPipeline": ("image",),
    "UnCLIPImageVariationPipeline": ("image", "image_embeddings"),
    "UniDiffuserPipeline": ("prompt", "prompt_embeds", "image"),
    "VersatileDiffusionImageVariationPipeline": ("image",),
}

REPEATED_BY_ENTRIES: Mapping[str, str] = {
    "StableCascadeDecoderPipeline": "image_embeddings",
    "WuerstchenDecoderPipeline": "image_embeddings",
}
"""Pipelines that draw each prompt as often as it has entries of this argument."""

ONE_PROMPT = frozenset(
    {
        "Cosmos3OmniPipeline",  # takes the first prompt of a list
        "DreamLiteMobilePipeline",
        "DreamLitePipeline",
        "FluxPriorReduxPipeline",  # adds its images up
        "LTXI2VLongMultiPromptPipeline",  # prompts are the segments of one video
        "SanaWMLTX2Refiner",
        "SanaWMPipeline",
        "SpectrogramDiffusionPipeline",
        "ValueGuidedRLPipeline",  # a batch are candidates for one plan
    }
)
"""Pipelines whose call is about one prompt, whatever it is given."""

TILED = frozenset({"AmusedImg2ImgPipeline", "AmusedInpaintPipeline", "AmusedPipeline"})
"""Pipelines that draw all prompts once, then all again. The others draw each prompt repeatedly before the next."""

SEVERAL_NETS = _words(
    """
    AnimateDiffControlNetPipeline AnimateDiffVideoToVideoControlNetPipeline FluxControlNetImg2ImgPipeline
    FluxControlNetInpaintPipeline FluxControlNetPipeline HunyuanDiTControlNetPipeline
    QwenImageControlNetInpaintPipeline QwenImageControlNetPipeline StableDiffusion3ControlNetInpaintingPipeline
    StableDiffusion3ControlNetPipeline StableDiffusionAdapterPipeline StableDiffusionControlNetImg2ImgPipeline
    StableDiffusionControlNetInpaintPipeline StableDiffusionControlNetPAGInpaintPipeline
    StableDiffusionControlNetPAGPipeline StableDiffusionControlNetPipeline StableDiffusionXLAdapterPipeline
    StableDiffusionXLControlNetImg2ImgPipeline StableDiffusionXLControlNetInpaintPipeline
    StableDiffusionXLControlNetPAGImg2ImgPipeline StableDiffusionXLControlNetPAGPipeline
    StableDiffusionXLControlNetPipeline
    """
)
"""Pipelines in which a list of control images is one for each net if there are several nets."""

ONE_FOR_EACH_MODE = _words(
    """
    StableDiffusionXLControlNetUnionImg2ImgPipeline StableDiffusionXLControlNetUnionInpaintPipeline
    StableDiffusionXLControlNetUnionPipeline
    """
)
"""Pipelines in which a list of control images is one for each control mode, with one net too."""

ADAPTERS = frozenset({"StableDiffusionAdapterPipeline", "StableDiffusionXLAdapterPipeline"})
"""Pipelines that repeat several control images in an order of their own."""

NETS_WITHIN_PROMPTS = frozenset({"StableDiffusionControlNetPAGPipeline", "StableDiffusionControlNetPipeline"})
"""Pipelines whose nested control images are a list for each prompt; elsewhere they are a list for each net."""


def role_of(name: str, pipeline: str | type = "") -> Role | None:
    """Return the role of the argument ``name`` of a pipeline; ``None`` if the name is known nowhere.

    ``pipeline`` is the class of the pipeline or its name; a class has the roles of its bases.
    """
    classes = class_names(pipeline)
    for cls in classes:
        if cls in _OF_CLASS and name in _OF_CLASS[cls]:
            return _OF_CLASS[cls][name]
    role = _OF_NAME.get(name)
    if role is None or role.kind in (
        ArgumentKind.SHARED,
        ArgumentKind.SAMPLE,
        ArgumentKind.GENERATOR,
        ArgumentKind.REPEATS,
    ):
        return role
    if not ONE_PROMPT.isdisjoint(classes):
        return _SHARED
    if role.kind in (ArgumentKind.CONDITION, ArgumentKind.CONTROL) and any(
        cls.endswith("ModularPipeline") for cls in classes
    ):
        return _UNPLACED  # its blocks say what a list of pictures means, and they can be any
    return role


def class_names(pipeline: str | type) -> tuple[str, ...]:
    """Return the names of a pipeline's class and its bases, nearest first."""
    return (pipeline,) if isinstance(pipeline, str) else tuple(cls.__name__ for cls in pipeline.__mro__)


_SHARED, _UNPLACED = Role(ArgumentKind.SHARED), Role(ArgumentKind.UNPLACED)
_PROMPT, _CONDITION = Role(ArgumentKind.PROMPT), Role(ArgumentKind.CONDITION)


def _named(role: Role, names: str) -> dict[str, Role]:
    return dict.fromkeys(names.split(), role)


_OF_NAME: Mapping[str, Role] = {
    **dict.fromkeys((*PROMPTS, *NEGATIVE_PROMPTS), _PROMPT),
    **dict.fromkeys(REPEATS, Role(ArgumentKind.REPEATS)),
    **_named(Role(ArgumentKind.REPEATS), "num_prompts_per_image num_designs_per_prompt"),
    **_named(Role(ArgumentKind.BATCH_SIZE), "batch_size"),
    **_named(Role(ArgumentKind.GENERATOR), "generator"),
    **_named(
        Role(ArgumentKind.SAMPLE),
        """
        latents prior_latents decoder_latents super_res_latents audio_latents sound_latents action_latents
        latents_bb_ca latents_local_latents noise encoding
        """,
    ),
    **_named(
        _PROMPT,
        """
        audio_codes class_labels content_prompt lyrics neg_prompt source_negative_prompt source_prompt
        source_subject_category target_negative_prompt target_prompt target_subject_category task_prompt transcription
        vocal_language
        prompt_embeds prompt_embeds_2 prompt_embeds_clip prompt_embeds_mask prompt_embeds_mask_2 prompt_embeds_pooled
        prompt_embeds_qwen prompt_embeds_t5 pooled_prompt_embeds prompt_attention_mask prompt_attention_mask_2
        negative_prompt_embeds negative_prompt_embeds_2 negative_prompt_embeds_clip negative_prompt_embeds_mask
        negative_prompt_embeds_mask_2 negative_prompt_embeds_pooled negative_prompt_embeds_qwen
        negative_prompt_embeds_t5 negative_pooled_prompt_embeds negative_prompt_attention_mask
        negative_prompt_attention_mask_2 negative_attention_mask negative_encoder_attention_mask
        negative_encoder_hidden_states negative_generated_prompt_embeds generated_prompt_embeds encoder_attention_mask
        encoder_hidden_states connector_audio_embeds connector_video_embeds source_negative_prompt_embeds
        source_prompt_embeds target_negative_prompt_embeds target_prompt_embeds
        prior_token_ids prior_token_image_ids source_image_grid_thw
        padding_mask is_in_context_conditioning supports_local_latent token_type atom37_mask coords_nm
        """,
    ),
    **_named(
        Role(ArgumentKind.PROMPT, VECTOR),
        "attention_mask image_embeds negative_image_embeds image_embeddings input_ids",
    ),
    **_named(Role(ArgumentKind.PROMPT, VECTOR), "messages token_indices"),
    **_named(Role(ArgumentKind.PROMPT, PICTURE), "condtioning_image hint"),
    **_named(Role(ArgumentKind.PROMPT, MASK), "control_mask"),
    **_named(Role(ArgumentKind.PROMPT, PICTURES), "images input_images reference_images"),
    **_named(Role(ArgumentKind.CONTROL, PICTURE), "control_image"),
    **_named(Role(ArgumentKind.CONTROL, VIDEO), "conditioning_frames"),
    **_named(
        Role(ArgumentKind.CONDITION, PICTURE),
        "cond_image example_image image image_reference last_image original_image reference_image",
    ),
    **_named(Role(ArgumentKind.CONDITION, MASK), "depth_map mask mask_image"),
    **_named(
        Role(ArgumentKind.CONDITION, VIDEO),
        """
        control_camera_video control_video control_video_latents controls mask_video masked_video_latents ref_image
        video
        """,
    ),
    **_named(Role(ArgumentKind.CONDITION, WAVEFORM), "src_audio"),
    **_named(
        _CONDITION,
        """
        audio controlnet_pooled_projections decode_noise_scale decode_timestep initial_audio_waveforms
        masked_image_latents
        """,
    ),
    **_named(
        _UNPLACED,
        """
        audio_duration audio_end_in_s audio_start_in_s bpm clip_latents conditioning_attention_mask
        conditioning_features duration fake_image_latents guidance_keyframe_latents guidance_latents id_cond
        id_vit_hidden image_latents images_and_prompts keyframes_latents keyscale kps_cond last_image_latents
        negative_index_latents negative_prompt_cu_seqlens negative_prompt_embeds_llama3 prompt_cu_seqlens
        prompt_embeds_llama3 prompt_latents raw_audio reference_latents sana_latent sem_guidance state
        text_attention_mask text_images text_model_output timesignature vae_latents video_latents
        """,
    ),
    **_named(
        _SHARED,
        """
        _auto_resize action adain_factor adapter_conditioning_factor adapter_conditioning_scale add_duration_template
        add_generation_prompt add_noise_to_image_latents add_noise_to_video_latents add_predicted_noise
        add_resolution_template addnoise_condition aesthetic_score ar_step attention_kwargs attn_res attn_store_steps
        audio_cover_strength audio_duration_s audio_file audio_guidance_rescale audio_guidance_scale
        audio_length_in_s audio_modality_scale audio_stg_scale augment_sigma background_video base_num_frames
        block_length block_size c2w cache_implementation callback callback_on_step_end
        callback_on_step_end_tensor_inputs callback_steps caption_upsample_temperature causal_block_size
        cfg_interval_end cfg_interval_start cfg_normalization cfg_normalize cfg_renorm_min cfg_trunc_ratio
        cfg_truncation chi_prompt chunk_partition circular_padding clean_caption clip_skip clip_value
        complete_track_classes complex_human_instruction cond_strength condition_frame_indexes_vision
        condition_num_frames condition_video_keep conditional_frame_timestep conditioning_attention_strength
        conditioning_scale conditions confidence_threshold control_guidance_end control_guidance_start control_mode
        controlnet_conditioning_scale controlnet_frame_indices controls_conditioning_scale crops_coords_top_left
        cross_attention_guidance_amount cross_attention_kwargs data_type debug decode_chunk_size
        decode_horizontal_tiles decode_latents decode_overlap decode_vertical_tiles decoder_guidance_scale
        decoder_num_inference_steps decoder_timesteps denoise_strength denoising_end denoising_start denormalize device
        distilled_guidance_scale do_patching edit_cooldown_steps edit_guidance_scale edit_mom_beta edit_momentum_scale
        edit_threshold edit_warmup_steps edit_weights editing_pooled_prompt_embeds editing_prompt
        editing_prompt_embeddings editing_prompt_embeds editing_threshold enable_cfg_renorm enable_denormalization
        enable_prompt_enhancement enable_prompt_rewrite enable_safety_check enable_sound enable_temporal_attentions
        enable_temporal_reasoning enforce_inference_steps ensemble_size ensembling_kwargs eos_early_stop eos_token_id
        eta expand_prompts face_video fonts fps frame_ids frame_index frame_rate frame_size frames freeze_audio
        gen_length generate_slots gligen_boxes gligen_images gligen_inpaint_image gligen_normalize_constant
        gligen_phrases gligen_scheduled_sampling_beta guess_mode guidance_keyframe_positions
        guidance_keyframe_strength guidance_rescale guidance_scale guidance_scale_2 guidance_schedule guiding_strength
        height history_sizes image_cond_noise_scale image_crf image_embed_interleave image_guidance_scale
        image_noise_sigma_max image_noise_sigma_min img_guidance_scale init_noise_level initial_audio_sampling_rate
        inpaint_strength input_frames_guidance input_images_mask input_phrases_mask input_tokens instruction
        intermediate_timesteps intrinsics inverse_folding ip_adapter_image ip_adapter_image_embeds
        is_amplify_first_chunk is_skip_first_chunk joint_attention_kwargs jump_length jump_n_sample keep_first_frame
        keyframe_positions kv_max_frames lambda_auto_corr lambda_kl latent_window_size latents_normalized layers
        logsnr_max logsnr_min lq_noise_scale mask_encode_strength mask_end_seconds mask_end_secs mask_feature
        mask_start_seconds mask_start_secs mask_thresholding_ratio mask_token_id match_input_resolution max_area
        max_guidance_scale max_input_image_size max_iter_to_alter max_lyric_length max_new_tokens max_post_steps
        max_seconds max_sequence_length max_text_length max_timesteps micro_conditioning_aesthetic_score
        micro_conditioning_crop_coord min_guidance_scale min_overlap min_seconds minimal_topk
        mixed_precision_first_steps mixed_precision_format mixed_precision_last_steps mixed_precision_reasoner_policy
        modality_scale mode motion_bucket_id motion_encode_batch_size motion_field_strength_x motion_field_strength_y
        motion_scale motion_speed mu n_guide_steps negative_aesthetic_score negative_crops_coords_top_left
        negative_index_strength negative_ip_adapter_image negative_ip_adapter_image_embeds negative_original_size
        negative_prior_prompt negative_target_size noise_aug_strength noise_level noise_scale normalize
        num_ar_conditional_frames num_ar_latent_conditional_frames num_auto_corr_rolls num_frames num_frames_per_chunk
        num_inference_steps num_latent_conditional_frames num_latent_frames_per_chunk num_maps_per_mask num_reg_steps
        num_temporal_reasoning_steps obs original_inference_steps original_size output output_latent
        output_resolution output_type output_uncertainty overlap_history padding_mask_crop pag_adaptive_scale
        pag_scale parallel partial_t_bb_ca partial_t_local_latents planning_horizon pooled_prompt_embeds_scale
        pose_video prev_segment_conditioning_frames prior_callback_on_step_end
        prior_callback_on_step_end_tensor_inputs prior_guidance_scale prior_num_inference_steps prior_timesteps
        processing_resolution prompt_embeds_scale prompt_enhancement_kwargs prompt_enhancement_seed
        prompt_max_new_tokens prompt_reps prompt_segments prompt_strength prompt_template prompt_upsampling
        prompt_upsampling_temperature proportional_attn pyramid_num_inference_steps_list reference_audio
        reference_conditions reference_downscale_factor render_text_images repainting_end repainting_start
        resample_method_input resample_method_output resolution resolution_scale return_dict return_index
        reverse_editing_direction round_index sag_scale sample_audio sampling_method sampling_type scale scale_factor
        scaling_watershed seed segment_frame_length shift sigma_conditioning sigmas silence_padding_duration sink_size
        skip_guidance_layers skip_layer_guidance_scale skip_layer_guidance_start skip_layer_guidance_stop
        skip_steps_sigma_threshold skip_text_cleaning sld_guidance_scale sld_mom_beta sld_momentum_scale sld_threshold
        sld_warmup_steps slice source_embeds source_guidance_scale source_seconds spatial_patch_size
        spatio_temporal_guidance_blocks stability_threshold start_step std step_generator steps stg_scale
        store_averaged_over_steps strength super_res_num_inference_steps system_prompt t0 t1 target_embeds target_fps
        target_size task_type temperature temporal_overlap temporal_overlap_cond_strength temporal_patch_size
        temporal_tile_size text_encoder_out_layers text_pad_embedding text_to_image_strength threshold thresholds
        tiles_batch_size timesteps tokenizer_max_length tolerance tone_map_compression_ratio top_k top_p track_name
        true_cfg_scale truncation_rate upsampling_height upsampling_strength upsampling_width use_chat_template
        use_clipped_model_output use_cross_attn_mask use_cross_timestep use_dynamic_cfg use_en_prompt
        use_input_image_size_as_output use_intersect_mask use_kv_cache use_mean_velocity use_pe
        use_resolution_binning use_system_prompt use_zero_init user_mask vae_batch_size video_length
        video_noise_sigma_max video_noise_sigma_min video_tiles view_batch_size weights width zero_steps
        """,
    ),
}


def _of_classes(names: str, roles: Mapping[str, Role]) -> dict[str, Mapping[str, Role]]:
    return {name: roles for name in names.split()}


_OF_CLASS: Mapping[str, Mapping[str, Role]] = {
    **_of_classes(
        " ".join(MARIGOLD),
        {
            "batch_size": _SHARED,  # how many draws run at once
            "ensemble_size": Role(ArgumentKind.ENSEMBLE),
            "latents": _UNPLACED,
        },
    ),
    # Their images are references for every prompt.
    **_of_classes(
        """
        BriaFibo2Pipeline BriaFiboEditPipeline Flux2KleinKVPipeline Flux2KleinPipeline Flux2Pipeline
        QwenImage21Pipeline QwenImageEditPlusPipeline ZImageOmniPipeline
        """,
        {"image": _SHARED, "mask": _SHARED},
    ),
    **_of_classes(
        """
        StableDiffusionAdapterPipeline StableDiffusionControlNetPAGPipeline StableDiffusionControlNetPipeline
        StableDiffusionControlNetXSPipeline StableDiffusionXLAdapterPipeline StableDiffusionXLControlNetPAGPipeline
        StableDiffusionXLControlNetPipeline StableDiffusionXLControlNetXSPipeline
        """,
        {"image": Role(ArgumentKind.CONTROL, PICTURE)},
    ),
    **_of_classes(
        """
        IFImg2ImgPipeline IFImg2ImgSuperResolutionPipeline IFInpaintingPipeline IFInpaintingSuperResolutionPipeline
        IFSuperResolutionPipeline
        """,
        {
            "image": Role(ArgumentKind.PROMPT, PICTURE),
            "mask_image": Role(ArgumentKind.PROMPT, MASK),
            "original_image": Role(ArgumentKind.PROMPT, PICTURE),
        },
    ),
    # One set of embeddings, which they repeat for every prompt; with a last image it has two rows.
    **_of_classes(
        """
        ChronoEditPipeline SkyReelsV2DiffusionForcingImageToVideoPipeline SkyReelsV2ImageToVideoPipeline
        WanAnimatePipeline WanImageToVideoPipeline
        """,
        {"image_embeds": _SHARED},
    ),
    **_of_classes(
        "StableCascadeCombinedPipeline StableCascadePriorPipeline", {"images": _SHARED, "image_embeds": _SHARED}
    ),
    **_of_classes(
        "StableCascadeDecoderPipeline WuerstchenDecoderPipeline", {"image_embeddings": Role(ArgumentKind.SAMPLE)}
    ),
    **_of_classes("VisualClozeGenerationPipeline VisualClozePipeline", {"image": Role(ArgumentKind.PROMPT, GRID)}),
    "AnimateDiffSparseControlNetPipeline": {"conditioning_frames": _SHARED},
    "GlmImagePipeline": {"image": Role(ArgumentKind.PROMPT, PICTURES)},
    "KandinskyV22PriorEmb2EmbPipeline": {"image": _PROMPT},
    "LDMSuperResolutionPipeline": {"batch_size": _SHARED},
    "LTXConditionPipeline": {"image": _SHARED, "video": _SHARED},
    "PyramidDiTForVideoGeneration": {"video_num_inference_steps": _SHARED},
    "StableAudio3InpaintPipeline": {"mask": _CONDITION},
    "UniDiffuserPipeline": {"latents": _UNPLACED},
    "WanVACEPipeline": {"mask": Role(ArgumentKind.CONDITION, VIDEO)},
}
