"""The browser check itself: what it lets pass and what it notices."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from PIL import Image

from helpers.browser import check_page, screenshot
from pipevault.report.page import picture_uri

pytestmark = pytest.mark.browser

POLICY = '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:">'
PICTURE = f'<img alt="red" src="{picture_uri(Image.new("RGB", (40, 30), "red"))}">'


def write(folder: Path, body: str, *, head: str = "") -> Path:
    path = folder / "page.html"
    path.write_text(f"<!doctype html><html><head><meta charset=utf-8>{head}</head><body>{body}</body></html>")
    return path


def test_a_page_that_is_whole_passes(tmp_path: Path) -> None:
    figures = f"<h1>Two</h1><figure>{PICTURE}</figure><figure>{PICTURE}</figure><table><tr><td>1</td></tr></table>"
    check_page(write(tmp_path, figures), pictures=2)


def test_a_broken_picture_is_noticed(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="half a picture"):
        check_page(write(tmp_path, f'{PICTURE}<img alt="half a picture" src="data:image/png;base64,iVBORw0KGgo=">'))


def test_a_picture_that_is_missing_is_noticed(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="it has 1 pictures"):
        check_page(write(tmp_path, PICTURE), pictures=2)


def test_a_page_without_pictures_is_noticed(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="it has 0 pictures"):
        check_page(write(tmp_path, "<p>nothing</p>"))


@pytest.mark.parametrize("other", [PICTURE, "<table><tr><td>a table</td></tr></table>", "<h2>a heading</h2>"])
def test_an_overlap_is_noticed(tmp_path: Path, other: str) -> None:
    body = f'{PICTURE}<div style="position: absolute; top: 12px; left: 12px">{other}</div>'
    with pytest.raises(AssertionError, match="img red and"):
        check_page(write(tmp_path, body))


def test_a_page_that_scrolls_sideways_is_noticed(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="sideways"):
        check_page(write(tmp_path, f'{PICTURE}<div style="width: 1400px">wide</div>'))


def test_a_table_that_scrolls_inside_its_own_box_passes(tmp_path: Path) -> None:
    wide = '<div style="overflow-x: auto"><table style="width: 1400px"><tr><td>wide</td></tr></table></div>'
    check_page(write(tmp_path, PICTURE + wide))


@pytest.mark.parametrize("head", ["", POLICY])
def test_a_request_that_leaves_the_page_is_noticed(tmp_path: Path, head: str) -> None:
    """Blocked by the page's own policy or not; nothing listens at the address."""
    with pytest.raises(AssertionError, match=r"style\.css"):
        check_page(write(tmp_path, f'{PICTURE}<link rel="stylesheet" href="http://127.0.0.1:9/style.css">', head=head))


def test_a_file_beside_the_page_is_noticed(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "beside.png")
    with pytest.raises(AssertionError, match=r"beside\.png"):
        check_page(write(tmp_path, f'{PICTURE}<img alt="beside" src="beside.png">'))


def test_an_error_of_a_script_is_noticed(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="broken script"):
        check_page(write(tmp_path, f"{PICTURE}<script>throw new Error('broken script')</script>"))


def test_a_screenshot_has_the_whole_page(tmp_path: Path) -> None:
    screenshot(write(tmp_path, f'{PICTURE}<div style="height: 2000px">high</div>'), tmp_path / "page.png")
    with Image.open(io.BytesIO((tmp_path / "page.png").read_bytes())) as image:
        assert image.width == 1280
        assert image.height > 2000
