"""The report of a sweep: the content of its template, with plots and the contact sheet."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING

from pipevault.evidence.quality import SCORES
from pipevault.report.contact_sheet import contact_sheet
from pipevault.report.page import png_bytes, render_page
from pipevault.report.plots import prompt_labels, share_bars, strip_plot

if TYPE_CHECKING:
    from pipevault.evidence.sweep.drift import Drift
    from pipevault.evidence.sweep.run import Sweep


def report_files(sweep: Sweep, drift: Drift | None = None) -> Mapping[str, tuple[str, bytes]]:
    """Return the files of a sweep by what they are: their paths in a folder and their contents.

    The report is one HTML page that needs no other file. :class:`MissingExtraError` where the extra is not installed.
    """
    import numpy as np

    result, shares, effects = sweep.result, sweep.result.variance_shares(), sweep.result.seed_effects()
    outliers = result.outlier_seeds()
    sheet = contact_sheet(sweep.thumbnails, result.prompts, result.seeds, outliers=outliers)
    plots = {"shares": share_bars({SCORES[name].title: asdict(one) for name, one in shares.items()})}
    for name, table in result.scores.items():
        flagged = [result.seeds[column] for column in effects[name].outliers]
        labels = {"title": SCORES[name].title, "unit": SCORES[name].unit}
        plots[name] = strip_plot(table, result.prompts, result.seeds, **labels, outliers=flagged)
    content = {
        "title": f"Seed sweep of {result.model}",
        "result": result,
        "tables": {name: np.asarray(table) for name, table in result.scores.items()},
        "SCORES": SCORES,
        "shares": shares,
        "effects": effects,
        "outliers": outliers,
        "drift": drift,
        "labels": prompt_labels(result.prompts),
        "thumbnails": sweep.thumbnails,
        "sheet": sheet,
        "plots": plots,
        "percent": percent,
    }
    return {
        "sweep": ("sweep.json", f"{result.to_json()}\n".encode()),
        "contact_sheet": ("contact-sheet.png", png_bytes(sheet)),
        **{f"plot {name}": (f"plots/{name}.svg", svg.encode()) for name, svg in plots.items()},
        "report": ("report.html", render_page("sweep.html.j2", content).encode()),
    }


def percent(share: float) -> str:
    """Return a share as a text such as ``12.5 %``."""
    return f"{100 * share:.1f} %"
