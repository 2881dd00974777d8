"""Scores of the quality of pictures, in tables. What each means stands in the template of a sweep's report.

Some need a model of their own: CLIP score, LPIPS, and the demo's classifier. Nothing here downloads anything.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from PIL import Image, ImageOps

from pipevault.demo import named_digit
from pipevault.errors import MissingExtraError, SettingsError
from pipevault.evidence.metrics import contrast, distance, reduced_luma, sharpness
from pipevault.opening import DEMO_MODEL
from pipevault.settings.user_folders import expand_user

TextScorer: TypeAlias = "Callable[[Sequence[Image.Image], Sequence[str]], list[float]]"
PairMetric: TypeAlias = "Callable[[Any, Any], float | None]"

THUMBNAIL_SIDE_PX = 256
LPIPS_SIDE_PX = 64
"""Smaller pictures are enlarged to this shorter side: AlexNet's pooling leaves nothing of them."""


@dataclass(frozen=True)
class Score:
    """A score. Differences below ``resolution`` are not worth a word. ``of_pairs``: it depends on which seeds there
    are.
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


class Scoring:
    """Scores the pictures of a sweep as they come and keeps of each only a thumbnail and what SSIM needs."""

    def __init__(self, model: str, prompts: Sequence[str], seeds: int, clip: TextScorer | None) -> None:
        self._prompts, shape = prompts, (len(prompts), seeds)
        self._scorers = _picture_scorers(model, prompts, clip)
        self._found: dict[str, Any] = {
            name: scorer if isinstance(scorer, str) else np.full(shape, np.nan)
            for name, scorer in self._scorers.items()
        }
        self._lumas, self.thumbnails = np.empty(shape, object), np.empty(shape, object)

    def add(self, cells: Sequence[tuple[int, int]], pictures: Sequence[Image.Image]) -> None:
        """Score the pictures of these cells: rows (prompts) and columns (seeds)."""
        at = tuple(zip(*cells, strict=True))
        for name, scorer in self._scorers.items():
            if not isinstance(scorer, str):
                self._found[name][at] = scorer(pictures, [self._prompts[row] for row, _ in cells])
        for cell, picture in zip(cells, pictures, strict=True):
            self._lumas[cell], small = reduced_luma(picture), picture.convert("RGB")
            small.thumbnail((THUMBNAIL_SIDE_PX, THUMBNAIL_SIDE_PX), Image.Resampling.LANCZOS)
            self.thumbnails[cell] = small

    def tables(self) -> tuple[dict[str, tuple[tuple[float, ...], ...]], dict[str, str]]:
        """Return the table of each score, and why the others are not available, both in the order of reports."""
        lpips = lpips_metric()
        found = self._found | {
            "similarity": _to_others(self._lumas, lambda one, other: distance(one, other).ssim),
            "lpips": lpips if isinstance(lpips, str) else _to_others(self.thumbnails, lpips),
        }
        tables, missing = {}, {}
        for name in SCORES:
            if isinstance(found[name], str):
                missing[name] = found[name]
            elif not np.isfinite(found[name]).all():
                missing[name] = "some picture has a score that is not finite"
            else:
                tables[name] = as_table(found[name])
        return tables, missing


def as_table(values: Any) -> tuple[tuple[Any, ...], ...]:
    return tuple(map(tuple, values.tolist()))


def _to_others(items: Any, metric: PairMetric) -> Any:
    """Return each picture's mean of a symmetric ``metric`` to the others of its prompt, or why there is none."""
    if items.shape[1] < 2:
        return "it compares seeds, and there is only one"
    sums = np.zeros(items.shape)
    try:
        for row, (i, j) in itertools.product(range(len(items)), itertools.combinations(range(items.shape[1]), 2)):
            if (value := metric(items[row, j], items[row, i])) is None:
                return "it is not defined for pictures with fewer than 3 pixels on a side"
            sums[row, [i, j]] += value
    except MissingExtraError as error:
        return str(error)
    return sums / (items.shape[1] - 1)


def _picture_scorers(model: str, prompts: Sequence[str], clip: TextScorer | None) -> dict[str, TextScorer | str]:
    nameless = [prompt for prompt in prompts if named_digit(prompt) is None]
    digits: TextScorer | str = _digit_confidence
    if model != DEMO_MODEL:
        digits = "the digit classifier knows the demo model's pictures only"
    elif nameless:
        digits = f"the prompt {nameless[0]!r} does not name one digit"
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
    """Return the CLIP score (100 max(cosine, 0), as torchmetrics has it) of pictures with their texts, from a model in
    a folder or in the local hub cache. Texts beyond the model's length are cut. :class:`SettingsError`.
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
    import torch

    if not any((Path(torch.hub.get_dir()) / "checkpoints").glob("alexnet-*.pth")):
        return "torch's hub cache lacks the AlexNet weights that lpips uses; fetch them with lpips.LPIPS(net='alex')"
    network = lpips.LPIPS(net="alex", verbose=False).eval()

    def tensor(image: Image.Image) -> torch.Tensor:  # (1, 3, height, width), 0 to 1
        rgb = image.convert("RGB")
        if min(rgb.size) < LPIPS_SIDE_PX:
            rgb = ImageOps.cover(rgb, (LPIPS_SIDE_PX, LPIPS_SIDE_PX), Image.Resampling.BILINEAR)
        return torch.from_numpy(np.asarray(rgb, dtype=np.float32).transpose(2, 0, 1)[None] / 255.0)

    def metric(first: Image.Image, second: Image.Image) -> float:
        with torch.inference_mode():
            return float(network(tensor(first), tensor(second), normalize=True).item())

    return metric
