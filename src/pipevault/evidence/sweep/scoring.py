"""The scores of a sweep: which are available for a model and its prompts, and their tables.

What each score means stands in the template of the report. Those that need a model of their own are in
:mod:`pipevault.evidence.sweep.model_scores`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from pipevault.demo import named_digit
from pipevault.errors import MissingExtraError
from pipevault.evidence.metrics import contrast, distance, mean_to_others, reduced_luma, sharpness
from pipevault.evidence.sweep.model_scores import TextScorer, lpips_metric
from pipevault.opening import DEMO_MODEL

THUMBNAIL_SIDE_PX = 256


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


class Scoring:
    """Scores the pictures of a sweep as they come and keeps of each only a thumbnail and what SSIM needs.

    ``model`` tells whether the digit classifier applies; ``clip`` comes from
    :func:`~pipevault.evidence.sweep.model_scores.clip_scorer`.
    """

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
            "similarity": _to_others(self._lumas, lambda one, other: distance(one, other, data_range=1.0).ssim),
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
    """Return an array of two dimensions as rows."""
    return tuple(map(tuple, values.tolist()))


def _to_others(items: Any, metric: Any) -> Any:
    """Return each picture's mean to the others of its prompt, or why there is none."""
    if items.shape[1] < 2:
        return "it compares seeds, and there is only one"
    try:
        means = [mean_to_others(row, metric) for row in items]
    except MissingExtraError as error:
        return str(error)
    undefined = "it is not defined for pictures with fewer than 3 pixels on a side"
    return undefined if None in means else np.array(means)


def _picture_scorers(model: str, prompts: Sequence[str], clip: TextScorer | None) -> dict[str, TextScorer | str]:
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
