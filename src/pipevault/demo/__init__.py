"""A small real Stable Diffusion pipeline that ships inside the package: it draws the digit that the prompt names.

Importing this module imports neither torch nor diffusers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

MODEL_DIR: Final[Path] = Path(__file__).resolve().parent / "model"
"""Folder of the demo pipeline in diffusers format, for ``StableDiffusionPipeline.from_pretrained``."""

CLASSIFIER_FILE: Final[Path] = Path(__file__).resolve().parent / "classifier.safetensors"
"""Weights of the digit classifier that scores generated images."""

DIGIT_WORDS: Final = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
"""English words for the digits; the index is the digit."""

DEFAULT_STEPS: Final[int] = 12
"""Denoising steps that the demo pipeline needs for legible digits."""

DEFAULT_GUIDANCE_SCALE: Final[float] = 3.0
"""Classifier-free guidance scale that suits the demo pipeline."""


def prompt(digit: int) -> str:
    """Return the prompt for ``digit``, such as ``"a handwritten seven"``; ``ValueError`` unless it is 0 to 9."""
    if not 0 <= digit < len(DIGIT_WORDS):
        raise ValueError(f"digit must be between 0 and 9, not {digit}")
    return f"a handwritten {DIGIT_WORDS[digit]}"


def named_digit(prompt: str) -> int | None:
    """Return the digit whose English word stands in ``prompt``; ``None`` if there is none or more than one."""
    words = "".join(letter if letter.isalpha() else " " for letter in prompt.lower()).split()
    named = {DIGIT_WORDS.index(word) for word in words if word in DIGIT_WORDS}
    return named.pop() if len(named) == 1 else None
