"""A report as one self-contained page: templates of Jinja2, pictures as data URIs, no scripts, no requests."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pipevault.compat.extras import import_extra

if TYPE_CHECKING:
    from PIL import Image


def render_page(template: str, content: Mapping[str, Any]) -> str:
    """Return the page that ``templates/<template>`` makes of ``content``; text is escaped, a missing name is an error.
    Templates have the filters ``picture`` (an image to a data URI), ``svg`` (SVG text to one) and ``figure`` (a number
    to four significant digits). :class:`MissingExtraError` without Jinja2.
    """
    jinja2 = import_extra("jinja2", "Jinja2, which reports need,", "report")
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("pipevault.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"picture": picture_uri, "svg": svg_uri, "figure": figure}
    page: str = environment.get_template(template).render(content)
    return page


def picture_uri(image: Image.Image) -> str:
    """Return ``image`` as the data URI of a PNG."""
    return f"data:image/png;base64,{base64.b64encode(png_bytes(image)).decode('ascii')}"


def png_bytes(image: Image.Image) -> bytes:
    """Return ``image`` as a PNG file."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def svg_uri(text: str) -> str:
    """Return a plot as the data URI of an SVG picture, which in ``<img>`` can neither run scripts nor load anything."""
    return f"data:image/svg+xml;base64,{base64.b64encode(text.encode('utf-8')).decode('ascii')}"


def figure(value: float | None, unit: str = "") -> str:
    """Return ``value`` to four significant digits with its unit; a dash for ``None``."""
    if value is None:
        return "–"  # noqa: RUF001 - a dash in a table is one
    return f"{value:.4g}{f' {unit}' if unit else ''}"
