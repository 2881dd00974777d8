"""The contact sheet, all pictures of a sweep on one: a row for each prompt, a column for each seed."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

from pipevault.report.plots import OUTLIER_COLOUR, prompt_labels

if TYPE_CHECKING:
    from PIL import Image, ImageFont

_PICTURES_WIDTH_PX = 1000
_NARROWEST_PX, _WIDEST_PX = 64, 160
_GAP_PX = 8
_FRAME_PX = 3
_FONT_PX = 14
_TITLE_HEIGHT_PX = 24


def contact_sheet(
    pictures: Sequence[Sequence[Image.Image]],
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    outliers: Collection[int] = (),
) -> Image.Image:
    """Draw the sheet. ``pictures`` has a row for each prompt; seeds in ``outliers`` have a red number and red frames.

    Pictures are 64 to 160 pixels wide: enlarged by whole factors so that each pixel stays one, or reduced.
    """
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.load_default(_FONT_PX)
    side_px = min(max(_PICTURES_WIDTH_PX // len(seeds), _NARROWEST_PX), _WIDEST_PX)
    cells = [[_fitted(picture, side_px) for picture in row] for row in pictures]
    labels = prompt_labels(prompts)
    names = [str(seed) for seed in seeds]
    label_px = max(_width(font, text) for text in [*labels, "seed"]) + 2 * _GAP_PX
    cell_px = max([cell.width for row in cells for cell in row] + [_width(font, name) for name in names]) + _GAP_PX
    row_px = max(max(cell.height for row in cells for cell in row), _FONT_PX) + _GAP_PX
    size = (label_px + len(seeds) * cell_px + _GAP_PX, _TITLE_HEIGHT_PX + len(prompts) * row_px + _GAP_PX)
    sheet = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(sheet)
    pen.text((label_px - _GAP_PX, _TITLE_HEIGHT_PX // 2), "seed", fill="#777", font=font, anchor="rm")
    for row, label in enumerate(labels):
        middle = (_GAP_PX, _TITLE_HEIGHT_PX + row * row_px + row_px // 2)
        pen.text(middle, label, fill="black", font=font, anchor="lm")
    for column, (seed, name) in enumerate(zip(seeds, names, strict=True)):
        marked = seed in outliers
        centre_px = label_px + column * cell_px + cell_px // 2
        colour = OUTLIER_COLOUR if marked else "black"
        pen.text((centre_px, _TITLE_HEIGHT_PX // 2), name, fill=colour, font=font, anchor="mm")
        for row in range(len(prompts)):
            cell = cells[row][column]
            left_px = centre_px - cell.width // 2
            top_px = _TITLE_HEIGHT_PX + row * row_px + (row_px - cell.height) // 2
            if marked:
                box = (left_px - _FRAME_PX, top_px - _FRAME_PX)
                end = (left_px + cell.width + _FRAME_PX - 1, top_px + cell.height + _FRAME_PX - 1)
                pen.rectangle((box, end), fill=OUTLIER_COLOUR)
            sheet.paste(cell, (left_px, top_px))
    return sheet


def _fitted(picture: Image.Image, side_px: int) -> Image.Image:
    from PIL import Image

    factor = side_px // max(picture.size)
    if factor >= 1:
        return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
    small = picture.copy()
    small.thumbnail((side_px, side_px), Image.Resampling.LANCZOS)
    return small


def _width(font: ImageFont.ImageFont | ImageFont.FreeTypeFont, text: str) -> int:
    return round(font.getlength(text))
