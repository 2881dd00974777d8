"""Scores of the quality of pictures. What each means stands in the template of a sweep's report.

Some need a model of their own: CLIP score, LPIPS, and the demo's classifier. Nothing here downloads anything.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, TypeAlias

from PIL import Image

from pipevault.demo import named_digit
from pipevault.errors import SettingsError
from pipevault.evidence.metrics import contrast, sharpness
from pipevault.opening import DEMO_MODEL
from pipevault.settings.user_folders import expand_user

TextScorer: TypeAlias = "Callable[[Sequence[Image.Image], Sequence[str]], list[float]]"
PairMetric: TypeAlias = "Callable[[Image.Image, Image.Image], float | None]"

LPIPS_SIDE_PX = 64
"""Smaller pictures are enlarged to this shorter side: AlexNet's pooling leaves nothing of them."""


@dataclass(frozen=True)
class Score:
    """A score. Differences below ``resolution`` are not worth a word.

    ``of_pairs``: it compares a picture with those of the other seeds, so it depends on which these are.
    """

    title: str
    unit: str
    resolution: float
    of_pairs: bool = False


SCORES: Mapping[str, Score] = {
    "digit_confidence": Score("Digit confidence", "probability", 0.01),
    "clip_score": Score("CLIP score", "1/100", 0.1),
    "sharpness": Score("Sharpness", "squared luma", 1e-4),
    "contrast": Score("Contrast", "luma", 1e-3),
    "similarity": Score("Similarity to other seeds", "SSIM", 1e-3, of_pairs=True),
    "lpips": Score("LPIPS to other seeds", "LPIPS", 1e-3, of_pairs=True),
}
"""In the order of reports."""


def picture_scorers(model: str, prompts: Sequence[str], clip: TextScorer | None) -> dict[str, TextScorer | str]:
    """Return what scores pictures and their prompts, or why it is not available."""
    nameless = [prompt for prompt in prompts if named_digit(prompt) is None]
    digits: TextScorer | str = _digit_confidence
    if nameless:
        digits = f"the prompt {nameless[0]!r} does not name one digit"
    if model != DEMO_MODEL:
        digits = "the digit classifier knows the demo model's pictures only"
    text: TextScorer | str = clip or "no CLIP model was named: give --clip-model"
    return {
        "digit_confidence": digits,
        "clip_score": "there are no prompts to compare with" if clip and not any(prompts) else text,
        "sharpness": lambda pictures, texts: list(map(sharpness, pictures)),
        "contrast": lambda pictures, texts: list(map(contrast, pictures)),
    }


def _digit_confidence(pictures: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
    from pipevault.demo.classifier import confidences

    return confidences(pictures, [digit for prompt in prompts if (digit := named_digit(prompt)) is not None])


def clip_scorer(model: str) -> TextScorer:
    """Return the CLIP score of pictures with their texts, from a model in a folder or in the local hub cache.

    100 max(cosine, 0), as torchmetrics' ``CLIPScore`` has it. Texts beyond the model's length are cut.
    :class:`SettingsError` if the model cannot be opened.
    """
    import torch
    from transformers import CLIPModel, CLIPProcessor

    where = str(expand_user(model)) if model.startswith("~") else model
    try:
        network = CLIPModel.from_pretrained(where, local_files_only=True).eval()
        processor = CLIPProcessor.from_pretrained(where, local_files_only=True)
    except Exception as error:  # whatever a folder's files provoke in transformers, tokenizers or safetensors
        raise SettingsError(
            f"{model} cannot be opened as a CLIP model: {' '.join(str(error).split())[:200]} Give a folder that "
            "save_pretrained wrote, model and processor, or a repository that the local hub cache holds."
        ) from error

    def score(images: Sequence[Image.Image], texts: Sequence[str]) -> list[float]:
        pictures = [image.convert("RGB") for image in images]
        inputs = processor(text=list(texts), images=pictures, return_tensors="pt", padding=True, truncation=True)
        with torch.inference_mode():
            output = network(**inputs)
            cosines = torch.nn.functional.cosine_similarity(output.image_embeds, output.text_embeds)
        return [100.0 * max(float(cosine), 0.0) for cosine in cosines]

    return score


def lpips_metric() -> PairMetric | str:
    """Return LPIPS between two pictures of one size (0 for equal ones), or why it is not available here."""
    try:
        lpips: Any = import_module("lpips")
    except ImportError:
        return "the package lpips is not installed"
    if not _has_alexnet():
        return "torch's hub cache lacks the AlexNet weights that lpips uses; fetch them with lpips.LPIPS(net='alex')"
    import torch

    network = lpips.LPIPS(net="alex", verbose=False).eval()

    def metric(first: Image.Image, second: Image.Image) -> float:
        with torch.inference_mode():
            return float(network(_tensor(first), _tensor(second), normalize=True).item())

    return metric


def _has_alexnet() -> bool:
    import torch

    return any((Path(torch.hub.get_dir()) / "checkpoints").glob("alexnet-*.pth"))


def _tensor(image: Image.Image) -> Any:
    """Return a picture as (1, 3, height, width), 0 to 1."""
    import numpy as np
    import torch

    factor = max(1.0, LPIPS_SIDE_PX / min(image.size))
    enlarged = image.convert("RGB").resize(
        (round(image.width * factor), round(image.height * factor)), Image.Resampling.BILINEAR
    )
    return torch.from_numpy(np.asarray(enlarged, dtype=np.float32).transpose(2, 0, 1)[None] / 255.0)
