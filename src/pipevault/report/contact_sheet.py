"""The contact sheet, all pictures of a sweep on one: a row for each prompt, a column for each seed."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from PIL import Image, ImageDraw, ImageFont, ImageOps

from pipevault.report.plots import OUTLIER_COLOUR, prompt_labels

_PICTURES_WIDTH_PX = 1000
_NARROWEST_PX, _WIDEST_PX = 64, 160
_GAP_PX, _FRAME_PX = 8, 3
_FONT_PX, _TITLE_HEIGHT_PX = 14, 24


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
    font = ImageFont.load_default(_FONT_PX)
    labels = prompt_labels(prompts)
    side_px = min(max(_PICTURES_WIDTH_PX // len(seeds), _NARROWEST_PX), _WIDEST_PX)
    cells = [[_fitted(picture, side_px) for picture in row] for row in pictures]
    label_px = round(max(font.getlength(text) for text in [*labels, "seed"])) + 2 * _GAP_PX
    number_px = round(max(font.getlength(str(seed)) for seed in seeds))
    cell_px = max(number_px, *(cell.width for row in cells for cell in row)) + _GAP_PX
    row_px = max(_FONT_PX, *(cell.height for row in cells for cell in row)) + _GAP_PX
    size = (label_px + len(seeds) * cell_px + _GAP_PX, _TITLE_HEIGHT_PX + len(prompts) * row_px + _GAP_PX)
    sheet = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(sheet)
    pen.text((label_px - _GAP_PX, _TITLE_HEIGHT_PX // 2), "seed", fill="#777", font=font, anchor="rm")
    for row, label in enumerate(labels):
        middle = (_GAP_PX, _TITLE_HEIGHT_PX + row * row_px + row_px // 2)
        pen.text(middle, label, fill="black", font=font, anchor="lm")
    for column, seed in enumerate(seeds):
        centre_px = label_px + column * cell_px + cell_px // 2
        number, frame = (OUTLIER_COLOUR, OUTLIER_COLOUR) if seed in outliers else ("black", "white")
        pen.text((centre_px, _TITLE_HEIGHT_PX // 2), str(seed), fill=number, font=font, anchor="mm")
        for row, of_prompt in enumerate(cells):
            framed = ImageOps.expand(of_prompt[column], _FRAME_PX, frame)
            top_px = _TITLE_HEIGHT_PX + row * row_px + (row_px - framed.height) // 2
            sheet.paste(framed, (centre_px - framed.width // 2, top_px))
    return sheet


def _fitted(picture: Image.Image, side_px: int) -> Image.Image:
    if factor := side_px // max(picture.size):
        return ImageOps.scale(picture, factor, Image.Resampling.NEAREST)
    return ImageOps.contain(picture, (side_px, side_px), Image.Resampling.LANCZOS)
