"""The scores of a sweep: which are available for a model and its prompts, and their tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
from PIL import Image

from pipevault.demo import DIGIT_WORDS
from pipevault.errors import MissingExtraError
from pipevault.evidence.sweep.model_scores import TextScorer, lpips_metric
from pipevault.evidence.sweep.quality import SCORES, mean_to_others, picture_scores, reduced_luma, ssim
from pipevault.opening import DEMO_MODEL

THUMBNAIL_SIDE_PX = 256

Cell: TypeAlias = tuple[int, int]
"""Row (prompt) and column (seed)."""


class Scoring:
    """Scores pictures as they come and keeps of each only a thumbnail and what SSIM needs.

    ``model`` tells whether the digit classifier applies; ``clip`` comes from
    :func:`~pipevault.evidence.sweep.model_scores.clip_scorer`.
    """

    def __init__(self, model: str, prompts: Sequence[str], clip: TextScorer | None) -> None:
        self._prompts = prompts
        self._scorers, self._missing = _picture_scorers(model, prompts, clip)
        self._values: dict[str, dict[Cell, float]] = {}
        self._lumas: dict[Cell, Any] = {}
        self.thumbnails: dict[Cell, Image.Image] = {}

    def add(self, cells: Sequence[Cell], pictures: Sequence[Image.Image]) -> None:
        for name, scorer in self._scorers.items():
            scores = scorer(pictures, [self._prompts[row] for row, _ in cells])
            self._values.setdefault(name, {}).update(zip(cells, scores, strict=True))
        for cell, picture in zip(cells, pictures, strict=True):
            self.thumbnails[cell] = thumbnail(picture)
            self._lumas[cell] = reduced_luma(picture)
            for name, value in picture_scores(picture).items():
                self._values.setdefault(name, {})[cell] = value

    def tables(self, seeds: int) -> tuple[dict[str, tuple[tuple[float, ...], ...]], dict[str, str]]:
        """The table of each score, and why the others are not available, both in the order of :data:`SCORES`."""
        values, missing = dict(self._values), dict(self._missing)
        metric = lpips_metric()
        if isinstance(metric, str):
            missing["lpips"] = metric
        else:
            self._compare("lpips", metric, self.thumbnails, seeds, values, missing)
        self._compare("similarity", ssim, self._lumas, seeds, values, missing)
        for name in [name for name, cells in values.items() if not np.isfinite(list(cells.values())).all()]:
            del values[name]
            missing[name] = "some picture has a score that is not finite"
        tables = {name: as_table(values[name], len(self._prompts), seeds) for name in SCORES if name in values}
        return tables, {name: missing[name] for name in SCORES if name in missing}

    def _compare(
        self,
        name: str,
        metric: Any,
        items: Mapping[Cell, Any],
        seeds: int,
        values: dict[str, dict[Cell, float]],
        missing: dict[str, str],
    ) -> None:
        """Each picture's mean to the others of its prompt."""
        if seeds < 2:
            missing[name] = "it compares seeds, and there is only one"
            return
        found: dict[Cell, float] = {}
        for row in range(len(self._prompts)):
            try:
                means = mean_to_others([items[row, column] for column in range(seeds)], metric)
            except MissingExtraError as error:
                missing[name] = str(error)
                return
            if means is None:
                missing[name] = "it is not defined for pictures with fewer than 3 pixels on a side"
                return
            found |= {(row, column): means[column] for column in range(seeds)}
        values[name] = found


def thumbnail(picture: Image.Image) -> Image.Image:
    """At most :data:`THUMBNAIL_SIDE_PX` on a side; a smaller picture as it is."""
    small = picture.convert("RGB")
    small.thumbnail((THUMBNAIL_SIDE_PX, THUMBNAIL_SIDE_PX), Image.Resampling.LANCZOS)
    return small


def named_digit(prompt: str) -> int | None:
    """The digit whose English word stands in a prompt; ``None`` if there is none or more than one."""
    words = "".join(letter if letter.isalpha() else " " for letter in prompt.lower()).split()
    named = {DIGIT_WORDS.index(word) for word in words if word in DIGIT_WORDS}
    return named.pop() if len(named) == 1 else None


def as_table(cells: Mapping[Cell, Any], rows: int, columns: int) -> tuple[tuple[Any, ...], ...]:
    return tuple(tuple(cells[row, column] for column in range(columns)) for row in range(rows))


def _picture_scorers(
    model: str, prompts: Sequence[str], clip: TextScorer | None
) -> tuple[dict[str, TextScorer], dict[str, str]]:
    """Those that look at one picture and its prompt, and why others are not available."""
    found: dict[str, TextScorer] = {}
    missing: dict[str, str] = {}
    if model != DEMO_MODEL:
        missing["digit_confidence"] = "the digit classifier knows the demo model's pictures only"
    elif nameless := [prompt for prompt in prompts if named_digit(prompt) is None]:
        missing["digit_confidence"] = f"the prompt {nameless[0]!r} does not name one digit"
    else:
        found["digit_confidence"] = _digit_confidence
    if clip is None:
        missing["clip_score"] = "no CLIP model was named: give --clip-model"
    elif not any(prompts):
        missing["clip_score"] = "there are no prompts to compare with"
    else:
        found["clip_score"] = clip
    return found, missing


def _digit_confidence(pictures: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
    from pipevault.demo.classifier import confidences

    digits = [digit for prompt in prompts if (digit := named_digit(prompt)) is not None]
    return confidences(pictures, digits)
