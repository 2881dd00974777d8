"""Scores of a picture: what each means, its unit and range, and those that need no model.

Luma is 0.299 R + 0.587 G + 0.114 B (ITU-R BT.601) of uint8 channels divided by 255, so 0 to 1, as float64 of shape
(height, width). Scores that need a model are in :mod:`pipevault.evidence.sweep.model_scores`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt
from PIL import Image

from pipevault.evidence.metrics import distance

Luma = npt.NDArray[np.float64]
Item = TypeVar("Item")

SIMILARITY_SIDE_PX = 256
_LUMA_WEIGHTS = (0.299, 0.587, 0.114)
_FULL_SCALE = 255.0


@dataclass(frozen=True)
class Score:
    """``lowest`` and ``highest`` bound the score. Differences below ``resolution`` are not worth a word.

    ``of_pairs``: it compares a picture with those of the other seeds, so it depends on which these are.
    """

    name: str
    title: str
    meaning: str
    unit: str
    lowest: float
    highest: float
    resolution: float
    source: str
    of_pairs: bool = False

    @property
    def range_text(self) -> str:
        return f"{self.lowest:g} to {self.highest:g}"


SCORES: Mapping[str, Score] = {
    score.name: score
    for score in (
        Score(
            "digit_confidence",
            "Digit confidence",
            "Probability that the demo's classifier gives to the digit that the prompt names.",
            "probability",
            0.0,
            1.0,
            0.01,
            "pipevault.demo.classifier",
        ),
        Score(
            "clip_score",
            "CLIP score",
            "100 times the cosine of the CLIP embeddings of picture and prompt, at least 0.",
            "1/100",
            0.0,
            100.0,
            0.1,
            "Hessel et al., CLIPScore, EMNLP 2021 (without its factor 2.5)",
        ),
        Score(
            "sharpness",
            "Sharpness",
            "Variance of the Laplacian of the luma: fine detail, and noise.",
            "squared luma",
            0.0,
            16.0,
            1e-4,
            "Pech-Pacheco et al., Diatom autofocusing in brightfield microscopy, ICPR 2000",
        ),
        Score(
            "contrast",
            "Contrast",
            "Standard deviation of the luma (RMS contrast).",
            "luma",
            0.0,
            0.5,
            1e-3,
            "Peli, Contrast in complex images, JOSA A 7(10), 1990",
        ),
        Score(
            "similarity",
            "Similarity to other seeds",
            "Mean SSIM to the pictures of the same prompt with the other seeds; 1 if the seed changes nothing.",
            "SSIM",
            -1.0,
            1.0,
            1e-3,
            "Wang et al., Image quality assessment, IEEE TIP 13(4), 2004; scikit-image",
            of_pairs=True,
        ),
        Score(
            "lpips",
            "LPIPS to other seeds",
            "Mean LPIPS (AlexNet) to the pictures of the same prompt with the other seeds; 0 if nothing changes.",
            "LPIPS",
            0.0,
            float("inf"),
            1e-3,
            "Zhang et al., The Unreasonable Effectiveness of Deep Features, CVPR 2018; package lpips",
            of_pairs=True,
        ),
    )
}
"""By name, in the order of reports. Those of pairs need two seeds or more."""


def luma(image: Image.Image) -> Luma:
    """Of a picture of any mode; transparency is ignored."""
    rgb = np.asarray(image.convert("RGB"), dtype=np.float64)
    return np.asarray(rgb @ np.asarray(_LUMA_WEIGHTS) / _FULL_SCALE, dtype=np.float64)


def sharpness(image: Image.Image) -> float:
    """Variance of the Laplacian of the luma, 0 to 16 in squared luma.

    Kernel [[0, 1, 0], [1, -4, 1], [0, 1, 0]], edge pixels repeated outwards. Depends on the size in pixels: compare
    pictures of one size only. Pech-Pacheco et al., ICPR 2000, https://doi.org/10.1109/ICPR.2000.903548.
    """
    padded = np.pad(luma(image), 1, mode="edge")
    centre = padded[1:-1, 1:-1]
    laplacian = padded[:-2, 1:-1] + padded[2:, 1:-1] + padded[1:-1, :-2] + padded[1:-1, 2:] - 4 * centre
    return float(laplacian.var())


def contrast(image: Image.Image) -> float:
    """RMS contrast: standard deviation of the luma, 0 to 0.5. Peli, JOSA A 7(10), 1990."""
    return float(luma(image).std())


def reduced_luma(image: Image.Image) -> Luma:
    """Luma averaged over blocks of f x f pixels, f = max(1, round(shorter side / 256)), as Wang et al. advise for SSIM.

    https://ece.uwaterloo.ca/~z70wang/research/ssim/. Rows and columns that fill no block are left out.
    """
    values = luma(image)
    factor = max(1, round(min(values.shape) / SIMILARITY_SIDE_PX))
    height, width = (side // factor for side in values.shape)
    blocks = values[: height * factor, : width * factor].reshape(height, factor, width, factor)
    return np.asarray(blocks.mean(axis=(1, 3)), dtype=np.float64)


def ssim(first: Luma, second: Luma) -> float | None:
    """SSIM of two :func:`reduced_luma`, -1 to 1; ``None`` for pictures with fewer than 3 pixels on a side.

    :class:`~pipevault.errors.NotComparableError` for two sizes, :class:`~pipevault.errors.MissingExtraError`.
    """
    return distance(first, second, data_range=1.0).ssim


def mean_to_others(items: Sequence[Item], metric: Callable[[Item, Item], float | None]) -> list[float] | None:
    """For each item the mean of a symmetric ``metric`` to all others; ``None`` if it is undefined for a pair.

    Needs two items or more. The mean over the items is the mean over all pairs.
    """
    count = len(items)
    if count < 2:
        raise ValueError(f"Pairs need two items or more, not {count}.")
    sums = [0.0] * count
    for i in range(count):
        for j in range(i):
            value = metric(items[i], items[j])
            if value is None:
                return None
            sums[i] += value
            sums[j] += value
    return [total / (count - 1) for total in sums]


def picture_scores(image: Image.Image) -> dict[str, float]:
    """The scores that need neither a model nor another picture."""
    return {"sharpness": sharpness(image), "contrast": contrast(image)}
