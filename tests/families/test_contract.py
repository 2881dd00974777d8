"""The contract of :mod:`families.contract` on eight families; ``scripts/breadth.py`` runs it on all."""

from __future__ import annotations

from pathlib import Path

import pytest

from families.build import CI_FAMILIES, FAMILIES
from families.contract import check_family

STAY_EAGER: dict[str, tuple[str, ...]] = {}
"""Parts of a family that no graph can stand in for; the denoiser is never among them."""


@pytest.mark.parametrize("name", CI_FAMILIES)
def test_a_family_keeps_every_promise(name: str, tmp_path: Path) -> None:
    report = check_family(FAMILIES[name], tmp_path / "vault")
    assert report.failures == []
    assert report.denoiser == "frozen"
    assert tuple(report.eager_parts) == STAY_EAGER.get(name, ())


def test_a_variation_is_frozen_on_the_spot(tmp_path: Path) -> None:
    report = check_family(FAMILIES["sd15"], tmp_path / "vault", compile_variations=("batch_2",))
    assert report.failures == []
    assert report.variations["batch_2"] == "graph"
