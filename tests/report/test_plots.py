"""Plots and contact sheets: the same bytes for the same data, and what can be seen on them."""

from __future__ import annotations

import itertools
import sys
import warnings
import xml.etree.ElementTree as ElementTree
from typing import Any

import pytest
from PIL import Image, ImageColor

from pipevault.errors import MissingExtraError
from pipevault.report import plots
from pipevault.report.contact_sheet import contact_sheet

TABLE = [[0.1, 0.2, 0.3], [0.5, 0.4, 0.9]]
SHARES = {"One": {"prompt": 0.5, "seed": 0.3, "remainder": 0.2}, "Flat": dict.fromkeys(plots.SHARE_COLOURS, 0.0)}


def strip(**changes: Any) -> str:
    arguments: dict[str, Any] = {"table": TABLE, "prompts": ["a", "b"], "seeds": [0, 1, 2], "title": "T", "unit": "u"}
    return plots.strip_plot(**arguments | changes)


class TestPlots:
    @pytest.mark.parametrize("draw", [strip, lambda: plots.share_bars(SHARES)], ids=["strip", "bars"])
    def test_the_same_data_give_the_same_bytes_of_a_whole_svg(self, draw: Any) -> None:
        import matplotlib

        one = draw()
        with matplotlib.rc_context({"svg.hashsalt": None, "font.size": 30, "axes.facecolor": "red"}):
            other = draw()
        assert one == other
        assert ElementTree.fromstring(one).tag.endswith("svg")
        assert "<dc:date>" not in one

    def test_matplotlibs_settings_are_left_as_they_were(self) -> None:
        import matplotlib

        with matplotlib.rc_context({"font.size": 30}):
            strip()
            assert matplotlib.rcParams["font.size"] == 30

    def test_pyplot_is_not_needed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
        assert strip()

    def test_other_data_give_another_picture(self) -> None:
        assert strip(table=[[0.1, 0.2, 0.3], [0.5, 0.4, 0.8]]) != strip()

    def test_each_picture_is_a_dot_and_outliers_are_red(self) -> None:
        assert plots.OUTLIER_COLOUR not in strip()
        marked = strip(outliers=[1])
        # A dot for each prompt; its number is drawn in the same colour.
        assert marked.count(f"fill: {plots.OUTLIER_COLOUR}") >= 2
        assert len(marked) > len(strip())

    def test_one_prompt_and_one_seed(self) -> None:
        assert ElementTree.fromstring(strip(table=[[0.5]], prompts=["a"], seeds=[7])) is not None

    def test_a_prompt_is_neither_mathematics_nor_letters_that_the_font_lacks(self) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert ElementTree.fromstring(strip(prompts=[r"costs $5 or $\frac{", "手書きの七"])) is not None

    def test_each_share_that_is_wide_enough_has_its_colour_and_a_flat_score_says_so(self) -> None:
        svg = plots.share_bars(SHARES)
        assert all(colour in svg for colour in plots.SHARE_COLOURS.values())
        assert svg != plots.share_bars({**SHARES, "Flat": SHARES["One"]})

    @pytest.mark.parametrize("module", ["matplotlib", "matplotlib.figure"])
    def test_without_matplotlib(self, monkeypatch: pytest.MonkeyPatch, module: str) -> None:
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(MissingExtraError, match="matplotlib") as caught:
            plots.share_bars(SHARES)
        assert caught.value.extra == "report"


class TestLabels:
    def test_short_prompts_stand_as_they_are(self) -> None:
        assert plots.prompt_labels(["a  handwritten\nzero", "Füchse"]) == ["a handwritten zero", "Füchse"]

    def test_long_ones_are_cut_and_all_are_numbered(self) -> None:
        labels = plots.prompt_labels(["a fox", "x" * 100])
        assert labels[0] == "1  a fox"
        assert labels[1].startswith("2  xxx")
        assert labels[1].endswith("…")
        assert len(labels[1]) < 40

    def test_letters_that_no_font_is_sure_to_hold_leave_the_number(self) -> None:
        assert plots.prompt_labels(["手書きの七", "七"]) == ["1", "2"]


class TestContactSheet:
    def pictures(self, size: tuple[int, int] = (32, 32)) -> list[list[Image.Image]]:
        return [[Image.new("RGB", size, (40 * row, 80 * column, 255)) for column in range(3)] for row in range(2)]

    def area(self, sheet: Image.Image, colour: tuple[int, int, int]) -> int:
        return sum(count for count, found in sheet.getcolors(1 << 24) or [] if found == colour)

    def test_every_picture_is_on_it_enlarged_by_a_whole_factor(self) -> None:
        sheet = contact_sheet(self.pictures(), ["a", "b"], [0, 1, 2])
        assert [self.area(sheet, (40 * row, 80 * column, 255)) for row in range(2) for column in range(3)] == [
            160**2
        ] * 6

    def test_large_pictures_are_reduced(self) -> None:
        sheet = contact_sheet(self.pictures((300, 600)), ["a", "b"], [0, 1, 2])
        assert self.area(sheet, (0, 0, 255)) == 80 * 160

    def test_many_seeds_have_smaller_pictures_that_stay_legible(self) -> None:
        row = [Image.new("RGB", (32, 32), "blue")] * 100
        assert self.area(contact_sheet([row], ["a"], range(100)), (0, 0, 255)) == 100 * 64**2

    def test_outliers_are_framed_in_red_and_nothing_else_is_red(self) -> None:
        red = ImageColor.getrgb(plots.OUTLIER_COLOUR)
        plain = contact_sheet(self.pictures(), ["a", "b"], [0, 1, 2])
        marked = contact_sheet(self.pictures(), ["a", "b"], [0, 1, 2], outliers=[1])
        assert self.area(plain, red) == 0  # type: ignore[arg-type]
        assert self.area(marked, red) >= 2 * (166**2 - 160**2)  # type: ignore[arg-type]
        assert self.area(marked, (0, 80, 255)) == 160**2
        assert marked.size == plain.size

    def test_the_numbers_of_large_seeds_have_room(self) -> None:
        seeds = [2**64 - 1 - index for index in range(30)]
        pictures = [[Image.new("RGB", (32, 32), "blue")] * 30]
        sheet = contact_sheet(pictures, ["a"], seeds)
        heads = [sheet.crop((left, 0, left + 1, 24)).getcolors() for left in range(sheet.width)]
        gaps = sum(1 for one, other in itertools.pairwise(heads) if len(one or []) == 1 < len(other or []))
        assert gaps >= 30

    def test_the_same_pictures_give_the_same_sheet(self) -> None:
        sheets = [contact_sheet(self.pictures(), ["a", "b"], [0, 1, 2], outliers=[2]) for _ in range(2)]
        assert sheets[0].tobytes() == sheets[1].tobytes()
