"""Measures of pictures: how far two outputs are apart, in numbers and as a picture; how sharp and how contrasty one is.

Luma is 0.299 R + 0.587 G + 0.114 B (ITU-R BT.601) of uint8 channels divided by 255, so 0 to 1, as float64 of shape
(height, width). SSIM comes from scikit-image, the Laplacian from SciPy (extra ``report``).
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from pipevault.compat.extras import import_extra
from pipevault.errors import NotComparableError

_CHANNELS = (1, 2, 3, 4)
_SSIM_SIDE_PX = 256
_WIDEST_WINDOW_PIXELS, _NARROWEST_WINDOW_PIXELS = 7, 3
"""SSIM's window has 7 pixels on a side as in scikit-image, fewer for a smaller picture."""


@dataclass(frozen=True)
class Distance:
    """A distance. ``differing_share`` is 0 to 1; ``max_abs`` and ``mean_abs`` are in the units of the input.

    ``psnr_db`` is infinite for equal outputs. ``ssim`` is 1 for equal ones and ``None`` where it is not defined: fewer
    than 3 pixels on a side, not an image, or values that are not finite.
    """

    differing_share: float
    max_abs: float
    mean_abs: float
    psnr_db: float
    ssim: float | None

    @property
    def equal(self) -> bool:
        return self.differing_share == 0

    def to_json(self) -> dict[str, float | str | None]:
        """Return plain JSON, in which what is infinite is the text ``inf`` or ``-inf``."""
        values = asdict(self).items()
        return {name: value if value is None or math.isfinite(value) else str(value) for name, value in values}


def distance(a: Any, b: Any) -> Distance:
    """Measure two images or arrays of one shape, both uint8 or both floating.

    Arrays whose last axis has 1 to 4 entries and that have three axes or more are images, (…, height, width, channels);
    two axes are (height, width). There a pixel differs if any of its channels does, and SSIM is the mean over the
    leading axes. The width of the range of values, for PSNR and SSIM, is 255 for uint8 and 1.0 for floats. NaN
    equals NaN and is infinitely far from all else. :class:`NotComparableError`, :class:`MissingExtraError`.
    """
    first, second = _pair(a, b)
    width = 255.0 if first.dtype == np.uint8 else 1.0
    gaps = _gaps(first, second)
    differing = gaps != 0
    differing_share = float((differing.any(axis=-1) if _has_channels(first) else differing).mean())
    mean_square = float(np.square(gaps / width).mean())
    return Distance(
        differing_share=differing_share,
        max_abs=float(gaps.max()),
        mean_abs=float(gaps.mean()),
        psnr_db=math.inf if mean_square == 0 else -10 * math.log10(mean_square),
        ssim=_ssim(first, second, width),
    )


def heat_map(a: Any, b: Any, *, full_scale: float | None = None) -> Image.Image:
    """Draw where two images differ: black where they are equal, through red and yellow to white at ``full_scale``.

    A pixel shows the largest difference of its channels. ``full_scale`` is in the units of the input, by default the
    largest difference. :class:`NotComparableError`.
    """
    first, second = _pair(a, b)
    gaps = _gaps(first, second)
    if gaps.ndim == 3 and _has_channels(first):
        gaps = gaps.max(axis=-1)
    if gaps.ndim != 2:
        raise NotComparableError(f"A heat map needs images, not arrays of shape {first.shape}. Give one frame of them.")
    finite = gaps[np.isfinite(gaps)]
    top = full_scale if full_scale is not None else float(finite.max(initial=0.0))
    share = np.clip(np.where(np.isfinite(gaps), gaps, top or 1.0) / (top or 1.0), 0.0, 1.0)
    # Red, green and blue rise one after the other.
    colours = np.stack([np.clip(3 * share - start, 0, 1) for start in range(3)], axis=-1)
    return Image.fromarray(np.rint(colours * 255).astype(np.uint8))


def luma(image: Image.Image) -> npt.NDArray[np.float64]:
    """Return the luma of a picture of any mode; transparency is ignored."""
    weights = np.array([0.299, 0.587, 0.114]) / 255
    return np.asarray(np.asarray(image.convert("RGB"), dtype=np.float64) @ weights)


def sharpness(image: Image.Image) -> float:
    """Return the variance of the Laplacian of the luma, 0 to 16, which depends on the size in pixels.

    https://doi.org/10.1109/ICPR.2000.903548. :class:`MissingExtraError` without SciPy.
    """
    ndimage = import_extra("scipy.ndimage", "SciPy", "report")
    return float(ndimage.laplace(luma(image), mode="nearest").var())


def contrast(image: Image.Image) -> float:
    """Return the standard deviation of the luma, 0 to 0.5 (RMS contrast)."""
    return float(luma(image).std())


def reduced_luma(image: Image.Image) -> npt.NDArray[np.float64]:
    """Return the luma averaged over blocks of f x f pixels, f = max(1, round(shorter side / 256)), as advised for SSIM:
    https://ece.uwaterloo.ca/~z70wang/research/ssim/.
    """
    values = luma(image)
    factor = max(1, round(min(values.shape) / _SSIM_SIDE_PX))
    height, width = (side // factor for side in values.shape)
    blocks = values[: height * factor, : width * factor].reshape(height, factor, width, factor)
    return np.asarray(blocks.mean(axis=(1, 3)))


def _pair(a: Any, b: Any) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    first, second = np.asarray(a), np.asarray(b)
    if first.shape != second.shape:
        raise NotComparableError(
            f"Outputs of shape {first.shape} and {second.shape} cannot be compared: give the same size and mode."
        )
    if first.size == 0:
        raise NotComparableError(f"Outputs of shape {first.shape} hold nothing to compare.")
    if first.dtype == second.dtype == np.uint8:
        return first, second
    if first.dtype.kind == second.dtype.kind == "f":
        return first.astype(np.float64), second.astype(np.float64)
    raise NotComparableError(
        f"Outputs of type {first.dtype} and {second.dtype} cannot be compared: give both as uint8 or both as floats."
    )


def _gaps(first: npt.NDArray[Any], second: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """Return absolute differences; infinite where only one is NaN or they are unequal infinities."""
    one, other = first.astype(np.float64), second.astype(np.float64)
    same = (one == other) | (np.isnan(one) & np.isnan(other))
    with np.errstate(invalid="ignore"):
        gaps = np.abs(one - other)
    gaps[np.isnan(gaps)] = np.inf
    gaps[same] = 0.0
    return gaps


def _has_channels(array: npt.NDArray[Any]) -> bool:
    return array.ndim >= 3 and array.shape[-1] in _CHANNELS


def _ssim(first: npt.NDArray[Any], second: npt.NDArray[Any], data_range: float) -> float | None:
    metrics = import_extra("skimage.metrics", "scikit-image, which SSIM needs,", "report")
    if first.ndim == 2:
        first, second = first[..., None], second[..., None]
    if not _has_channels(first) or not (np.isfinite(first).all() and np.isfinite(second).all()):
        return None
    window = min(*first.shape[-3:-1], _WIDEST_WINDOW_PIXELS)
    window -= 1 - window % 2  # odd, as it must be
    if window < _NARROWEST_WINDOW_PIXELS:
        return None
    pictures = zip(first.reshape(-1, *first.shape[-3:]), second.reshape(-1, *second.shape[-3:]), strict=True)
    options = {"win_size": window, "data_range": data_range, "channel_axis": -1}
    return float(np.mean([metrics.structural_similarity(one, other, **options) for one, other in pictures]))
