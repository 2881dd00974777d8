"""Plots as SVG text that is the same for the same data. matplotlib comes with the extra ``report``."""

from __future__ import annotations

import io
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from pipevault.compat.extras import import_extra

if TYPE_CHECKING:
    from matplotlib.figure import Figure

OUTLIER_COLOUR = "#c0392b"
SHARE_COLOURS: Mapping[str, str] = {"prompt": "#4c78a8", "seed": "#f58518", "remainder": "#bab0ac"}
_DOT_COLOUR = "#4c78a8"
_LABEL_LENGTH = 28
_STRIP_HALF_WIDTH = 0.28
_NAMED_OUTLIERS = 3


def strip_plot(
    table: Sequence[Sequence[float]],
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    title: str,
    unit: str,
    outliers: Collection[int] = (),
) -> str:
    """Plot a score of each picture: a column for each prompt, in it a box (quartiles) and a dot for each seed.

    Dots stand in the order of the seeds; those of ``outliers`` are red and, up to three seeds, named.
    :class:`MissingExtraError` without matplotlib.
    """
    with _figure(width_in=max(6.0, 1.6 + 0.8 * len(prompts)), height_in=3.4) as figure:
        axes = figure.add_subplot()
        axes.boxplot(
            [list(row) for row in table],
            positions=range(len(prompts)),
            widths=0.7,
            whis=(0, 100),
            manage_ticks=False,
            boxprops={"color": "#999"},
            whiskerprops={"color": "#bbb"},
            capprops={"color": "#bbb"},
            medianprops={"color": "#444"},
        )
        offsets = _offsets(len(seeds))
        for row, scores in enumerate(table):
            for column, score in enumerate(scores):
                marked = seeds[column] in outliers
                colour = OUTLIER_COLOUR if marked else _DOT_COLOUR
                axes.plot(row + offsets[column], score, "o", color=colour, markersize=3.5, alpha=0.85, zorder=3)
                if marked and len(outliers) <= _NAMED_OUTLIERS:
                    axes.annotate(
                        str(seeds[column]),
                        (row + offsets[column], score),
                        textcoords="offset points",
                        xytext=(4, 3),
                        fontsize=7,
                        color=OUTLIER_COLOUR,
                    )
        axes.set_xticks(range(len(prompts)), labels=prompt_labels(prompts), parse_math=False, rotation=30, ha="right")
        axes.set_xlim(-0.6, len(prompts) - 0.4)
        axes.set_ylabel(unit, parse_math=False)
        axes.set_title(title, loc="left", fontsize=10, parse_math=False)
        return _svg(figure)


def share_bars(shares: Mapping[str, Mapping[str, float]]) -> str:
    """Plot stacked horizontal bars, one for each score in order: the shares of prompt, seed and remainder (0 to 1).

    A score whose shares are all 0 is the same everywhere, and its bar says so. :class:`MissingExtraError` without
    matplotlib.
    """
    names = list(shares)
    with _figure(width_in=7.6, height_in=1.1 + 0.42 * len(names)) as figure:
        axes = figure.add_subplot()
        starts = [0.0] * len(names)
        for part, colour in SHARE_COLOURS.items():
            widths = [shares[name][part] for name in names]
            axes.barh(range(len(names)), widths, left=starts, color=colour, label=part, height=0.66)
            for row, (start, width) in enumerate(zip(starts, widths, strict=True)):
                if width >= 0.06:
                    text = f"{100 * width:.0f} %"
                    axes.text(start + width / 2, row, text, ha="center", va="center", fontsize=8, color="#222")
            starts = [start + width for start, width in zip(starts, widths, strict=True)]
        for row, end in enumerate(starts):
            if end == 0:
                axes.text(0.01, row, "the same everywhere", va="center", fontsize=8, color="#666")
        axes.set_yticks(range(len(names)), labels=names, parse_math=False)
        axes.invert_yaxis()
        axes.set_xlim(0, 1)
        axes.set_xticks([0, 0.25, 0.5, 0.75, 1], labels=["0", "25 %", "50 %", "75 %", "100 %"])
        axes.set_xlabel("share of the variance")
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1.0), ncols=3, frameon=False, fontsize=8)
        return _svg(figure)


def time_bars(seconds: Mapping[str, tuple[float, float]]) -> str:
    """Plot two horizontal bars for each name, on a logarithmic scale: seconds the first time, and from then on.

    :class:`MissingExtraError` without matplotlib.
    """
    names = list(seconds)
    with _figure(width_in=7.6, height_in=1.2 + 0.55 * len(names)) as figure:
        axes = figure.add_subplot()
        for index, (label, colour) in enumerate((("the first time", "#bab0ac"), ("from then on", _DOT_COLOUR))):
            values = [seconds[name][index] for name in names]
            places = [row - 0.2 + 0.4 * index for row in range(len(names))]
            axes.barh(places, values, color=colour, label=label, height=0.38)
            for place, value in zip(places, values, strict=True):
                axes.text(value * 1.05, place, f"{value:.3g} s", va="center", fontsize=8, color="#222")
        axes.set_xscale("log")
        axes.set_yticks(range(len(names)), labels=names, parse_math=False)
        axes.invert_yaxis()
        axes.set_xlabel("seconds from the constructed pipeline to the end of its first call")
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1.0), ncols=2, frameon=False, fontsize=8)
        axes.margins(x=0.2)
        return _svg(figure)


def prompt_labels(prompts: Sequence[str]) -> list[str]:
    """Return the prompts if all are short and in Latin-1, which every font holds; else numbered from 1, and cut."""
    whole = [" ".join(prompt.split()) for prompt in prompts]
    cut = [_shortened(prompt) for prompt in whole]
    if cut == whole:
        return whole
    return [f"{number}  {label}".rstrip() for number, label in enumerate(cut, 1)]


def _shortened(prompt: str) -> str:
    """Return at most 28 letters; empty if there are letters outside Latin-1."""
    try:
        prompt.encode("latin-1")
    except UnicodeEncodeError:
        return ""
    return prompt if len(prompt) <= _LABEL_LENGTH else f"{prompt[: _LABEL_LENGTH - 1].rstrip()}…"


def _offsets(count: int) -> list[float]:
    if count == 1:
        return [0.0]
    return [_STRIP_HALF_WIDTH * (2 * index / (count - 1) - 1) for index in range(count)]


@contextmanager
def _figure(*, width_in: float, height_in: float) -> Iterator[Figure]:
    """Open a figure without pyplot and with matplotlib's own defaults, so that no user's configuration shows."""
    needed = "matplotlib, which plots need,"
    matplotlib = import_extra("matplotlib", needed, "report")
    canvas = import_extra("matplotlib.backends.backend_agg", needed, "report")
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(
            {
                "svg.hashsalt": "pipevault",
                "svg.fonttype": "path",
                "font.size": 9,
                "axes.spines.top": False,
                "axes.spines.right": False,
                "figure.constrained_layout.use": True,
            }
        )
        figure = import_extra("matplotlib.figure", needed, "report").Figure(figsize=(width_in, height_in))
        canvas.FigureCanvasAgg(figure)
        yield figure


def _svg(figure: Any) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()
