"""The table behind :mod:`pipevault.calls.samples`: the role of each argument of a diffusion pipeline.

A role belongs to a name, whatever the length of its value. It was read from the source of every pipeline of diffusers
0.42, and of Pyramid-Flow; what a pipeline class does otherwise stands in ``_OF_CLASS``. Names that only ever have a
single value (``height``) are left out: one value is for all samples whatever its name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import TypeVar

Value = TypeVar("Value")


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
    UNPLACED = "one value for all samples; several cannot be placed"


@dataclass(frozen=True)
class Form:
    """The form of one entry: ``item`` its dimensions, ``leaf`` those of a value without a shape, such as a PIL image. A
    value of no more dimensions is a single entry. Without ``item`` every list, array and tensor is a row of entries.
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


def _table(*rows: tuple[str, Value]) -> dict[str, Value]:
    """The value of each word of a row."""
    return {word: value for words, value in rows for word in words.split()}


PROMPTS = ("prompt", "prompt_2", "prompt_3", "prompt_4")
NEGATIVE_PROMPTS = tuple(f"negative_{name}" for name in PROMPTS)
REPEATS = ("num_images_per_prompt", "num_videos_per_prompt", "num_waveforms_per_prompt")

MARIGOLD = ("MarigoldDepthPipeline", "MarigoldIntrinsicsPipeline", "MarigoldNormalsPipeline")

COUNTED = (
    *("prompt", "task_prompt", "prompt_embeds", "prompt_embeds_qwen", "pooled_prompt_embeds"),
    *("connector_video_embeds", "messages", "input_ids", "class_labels"),
)
"""The arguments that a call is about, in the order of diffusers: the first that is a row of entries counts."""

COUNTED_OF_CLASS: Mapping[str, tuple[str, ...]] = _table(
    (
        """
        LDMSuperResolutionPipeline MarigoldDepthPipeline MarigoldIntrinsicsPipeline MarigoldNormalsPipeline
        PaintByExamplePipeline RePaintPipeline ShapEImg2ImgPipeline StableDiffusionImageVariationPipeline
        StableVideoDiffusionPipeline VersatileDiffusionImageVariationPipeline
        """,
        ("image",),
    ),
    (
        """
        KandinskyV22ControlnetImg2ImgPipeline KandinskyV22ControlnetPipeline KandinskyV22Img2ImgPipeline
        KandinskyV22InpaintPipeline KandinskyV22Pipeline
        """,
        ("image_embeds",),
    ),
    ("LTX2LatentUpsamplePipeline LTX2VideoDiffusionDecodePipeline LTXLatentUpsamplePipeline", ("latents",)),
    ("StableUnCLIPImg2ImgPipeline UniDiffuserPipeline", ("prompt", "prompt_embeds", "image")),
    ("ConsistencyModelPipeline", ()),
    ("Kandinsky6SRPipeline", ("video",)),
    ("RFD4ProteinaPipeline", ("padding_mask",)),
    ("UnCLIPImageVariationPipeline", ("image", "image_embeddings")),
)

REPEATED_BY_EMBEDDINGS = frozenset({"StableCascadeDecoderPipeline", "WuerstchenDecoderPipeline"})
"""Pipelines that draw each prompt as often as it has entries of ``image_embeddings``."""

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

ONE_FOR_EACH_MODE = frozenset(
    {
        "StableDiffusionXLControlNetUnionImg2ImgPipeline",
        "StableDiffusionXLControlNetUnionInpaintPipeline",
        "StableDiffusionXLControlNetUnionPipeline",
    }
)
"""Pipelines in which a list of control images is one for each control mode, with one net too."""

ADAPTERS = frozenset({"StableDiffusionAdapterPipeline", "StableDiffusionXLAdapterPipeline"})
"""Pipelines that repeat several control images in an order of their own."""

NETS_WITHIN_PROMPTS = frozenset({"StableDiffusionControlNetPAGPipeline", "StableDiffusionControlNetPipeline"})
"""Pipelines whose nested control images are a list for each prompt; elsewhere they are a list for each net."""


def role_of(name: str, pipeline: str | type = "") -> Role:
    """Return the role of the argument ``name`` of a pipeline, given as its class, which has the roles of its bases, or
    by name. ``UNPLACED`` if the name stands in no table.
    """
    classes = class_names(pipeline)
    for cls in classes:
        if name in _OF_CLASS.get(cls, {}):
            return _OF_CLASS[cls][name]
    role = _OF_NAME.get(name, _UNPLACED)
    if role.kind in (ArgumentKind.PROMPT, ArgumentKind.CONDITION, ArgumentKind.CONTROL, ArgumentKind.BATCH_SIZE):
        if not ONE_PROMPT.isdisjoint(classes):
            return _SHARED
        is_picture = role.kind in (ArgumentKind.CONDITION, ArgumentKind.CONTROL)
        if is_picture and any(cls.endswith("ModularPipeline") for cls in classes):
            return _UNPLACED  # its blocks say what a list of pictures means, and they can be any
    return role


def class_names(pipeline: str | type) -> tuple[str, ...]:
    """Return the names of a pipeline's class and its bases, nearest first."""
    return (pipeline,) if isinstance(pipeline, str) else tuple(cls.__name__ for cls in pipeline.__mro__)


_SHARED, _UNPLACED = Role(ArgumentKind.SHARED), Role(ArgumentKind.UNPLACED)
_PROMPT, _CONDITION = Role(ArgumentKind.PROMPT), Role(ArgumentKind.CONDITION)

_OF_NAME: Mapping[str, Role] = _table(
    (" ".join((*PROMPTS, *NEGATIVE_PROMPTS)), _PROMPT),
    (" ".join((*REPEATS, "num_prompts_per_image", "num_designs_per_prompt")), Role(ArgumentKind.REPEATS)),
    ("batch_size", Role(ArgumentKind.BATCH_SIZE)),
    ("generator", Role(ArgumentKind.GENERATOR)),
    (
        """
        latents prior_latents decoder_latents super_res_latents audio_latents sound_latents action_latents
        latents_bb_ca latents_local_latents noise encoding
        """,
        Role(ArgumentKind.SAMPLE),
    ),
    (
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
        _PROMPT,
    ),
    (
        "attention_mask image_embeds image_embeddings input_ids messages negative_image_embeds token_indices",
        Role(ArgumentKind.PROMPT, VECTOR),
    ),
    ("condtioning_image hint", Role(ArgumentKind.PROMPT, PICTURE)),
    ("control_mask", Role(ArgumentKind.PROMPT, MASK)),
    ("images input_images reference_images", Role(ArgumentKind.PROMPT, PICTURES)),
    ("control_image", Role(ArgumentKind.CONTROL, PICTURE)),
    ("conditioning_frames", Role(ArgumentKind.CONTROL, VIDEO)),
    (
        "cond_image example_image image image_reference last_image original_image reference_image",
        Role(ArgumentKind.CONDITION, PICTURE),
    ),
    ("depth_map mask mask_image", Role(ArgumentKind.CONDITION, MASK)),
    (
        """
        control_camera_video control_video control_video_latents controls mask_video masked_video_latents ref_image
        video
        """,
        Role(ArgumentKind.CONDITION, VIDEO),
    ),
    ("src_audio", Role(ArgumentKind.CONDITION, WAVEFORM)),
    (
        """
        audio controlnet_pooled_projections decode_noise_scale decode_timestep initial_audio_waveforms
        masked_image_latents
        """,
        _CONDITION,
    ),
    (
        """
        adapter_conditioning_scale attention_kwargs attn_res attn_store_steps background_video c2w
        callback_on_step_end_tensor_inputs chi_prompt chunk_partition complete_track_classes complex_human_instruction
        condition_frame_indexes_vision conditioning_scale conditions control_guidance_end control_guidance_start
        control_mode controlnet_conditioning_scale controlnet_frame_indices controls_conditioning_scale
        crops_coords_top_left cross_attention_kwargs decoder_timesteps edit_cooldown_steps edit_guidance_scale
        edit_threshold edit_warmup_steps edit_weights editing_pooled_prompt_embeds editing_prompt
        editing_prompt_embeddings editing_prompt_embeds ensembling_kwargs face_video fonts frame_ids frame_index frames
        gligen_boxes gligen_images gligen_inpaint_image gligen_phrases guidance_keyframe_positions guidance_scale
        guidance_schedule history_sizes initial_audio_sampling_rate input_images_mask input_phrases_mask input_tokens
        intrinsics ip_adapter_image ip_adapter_image_embeds joint_attention_kwargs keyframe_positions mask_end_seconds
        mask_start_seconds micro_conditioning_crop_coord negative_crops_coords_top_left negative_ip_adapter_image
        negative_ip_adapter_image_embeds negative_original_size negative_prior_prompt negative_target_size
        num_inference_steps obs original_size output pooled_prompt_embeds_scale pose_video
        prior_callback_on_step_end_tensor_inputs prior_timesteps prompt_embeds_scale prompt_enhancement_kwargs
        prompt_segments prompt_template pyramid_num_inference_steps_list reference_audio reference_conditions
        reverse_editing_direction scale sigmas skip_guidance_layers source_embeds spatio_temporal_guidance_blocks
        strength target_embeds target_size temperature text_encoder_out_layers text_pad_embedding thresholds timesteps
        true_cfg_scale user_mask video_tiles weights
        """,
        _SHARED,
    ),
)


_OF_CLASS: Mapping[str, Mapping[str, Role]] = _table(
    (
        " ".join(MARIGOLD),
        {
            "batch_size": _SHARED,  # how many draws run at once
            "ensemble_size": Role(ArgumentKind.ENSEMBLE),
            "latents": _UNPLACED,
        },
    ),
    # Their images are references for every prompt.
    (
        """
        BriaFibo2Pipeline BriaFiboEditPipeline Flux2KleinKVPipeline Flux2KleinPipeline Flux2Pipeline
        QwenImage21Pipeline QwenImageEditPlusPipeline ZImageOmniPipeline
        """,
        {"image": _SHARED, "mask": _SHARED},
    ),
    (
        """
        StableDiffusionAdapterPipeline StableDiffusionControlNetPAGPipeline StableDiffusionControlNetPipeline
        StableDiffusionControlNetXSPipeline StableDiffusionXLAdapterPipeline StableDiffusionXLControlNetPAGPipeline
        StableDiffusionXLControlNetPipeline StableDiffusionXLControlNetXSPipeline
        """,
        {"image": Role(ArgumentKind.CONTROL, PICTURE)},
    ),
    (
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
    (
        """
        ChronoEditPipeline SkyReelsV2DiffusionForcingImageToVideoPipeline SkyReelsV2ImageToVideoPipeline
        WanAnimatePipeline WanImageToVideoPipeline
        """,
        {"image_embeds": _SHARED},
    ),
    ("StableCascadeCombinedPipeline StableCascadePriorPipeline", {"images": _SHARED, "image_embeds": _SHARED}),
    (
        "StableCascadeDecoderPipeline WuerstchenDecoderPipeline",
        {"image_embeddings": Role(ArgumentKind.SAMPLE)},
    ),
    ("VisualClozeGenerationPipeline VisualClozePipeline", {"image": Role(ArgumentKind.PROMPT, GRID)}),
    ("AnimateDiffSparseControlNetPipeline", {"conditioning_frames": _SHARED}),
    ("GlmImagePipeline", {"image": Role(ArgumentKind.PROMPT, PICTURES)}),
    ("KandinskyV22PriorEmb2EmbPipeline", {"image": _PROMPT}),
    ("LDMSuperResolutionPipeline", {"batch_size": _SHARED}),
    ("LTXConditionPipeline", {"image": _SHARED, "video": _SHARED}),
    ("PyramidDiTForVideoGeneration", {"video_num_inference_steps": _SHARED}),
    ("StableAudio3InpaintPipeline", {"mask": _CONDITION}),
    ("UniDiffuserPipeline", {"latents": _UNPLACED}),
    ("WanVACEPipeline", {"mask": Role(ArgumentKind.CONDITION, VIDEO)}),
)
