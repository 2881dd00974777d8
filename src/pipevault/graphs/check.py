"""Comparing what a frozen graph returns with what the eager part returned.

The distance of two tensors is ``max|a - b| / max|eager|``. Tolerances are per dtype; a compiled graph sums in
another order than eager code, so equality is not asked for. Both must be finite.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

# float32 leaves room for sums over a few thousand terms; the others are about four units in the last place.
PART_TOLERANCE = {
    torch.float64: 1e-6,
    torch.float32: 1e-3,
    torch.float16: 1e-2,
    torch.bfloat16: 5e-2,
}
DEFAULT_TOLERANCE = 1e-1

# A whole pipeline repeats its parts and ends in pixels, whatever the dtype inside; distances of single calls add up.
PIPELINE_TOLERANCE = {
    torch.float64: 1e-4,
    torch.float32: 1e-2,
    torch.float16: 5e-2,
    torch.bfloat16: 2e-1,
}


@dataclass(frozen=True)
class Comparison:
    """The largest distance seen, the tolerance it was held against, and what was wrong (empty if nothing)."""

    distance: float
    tolerance: float
    failure: str = ""

    @property
    def passed(self) -> bool:
        return not self.failure


def pipeline_tolerance(modules: Iterable[nn.Module]) -> float:
    """The tolerance for a pipeline's output: that of the coarsest dtype among its weights."""
    dtypes = {parameter.dtype for module in modules for parameter in module.parameters()}
    known = [PIPELINE_TOLERANCE[dtype] for dtype in dtypes if dtype in PIPELINE_TOLERANCE]
    return max(known, default=PIPELINE_TOLERANCE[torch.float32])


def compare_trees(eager: Any, frozen: Any, *, tolerance: float | None = None) -> Comparison:
    """Compare two outputs leaf by leaf: tensors, arrays and PIL images by value, other leaves by equality.

    ``tolerance`` is for floating point; by default that of a part, which depends on each leaf's dtype.
    """
    ours, theirs = list(_leaves(eager)), list(_leaves(frozen))
    if len(ours) != len(theirs):
        return Comparison(0.0, 0.0, f"eager code returns {len(ours)} values, the graph {len(theirs)}")
    worst = Comparison(0.0, 0.0)
    for a, b in zip(ours, theirs, strict=True):
        if not isinstance(a, torch.Tensor) or not isinstance(b, torch.Tensor):
            if type(a) is not type(b) or a != b:
                return Comparison(0.0, 0.0, f"eager code returns {a!r}, the graph {b!r}")
            continue
        result = _compare_tensors(a, b, tolerance)
        if not result.passed:
            return result
        if result.distance >= worst.distance:
            worst = result
    return worst


def worst_of(comparisons: Sequence[Comparison]) -> Comparison:
    for comparison in comparisons:
        if not comparison.passed:
            return comparison
    return max(comparisons, key=lambda comparison: comparison.distance)


def _compare_tensors(a: torch.Tensor, b: torch.Tensor, allowed: float | None) -> Comparison:
    if a.shape != b.shape or a.dtype != b.dtype:
        return Comparison(0.0, 0.0, f"eager code returns {a.dtype}{list(a.shape)}, the graph {b.dtype}{list(b.shape)}")
    tolerance = PART_TOLERANCE.get(a.dtype, DEFAULT_TOLERANCE) if allowed is None else allowed
    if not a.is_floating_point() and not a.is_complex():
        equal = torch.equal(a.cpu(), b.cpu())
        return Comparison(0.0, 0.0, "" if equal else f"{a.dtype} values differ")
    a, b = a.detach().cpu().double(), b.detach().cpu().double()
    if a.numel() == 0:
        return Comparison(0.0, tolerance)
    if not bool(torch.isfinite(a).all()):
        return Comparison(0.0, tolerance, "eager code returns values that are not finite")
    if not bool(torch.isfinite(b).all()):
        return Comparison(0.0, tolerance, "the graph returns values that are not finite")
    scale = float(a.abs().max())
    difference = float((a - b).abs().max())
    distance = difference / scale if scale else difference
    failure = "" if distance <= tolerance else f"distance {distance:.3g} from eager code is over {tolerance:.3g}"
    return Comparison(distance, tolerance, failure)


def _leaves(tree: Any) -> Iterator[Any]:
    for leaf in pytree.tree_leaves(tree):
        if hasattr(leaf, "__array_interface__") or hasattr(leaf, "__array__"):
            yield leaf if isinstance(leaf, torch.Tensor) else _pixels(leaf)
        else:
            yield leaf


def _pixels(value: Any) -> torch.Tensor:
    import numpy as np

    array = np.asarray(value)
    return torch.from_numpy(array.astype(np.float32) / 255.0 if array.dtype == np.uint8 else array.copy())
