"""What a stress script measured, as a table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Figure:
    """One row. ``kept``: whether a promise was kept; ``None`` where the figure is only a measure."""

    name: str
    value: str
    goal: str = ""
    kept: bool | None = None


def markdown(figures: Sequence[Figure]) -> str:
    """Return the figures as a Markdown table in which broken promises stand out."""
    rows = [
        f"| {figure.name} | {figure.value}{' **broken**' if figure.kept is False else ''} | {figure.goal} |"
        for figure in figures
    ]
    return "\n".join(["| what | figure | goal |", "| --- | --- | --- |", *rows])
