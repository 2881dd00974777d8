"""All families of tiny pipelines by their names."""

from __future__ import annotations

from families.audio import AUDIO_FAMILIES
from families.family import Family
from families.image import IMAGE_FAMILIES
from families.image_more import MORE_IMAGE_FAMILIES
from families.video import VIDEO_FAMILIES
from families.video_more import MORE_VIDEO_FAMILIES

__all__ = ["CI_FAMILIES", "FAMILIES", "Family"]

ALL = (*IMAGE_FAMILIES, *VIDEO_FAMILIES, *MORE_IMAGE_FAMILIES, *MORE_VIDEO_FAMILIES, *AUDIO_FAMILIES)
FAMILIES: dict[str, Family] = {family.name: family for family in ALL}

CI_FAMILIES = ("sdxl", "flux", "sd3", "wan", "qwen_image", "cogvideox", "sd_controlnet", "kandinsky22_combined")
