"""The tables of scores of a sweep."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from pipevault.errors import MissingExtraError
from pipevault.evidence.metrics import distance, mean_to_others, reduced_luma
from pipevault.evidence.quality import SCORES, TextScorer, lpips_metric, picture_scorers

THUMBNAIL_SIDE_PX = 256


class Scoring:
    """Scores the pictures of a sweep as they come and keeps of each only a thumbnail and what SSIM needs.

    ``model`` tells whether the digit classifier applies; ``clip`` comes from
    :func:`~pipevault.evidence.quality.clip_scorer`.
    """

    def __init__(self, model: str, prompts: Sequence[str], seeds: int, clip: TextScorer | None) -> None:
        self._prompts, shape = prompts, (len(prompts), seeds)
        self._scorers = picture_scorers(model, prompts, clip)
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
