"""What people read (tables, sizes, ages) and what programs read (JSON on standard output)."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

PIPED_WIDTH = 180
"""Columns where the output is no terminal and ``COLUMNS`` is not set, so that keys stay whole for other programs."""

_SIZE_UNITS = ("B", "kB", "MB", "GB", "TB")
_AGE_UNITS = (("d", 86_400), ("h", 3_600), ("min", 60))
_LONGEST_AGE_S = 30 * 86_400
_LONGEST_RICH_TABLE = 200


_ESCAPES = re.compile(
    "\x1b\\[[0-?]*[ -/]*[@-~]"  # colours and cursor movements
    "|[\x1b\x9d][\\]P^_X][^\x07\x1b\x9c]*(?:\x07|\x1b\\\\|\x9c)?"  # window titles, links, clipboards
    "|\x9b[0-?]*[ -/]*[@-~]"
    "|\x1b[ -/]*[0-~]?"
)
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069\ufeff]")
_HIDDEN_IN_JSON = re.compile("[\x7f-\x9f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069\ufeff]")


def printable(text: str) -> str:
    """Return ``text`` without what a terminal would obey: escape sequences, control characters, changes of direction.

    Names, reasons and prompts come from manifests, events, bundles and records, which anybody may have written. Line
    feeds and tabs stay; what is no character becomes a replacement mark.
    """
    plain = text.encode("utf-8", "replace").decode("utf-8").replace("\r\n", "\n")
    return _CONTROLS.sub("", _ESCAPES.sub("", plain))


def say(text: str, *, err: bool = False, nl: bool = True) -> None:
    """Print text for people; every command prints through this, a table of this module, or :func:`print_json`."""
    click.echo(printable(text), err=err, nl=nl)


def print_json(document: Any) -> None:
    """Print a document for programs; characters that a terminal would obey are escaped."""
    text = json.dumps(document, indent=2, ensure_ascii=False)
    text = "".join(f"\\u{ord(c):04x}" if "\ud800" <= c <= "\udfff" else c for c in text)
    click.echo(_HIDDEN_IN_JSON.sub(lambda found: f"\\u{ord(found[0]):04x}", text))


def note(text: str) -> None:
    """Print a line for people on standard error, which leaves standard output to the result."""
    say(text, err=True)


def show(*tables: Table) -> None:
    """Prints the tables with a blank line between two; where the output is no terminal, without trailing blanks."""
    console = _console()
    if console.is_terminal:
        for number, block in enumerate(tables):
            if number:
                console.print()
            console.print(block)
        return
    for number, block in enumerate(tables):
        if number:
            click.echo()
        with console.capture() as capture:
            console.print(block)
        click.echo("\n".join(line.rstrip() for line in capture.get().removesuffix("\n").split("\n")))


def show_rows(columns: Sequence[str], rows: Sequence[Sequence[str]], *, right: Sequence[str] = ()) -> None:
    """A table; one of over :data:`_LONGEST_RICH_TABLE` rows as plain lines that are not wrapped: Rich takes a
    millisecond for each row.
    """
    rows = [[printable(cell) for cell in row] for row in rows]
    if len(rows) <= _LONGEST_RICH_TABLE:
        show(table(columns, rows, right=right))
        return
    widths = [max(len(column), *(len(row[index]) for row in rows)) for index, column in enumerate(columns)]
    form = "   ".join(
        f"{{:{'>' if column in right else '<'}{width}}}" for column, width in zip(columns, widths, strict=True)
    )
    rule = "─" * (sum(widths) + 3 * (len(widths) - 1))
    say("\n".join([form.format(*columns).rstrip(), rule, *(form.format(*row).rstrip() for row in rows)]))


def _console() -> Console:
    from rich.console import Console

    made = Console(highlight=False)
    if made.is_terminal:
        return made
    columns = os.environ.get("COLUMNS", "")
    return Console(highlight=False, width=int(columns) if columns.isdecimal() and int(columns) else PIPED_WIDTH)


def table(columns: Sequence[str], rows: Iterable[Sequence[str]], *, right: Sequence[str] = ()) -> Table:
    """A table of plain text: a value is never read as markup. ``right`` names the columns of numbers."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    made = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for column in columns:
        made.add_column(column, justify="right" if column in right else "left", overflow="fold")
    for row in rows:
        made.add_row(*(Text(printable(cell)) for cell in row))
    return made


def facts(rows: Iterable[tuple[str, str]]) -> Table:
    """Two columns without a head: names and values."""
    from rich.table import Table
    from rich.text import Text

    made = Table.grid(padding=(0, 2))
    made.add_column()
    made.add_column(overflow="fold")
    for name, value in rows:
        made.add_row(Text(printable(name), style="bold"), Text(printable(value)))
    return made


def size_text(size_bytes: int) -> str:
    size = float(size_bytes)
    for unit in _SIZE_UNITS:
        if size < 1000 or unit == _SIZE_UNITS[-1]:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    raise AssertionError("the last unit holds every size")


def count_text(number: int, one: str, several: str) -> str:
    return f"{number} {one if number == 1 else several}"


def age_text(created_at: str, now: datetime | None = None) -> str:
    """How long ago an ISO 8601 time was, its date if that is over a month; what is no time as it stands."""
    try:
        then = datetime.fromisoformat(created_at)
    except ValueError:
        return created_at
    if then.tzinfo is None:
        then = then.replace(tzinfo=timezone.utc)
    age_s = ((now or datetime.now(timezone.utc)) - then).total_seconds()
    if age_s > _LONGEST_AGE_S:
        return then.date().isoformat()
    for unit, length_s in _AGE_UNITS:
        if age_s >= length_s:
            return f"{age_s // length_s:.0f} {unit} ago"
    return "just now"


def value_text(value: Any) -> str:
    """A plain JSON value in one line, text without quotation marks."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def flat(value: Any, prefix: str = "") -> list[tuple[str, Any]]:
    """The leaves of nested mappings under dotted names, in the order in which they stand."""
    if not isinstance(value, Mapping) or not value:
        return [(prefix, value)]
    return [leaf for name, item in value.items() for leaf in flat(item, f"{prefix}.{name}" if prefix else str(name))]
