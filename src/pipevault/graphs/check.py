"""Comparing what a frozen graph returns with what the eager part returned.

The distance of two tensors is ``max|a - b| / max|eager|``. Tolerances are per dtype; a compiled graph sums in
another order than eager code, so equality is not asked for. Both must be finite.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.utils import _pytree as pytree


class Tolerances(NamedTuple):
    """The largest distances that are let through for a dtype: of a part, and of a pipeline, which repeats its parts;
    and the largest difference, for values as small as rounding, where a relative distance tells nothing.
    """

    part: float
    pipeline: float
    difference: float


# float32 leaves room for sums over a few thousand terms; the others are about four units in the last place.
TOLERANCES = {
    torch.float64: Tolerances(part=1e-6, pipeline=1e-4, difference=1e-13),
    torch.float32: Tolerances(part=1e-3, pipeline=1e-2, difference=2e-6),
    torch.float16: Tolerances(part=1e-2, pipeline=5e-2, difference=2e-3),
    torch.bfloat16: Tolerances(part=5e-2, pipeline=2e-1, difference=1.6e-2),
}
_OTHER = Tolerances(part=1e-1, pipeline=1e-2, difference=0.0)

NOT_FINITE = "eager code returns values that are not finite"


@dataclass(frozen=True)
class GraphComparison:
    """The largest distance seen, the tolerance it was held against, and what was wrong (empty if nothing).

    ``eager_s`` and ``frozen_s`` are the seconds that the two calls took, where they were timed.
    """

    distance: float
    tolerance: float
    failure: str = ""
    eager_s: float = 0.0
    frozen_s: float = 0.0

    @property
    def passed(self) -> bool:
        return not self.failure


def pipeline_tolerance(modules: Iterable[nn.Module]) -> float:
    """Return the tolerance for a pipeline's output: that of the coarsest dtype among its weights."""
    dtypes = {parameter.dtype for module in modules for parameter in module.parameters()}
    known = [TOLERANCES[dtype].pipeline for dtype in dtypes if dtype in TOLERANCES]
    return max(known, default=TOLERANCES[torch.float32].pipeline)


def compare_trees(
    eager: Any, frozen: Any, *, tolerance: float | None = None, same_non_finite: bool = False
) -> GraphComparison:
    """Compare two outputs leaf by leaf: tensors, arrays and PIL images by value, other leaves by equality.

    ``tolerance`` is for floating point; by default that of a part, which depends on each leaf's dtype. Values that are
    not finite are a failure, unless ``same_non_finite``: then they must stand in the same places.
    """
    ours, theirs = _leaves(eager), _leaves(frozen)
    if len(ours) != len(theirs):
        return GraphComparison(0.0, 0.0, f"eager code returns {len(ours)} values, the graph {len(theirs)}")
    worst = GraphComparison(0.0, 0.0)
    for a, b in zip(ours, theirs, strict=True):
        if not isinstance(a, torch.Tensor) or not isinstance(b, torch.Tensor):
            if type(a) is not type(b) or a != b:
                return GraphComparison(0.0, 0.0, f"eager code returns {a!r}, the graph {b!r}")
            continue
        result = _compare_tensors(a, b, tolerance, same_non_finite)
        if not result.passed:
            return result
        if result.distance >= worst.distance:
            worst = result
    return worst


def _compare_tensors(a: torch.Tensor, b: torch.Tensor, allowed: float | None, same_non_finite: bool) -> GraphComparison:
    if a.shape != b.shape or a.dtype != b.dtype:
        return GraphComparison(
            0.0, 0.0, f"eager code returns {a.dtype}{list(a.shape)}, the graph {b.dtype}{list(b.shape)}"
        )
    known = TOLERANCES.get(a.dtype, _OTHER)
    tolerance = known.part if allowed is None else allowed
    if a.is_complex():
        a, b = torch.view_as_real(a.resolve_conj()), torch.view_as_real(b.resolve_conj())
    if not a.is_floating_point():
        equal = torch.equal(a.cpu(), b.cpu())
        return GraphComparison(0.0, 0.0, "" if equal else f"{a.dtype} values differ")
    a, b = a.detach().cpu().double(), b.detach().cpu().double()
    finite = torch.isfinite(a)
    if not bool(finite.all()):
        if not same_non_finite:
            return GraphComparison(0.0, tolerance, NOT_FINITE)
        if not torch.equal(a[~finite].nan_to_num(), b[~finite].nan_to_num()):
            return GraphComparison(0.0, tolerance, "values that are not finite stand elsewhere")
        a, b = a[finite], b[finite]
    if not a.numel():
        return GraphComparison(0.0, tolerance)
    if not bool(torch.isfinite(b).all()):
        return GraphComparison(0.0, tolerance, "the graph returns values that are not finite")
    scale = float(a.abs().max())
    difference = float((a - b).abs().max())
    distance = difference / scale if scale else difference
    passed = distance <= tolerance or difference <= known.difference
    failure = "" if passed else f"distance {distance:.3g} from eager code is over {tolerance:.3g}"
    return GraphComparison(distance, tolerance, failure)


def _leaves(tree: Any) -> list[Any]:
    return [torch.from_numpy(np.array(leaf)) if _is_array(leaf) else leaf for leaf in pytree.tree_leaves(tree)]


def _is_array(leaf: Any) -> bool:
    return not isinstance(leaf, torch.Tensor) and (hasattr(leaf, "__array_interface__") or hasattr(leaf, "__array__"))
