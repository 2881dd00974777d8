"""Each tiny pipeline draws finite pixels that depend on the seed alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from families.build import CI_FAMILIES, FAMILIES


def draw(pipe: Any, call: dict[str, Any], seed: int) -> np.ndarray:
    found = pipe(**call, generator=torch.Generator().manual_seed(seed))
    return np.asarray(found.frames if hasattr(found, "frames") else found.images)


@pytest.mark.parametrize("name", CI_FAMILIES)
def test_a_family_draws_the_same_finite_pixels_twice(name: str) -> None:
    family = FAMILIES[name]
    pipe = family.make()
    pipe.set_progress_bar_config(disable=True)
    pixels = draw(pipe, dict(family.call), seed=5)
    assert np.isfinite(pixels).all()
    assert pixels.std() > 1e-3
    assert np.array_equal(pixels, draw(pipe, dict(family.call), seed=5))
    assert not np.array_equal(pixels, draw(pipe, dict(family.call), seed=6))
