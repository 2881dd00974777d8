"""The page of a comparison: what it says, and how it looks in a browser."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from helpers.browser import check_page
from helpers.comparison_runs import FakeRuns, brighter, compared
from pipevault.evidence.compare.report import comparison_page
from pipevault.evidence.request import Request

COMMAND = "pipevault compare ./model --prompt 'a <b>cat</b>'"


def page(runs: FakeRuns | None = None, **options: Any) -> str:
    return comparison_page(compared(runs, **options), command=COMMAND)


def text(html: str) -> str:
    return " ".join(re.sub(r"<[^>]+>", " ", html.partition("<body>")[2]).split())


def noise(label: str, pictures: list[np.ndarray[Any, Any]]) -> list[np.ndarray[Any, Any]]:
    """Pictures that differ from run to run, larger than what a page shows."""
    generator = np.random.default_rng(len(label))
    return [generator.integers(0, 256, (600, 400, 3), dtype=np.uint8) for _ in pictures]


def latents(label: str, count: int) -> np.ndarray[Any, Any]:
    generator = np.random.default_rng(len(label))
    return generator.normal(size=(count, 16, 8, 8)).astype(np.float32)


@pytest.mark.browser
class TestInABrowser:
    def test_equal_runs(self, tmp_path: Path) -> None:
        path = tmp_path / "compare.html"
        path.write_text(page(), encoding="utf-8")
        check_page(path, pictures=2 + 1)

    def test_runs_that_differ_with_many_pictures_and_long_prompts(self, tmp_path: Path) -> None:
        prompts = tuple(f"{'a lighthouse at dusk, ' * 12}{number}" for number in range(12))
        path = tmp_path / "compare.html"
        path.write_text(page(FakeRuns(noise, latents=latents), request=Request(prompts)), encoding="utf-8")
        # Ten of twelve for each of eight runs, one for the other batch size; heat maps for all but the first run.
        check_page(path, pictures=8 * 10 + 1 + 7 * 10 + 1)

    def test_a_word_without_end_does_not_widen_the_page(self, tmp_path: Path) -> None:
        path = tmp_path / "compare.html"
        path.write_text(page(request=Request(("x" * 3000,))), encoding="utf-8")
        check_page(path)


def test_runs_with_the_same_pictures_share_a_row() -> None:
    html = page(FakeRuns(brighter("torch.compile")), groups=("eager", "torch.compile"))
    assert "eager, eager again, torch.compile again</h3>" in html
    assert "<h3>torch.compile</h3>" in html
    assert html.count("<img") == 2 * 2 + 2 * 2  # two sets of pictures; torch.compile differs from eager and from itself


def test_heat_maps_say_what_their_full_scale_is() -> None:
    html = page(FakeRuns(brighter("torch.compile", by=6)), groups=("torch.compile",))
    assert "torch.compile against eager" in html
    assert "white, the full scale, is a difference of 6 of 255 in one channel of a pixel." in text(html)


def test_latents_are_mapped_where_no_pixel_differs() -> None:
    def drifting(label: str, count: int) -> np.ndarray[Any, Any]:
        return np.full((count, 4, 8, 8), 0.25 if "thread" in label else 0, np.float32)

    html = text(page(FakeRuns(latents=drifting), groups=("threads",)))
    assert "a difference of 0.25 in one channel of the latents, too small to move a pixel" in html
    assert "eager, other thread count against eager: 2 threads, not 1" in html


def test_a_single_pixel_is_still_seen_in_a_large_heat_map() -> None:
    from pipevault.evidence.compare.report import _peaks

    large = Image.new("RGB", (1000, 701))
    large.putpixel((999, 700), (255, 128, 0))
    small = _peaks(large)
    assert max(small.size) <= 256
    assert small.getpixel((small.width - 1, small.height - 1)) == (255, 128, 0)
    assert len(small.getcolors() or []) == 2


def test_what_is_equal_is_said() -> None:
    html = text(page(groups=("eager", "frozen")))
    assert (
        "No difference in any bit: eager again against eager; frozen against eager; frozen again against frozen."
        in html
    )
    assert "the same bits in every process and generation" in html


def test_a_broken_promise_is_said() -> None:
    assert "gave different bits: frozen again differs from frozen." in text(page(FakeRuns(brighter("frozen again"))))


def test_without_frozen_runs_nothing_is_said_of_them() -> None:
    assert "rozen" not in text(page(groups=("eager",)))


def test_runs_that_were_left_out_and_noise_that_differs_are_said() -> None:
    runs = FakeRuns(base={"capability": "DEFAULT"}, say=lambda label: {"noise": "o"} if label == "eager again" else {})
    html = text(page(runs, groups=("eager", "isa")))
    assert "Left out: eager, other instruction set (torch has no kernels for less than DEFAULT here)." in html
    assert "the noise differs already" in html


def test_the_command_machine_and_versions_are_there_and_escaped() -> None:
    html = page()
    assert "&lt;b&gt;cat&lt;/b&gt;" in html
    assert "<b>" not in html
    for words in ("torch 2.13.0", "diffusers 0.42.1", "cpu, 1 thread, AVX512 kernels", "seed 7", "k" * 64):
        assert words in text(html)


def test_times_of_every_run_are_there() -> None:
    html = text(page(groups=("frozen",)))
    assert html.count("0.500 s 3.000 s 0.250 s") == 3
    assert "prewarm: the vault held the entry 0.500 s" in html


def test_arrays_have_figures_but_no_pictures(tmp_path: Path) -> None:
    def as_array(label: str) -> dict[str, Any]:
        if label == "prewarm":
            return {}
        path = tmp_path / f"{label.replace(' ', '-')}.npy"
        np.save(path, np.zeros((8, 8, 3), np.float32))
        return {"pictures": (path,), "pixels": ("a",), "warm_pixels": ("a",)}

    html = page(FakeRuns(say=as_array), groups=("frozen",))
    assert "<img" not in html
    assert "frozen again" in html
