"""Looks at a report in headless Chromium, as a reader would: pictures, layout, requests, errors.

Debian's ``chromium`` and ``chromium-driver`` are used where they are installed; nothing is ever downloaded.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

CHROMIUM, CHROMEDRIVER = Path("/usr/bin/chromium"), Path("/usr/bin/chromedriver")
WIDTH_PX, HEIGHT_PX = 1280, 900
_FLAGS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-background-networking"),
    *("--no-first-run", "--disable-component-update", "--disable-sync", "--hide-scrollbars"),
    f"--window-size={WIDTH_PX},{HEIGHT_PX}",
)
_LOOK = """
const boxes = [...document.querySelectorAll('img, svg, canvas, figure, table, h1, h2, h3, p')].map(element => {
  const box = element.getBoundingClientRect();
  const name = element.tagName.toLowerCase() + ' ' + (element.alt || element.innerText || '').trim().slice(0, 40);
  return {element, name, left: box.left, top: box.top, right: box.right, bottom: box.bottom};
}).filter(box => box.right > box.left && box.bottom > box.top);
const overlaps = [];
for (let i = 0; i < boxes.length; i++) for (let j = i + 1; j < boxes.length; j++) {
  const [one, other] = [boxes[i], boxes[j]];
  if (one.element.contains(other.element) || other.element.contains(one.element)) continue;
  const width = Math.min(one.right, other.right) - Math.max(one.left, other.left);
  const height = Math.min(one.bottom, other.bottom) - Math.max(one.top, other.top);
  if (width > 1 && height > 1) overlaps.push(one.name + ' and ' + other.name);
}
return {
  pictures: document.images.length,
  broken: [...document.images].filter(i => !(i.complete && i.naturalWidth > 0)).map(i => i.alt || i.src.slice(0, 80)),
  overlaps: overlaps,
  scroll_width: document.documentElement.scrollWidth,
  width: document.documentElement.clientWidth,
  requests: performance.getEntriesByType('resource').map(entry => entry.name.slice(0, 120)),
};
"""


def require_chromium() -> None:
    """Skips the test where there is no browser."""
    pytest.importorskip("selenium", reason="selenium is not installed: pip install selenium")
    if missing := [str(path) for path in (CHROMIUM, CHROMEDRIVER) if not path.is_file()]:
        pytest.skip(f"{', '.join(missing)} not found (Debian: apt-get install chromium chromium-driver)")


@contextmanager
def page(path: Path, *, width_px: int = WIDTH_PX) -> Iterator[Any]:
    """A selenium driver that has opened the file, in a browser profile of its own."""
    require_chromium()
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    with tempfile.TemporaryDirectory(prefix="chromium-", ignore_cleanup_errors=True) as profile:
        options = webdriver.ChromeOptions()
        options.binary_location = str(CHROMIUM)
        for flag in (*_FLAGS, f"--user-data-dir={profile}"):
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        driver = webdriver.Chrome(options=options, service=Service(str(CHROMEDRIVER)))
        try:
            # Exact, unlike the window, whose frame is part of its size.
            metrics = {"width": width_px, "height": HEIGHT_PX, "deviceScaleFactor": 1, "mobile": False}
            driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
            driver.get(path.resolve().as_uri())
            yield driver
        finally:
            driver.quit()


def check_page(path: Path, *, pictures: int | None = None) -> None:
    """Fails unless the page is whole: every picture loaded, nothing overlaps, it does not scroll sideways, no request
    left it and the browser reported nothing. ``pictures`` is how many it must have; at least one if not given.
    """
    with page(path) as driver:
        seen = driver.execute_script(_LOOK)
        log = [entry["message"] for entry in driver.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")]
        requested = _requested(driver.get_log("performance")) | set(seen["requests"])
    assert seen["width"] == WIDTH_PX
    wrong_count = seen["pictures"] != pictures if pictures is not None else not seen["pictures"]
    problems = [
        *([f"it has {seen['pictures']} pictures"] if wrong_count else []),
        *(f"the picture did not load: {name}" for name in seen["broken"]),
        *(f"these overlap: {names}" for names in seen["overlaps"]),
        *([f"it scrolls sideways: {seen['scroll_width']} px"] if seen["scroll_width"] > seen["width"] else []),
        *(f"it asked for {url}" for url in sorted(requested - {path.resolve().as_uri()}) if url[:5] != "data:"),
        *(f"the browser says: {message}" for message in log),
    ]
    if problems:
        raise AssertionError(f"{path}: {'; '.join(problems)}")


def _requested(log: list[dict[str, Any]]) -> set[str]:
    """Every address that the browser was asked for, files included, which the page's own list leaves out."""
    events = [json.loads(entry["message"])["message"] for entry in log]
    sent = [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]
    return {url for url in sent if url.split(":", 1)[0] in ("http", "https", "file", "ftp", "ws", "wss")}


def screenshot(path: Path, png: Path) -> None:
    """The whole page as a PNG, beyond what fits on the screen."""
    import base64

    with page(path) as driver:
        size = driver.execute_cdp_cmd("Page.getLayoutMetrics", {})["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}
        shot = driver.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": True, "clip": clip})
    png.write_bytes(base64.b64decode(shot["data"]))
