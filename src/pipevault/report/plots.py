"""Plots as SVG text that is the same for the same data. matplotlib comes with the extra ``report``."""

from __future__ import annotations

import io
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
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
    """Plot a score of each picture: a column for each prompt, in it a box (quartiles) and a dot for each seed, in
    order.

    Dots of ``outliers`` are red and, up to three seeds, named. :class:`MissingExtraError` without matplotlib.
    """
    places = [2 * _STRIP_HALF_WIDTH * (at - (len(seeds) - 1) / 2) / max(len(seeds) - 1, 1) for at in range(len(seeds))]
    colours = [OUTLIER_COLOUR if seed in outliers else _DOT_COLOUR for seed in seeds]
    named = [at for at, seed in enumerate(seeds) if seed in outliers] if len(outliers) <= _NAMED_OUTLIERS else []
    with _figure(width_in=max(6.0, 1.6 + 0.8 * len(prompts)), height_in=3.4) as figure:
        axes = figure.add_subplot()
        rows, greys = range(len(prompts)), {"box": "#999", "whisker": "#bbb", "cap": "#bbb", "median": "#444"}
        lines: dict[str, Any] = {f"{part}props": {"color": grey} for part, grey in greys.items()}
        axes.boxplot([*table], positions=rows, widths=0.7, whis=(0, 100), manage_ticks=False, **lines)
        for row, scores in enumerate(table):
            axes.scatter([row + place for place in places], scores, 12, colours, alpha=0.85, zorder=3)
            for at in named:
                axes.annotate(
                    str(seeds[at]),
                    (row + places[at], scores[at]),
                    xytext=(4, 3),
                    textcoords="offset points",
                    fontsize=7,
                    color=OUTLIER_COLOUR,
                )
        axes.set_xticks(rows, labels=prompt_labels(prompts), parse_math=False, rotation=30, ha="right")
        axes.set_xlim(-0.6, len(prompts) - 0.4)
        axes.set_ylabel(unit, parse_math=False)
        axes.set_title(title, loc="left", fontsize=10, parse_math=False)
        return _svg(figure)


def share_bars(shares: Mapping[str, Mapping[str, float]]) -> str:
    """Plot stacked horizontal bars, one for each score in order: the shares of prompt, seed and remainder (0 to 1).
    Where all are 0, the bar says that the score is the same everywhere. :class:`MissingExtraError` without matplotlib.
    """
    with _figure(width_in=7.6, height_in=1.1 + 0.42 * len(shares)) as figure:
        axes = figure.add_subplot()
        starts = [0.0] * len(shares)
        for part, colour in SHARE_COLOURS.items():
            widths = [of_score[part] for of_score in shares.values()]
            bars = axes.barh(range(len(shares)), widths, left=starts, color=colour, label=part, height=0.66)
            words = [f"{100 * width:.0f} %" if width >= 0.06 else "" for width in widths]
            axes.bar_label(bars, words, label_type="center", fontsize=8, color="#222")
            starts = [start + width for start, width in zip(starts, widths, strict=True)]
        for row, end in enumerate(starts):
            if end == 0:
                axes.text(0.01, row, "the same everywhere", va="center", fontsize=8, color="#666")
        axes.set_xlim(0, 1)
        axes.set_xticks([0, 0.25, 0.5, 0.75, 1], labels=["0", "25 %", "50 %", "75 %", "100 %"])
        axes.set_xlabel("share of the variance")
        _name_rows(axes, shares)
        return _svg(figure)


def time_bars(seconds: Mapping[str, tuple[float, float]]) -> str:
    """Plot two horizontal bars for each name, on a logarithmic scale: seconds the first time, and from then on.
    :class:`MissingExtraError` without matplotlib.
    """
    with _figure(width_in=7.6, height_in=1.2 + 0.55 * len(seconds)) as figure:
        axes = figure.add_subplot()
        for index, (label, colour) in enumerate((("the first time", "#bab0ac"), ("from then on", _DOT_COLOUR))):
            places = [row - 0.2 + 0.4 * index for row in range(len(seconds))]
            values = [pair[index] for pair in seconds.values()]
            bars = axes.barh(places, values, color=colour, label=label, height=0.38)
            axes.bar_label(bars, fmt="{:.3g} s", padding=3, fontsize=8, color="#222")
        axes.set_xscale("log")
        axes.set_xlabel("seconds from the constructed pipeline to the end of its first call")
        axes.margins(x=0.2)
        _name_rows(axes, seconds)
        return _svg(figure)


def _name_rows(axes: Any, names: Iterable[str]) -> None:
    """Write a name at each row, from top to bottom, and what the colours mean above them."""
    labels = list(names)
    axes.set_yticks(range(len(labels)), labels=labels, parse_math=False)
    axes.invert_yaxis()
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1.0), ncols=3, frameon=False, fontsize=8)


def prompt_labels(prompts: Sequence[str]) -> list[str]:
    """Return the prompts if all are short and in Latin-1, which every font holds; else numbered from 1, and cut."""
    whole = [" ".join(prompt.split()) for prompt in prompts]
    held = [prompt if max(prompt, default="") <= "\xff" else "" for prompt in whole]
    cut = [text if len(text) <= _LABEL_LENGTH else f"{text[: _LABEL_LENGTH - 1].rstrip()}…" for text in held]
    return whole if cut == whole else [f"{number}  {label}".rstrip() for number, label in enumerate(cut, 1)]


@contextmanager
def _figure(*, width_in: float, height_in: float) -> Iterator[Figure]:
    """Open a figure without pyplot and with matplotlib's own defaults, so that no user's configuration shows."""
    needed = "matplotlib, which plots need,"
    matplotlib = import_extra("matplotlib", needed, "report")
    figures = import_extra("matplotlib.figure", needed, "report")
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
        yield figures.Figure(figsize=(width_in, height_in))


def _svg(figure: Any) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()
