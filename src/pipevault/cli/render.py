"""Printing: tables, sizes and ages for people, JSON for programs."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from pipevault.digest import Digest
from pipevault.errors import CannotSaveError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

PIPED_WIDTH = 180
"""Columns of a wrapped table where the output is not a terminal and ``COLUMNS`` is not set."""

_AGE_UNITS = (("d", 86_400), ("h", 3_600), ("min", 60))
_LONGEST_AGE_S = 30 * 86_400
_NARROWEST = 6
_WHOLE = frozenset({"KEY", "NEAREST"})
"""Columns whose cells are never broken across lines, so that they can be copied."""
_ANSWERED = "pipevault.answered"

_ESCAPES = re.compile(
    "\x1b\\[[0-?]*[ -/]*[@-~]"  # colours and cursor movements
    "|[\x1b\x9d][\\]P^_X][^\x07\x1b\x9c]*(?:\x07|\x1b\\\\|\x9c)?"  # window titles, links, clipboards
    "|\x9b[0-?]*[ -/]*[@-~]"
    "|\x1b[ -/]*[0-~]?"
)
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069\ufeff]")
_HIDDEN_IN_JSON = re.compile("[\ud800-\udfff\x7f-\x9f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069\ufeff]")


def printable(text: str) -> str:
    """Return ``text`` without what a terminal would obey: names, reasons and prompts may be anybody's.

    Line feeds and tabs stay; what is not a character becomes a replacement mark.
    """
    if text.isascii() and text.isprintable():
        return text
    plain = text.encode("utf-8", "replace").decode("utf-8").replace("\r\n", "\n")
    return _CONTROLS.sub("", _ESCAPES.sub("", plain))


def say(text: str, *, err: bool = False, nl: bool = True) -> None:
    """Print text for people; every command prints through this, a table of this module, or :func:`print_json`."""
    _echo(printable(text), err=err, nl=nl)


def print_json(document: Any) -> None:
    """Print a document for programs; characters that a terminal would obey are escaped."""
    text = json.dumps(document, indent=2, ensure_ascii=False, default=_plain)
    _echo(_HIDDEN_IN_JSON.sub(lambda found: f"\\u{ord(found[0]):04x}", text))
    if context := click.get_current_context(silent=True):
        context.meta[_ANSWERED] = True


def _plain(value: Any) -> Any:
    if isinstance(value, (Digest, Path)):
        return str(value)
    if is_dataclass(value):
        return {field.name: getattr(value, field.name) for field in fields(value)}
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"A {type(value).__name__} cannot stand in a document: {value!r}.")


def has_answered() -> bool:
    """Tell whether the command has printed its document: standard output holds one at most."""
    context = click.get_current_context(silent=True)
    return context is not None and _ANSWERED in context.meta


def _echo(text: str = "", *, err: bool = False, nl: bool = True) -> None:
    """Print; where the reader has left, as ``head`` does, the rest goes nowhere and the command goes on.

    :class:`CannotSaveError` where the system refuses it, as for a full disk; there too the rest goes nowhere.
    """
    try:
        click.echo(text, err=err, nl=nl)
    except OSError as error:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, (sys.stderr if err else sys.stdout).fileno())
        os.close(nowhere)
        if not isinstance(error, BrokenPipeError):
            name = "error" if err else "output"
            raise CannotSaveError(
                f"Standard {name} cannot be written: {error.strerror}. Send it elsewhere.",
                Path("/dev/stderr" if err else "/dev/stdout"),
            ) from error


def note(text: str) -> None:
    say(text, err=True)


def show(*tables: Table) -> None:
    """Print the tables that have rows with a blank line between two; outside a terminal without trailing blanks."""
    console = _console()
    for number, block in enumerate(one for one in tables if one.row_count):
        if number:
            _echo()
        if console.is_terminal:
            console.print(block)
            continue
        console.file = io.StringIO()
        console.print(block)
        _echo("\n".join(line.rstrip() for line in console.file.getvalue().removesuffix("\n").split("\n")))


def show_rows(
    columns: Sequence[str], rows: Sequence[Sequence[str]], *, right: Sequence[str] = (), elastic: Sequence[str] = ()
) -> None:
    """Print a table with a line for each row, however many; the ``elastic`` columns are cut to fit the width."""
    lines = [[printable(cell).replace("\n", " ") for cell in row] for row in (columns, *rows)]
    widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
    shrinking = [index for index, column in enumerate(columns) if column in elastic]
    while shrinking and (limit := _width()) and sum(widths) + 2 * (len(widths) - 1) > limit:
        widest = max(shrinking, key=widths.__getitem__)
        if widths[widest] <= _NARROWEST:
            break
        widths[widest] -= 1
    form = "  ".join(
        f"{{:{'>' if column in right else '<'}{width}}}" for column, width in zip(columns, widths, strict=True)
    )
    cut = ([_cut(cell, width) for cell, width in zip(line, widths, strict=True)] for line in lines)
    head, *texts = (form.format(*cells).rstrip() for cells in cut)
    say("\n".join([head, "─" * (sum(widths) + 2 * (len(widths) - 1)), *texts]))


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else f"{text[: width - 1]}…"


def _width() -> int | None:
    """Return how wide the output is: ``COLUMNS``, else the terminal; ``None`` where it is neither."""
    columns = os.environ.get("COLUMNS", "")
    if columns.isdecimal() and int(columns):
        return int(columns)
    return shutil.get_terminal_size().columns if sys.stdout and sys.stdout.isatty() else None


def _console() -> Console:
    from rich.console import Console

    made = Console(highlight=False)
    return made if made.is_terminal else Console(highlight=False, width=_width() or PIPED_WIDTH)


def table(columns: Sequence[str], rows: Iterable[Sequence[str]], *, right: Sequence[str] = ()) -> Table:
    """Return a table of plain text: a value is never read as markup. ``right`` names the columns of numbers."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    made = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    cells = [[Text(printable(cell)) for cell in row] for row in rows]
    for index, column in enumerate(columns):
        whole = max((row[index].cell_len for row in cells), default=0) if column in _WHOLE else None
        justify: Literal["right", "left"] = "right" if column in right else "left"
        made.add_column(column, justify=justify, overflow="fold", no_wrap=bool(whole), min_width=whole)
    for row in cells:
        made.add_row(*row)
    return made


def facts(rows: Iterable[tuple[str, str]]) -> Table:
    from rich.table import Table
    from rich.text import Text

    made = Table.grid(padding=(0, 2))
    made.add_column()
    made.add_column(overflow="fold")
    for name, value in rows:
        made.add_row(Text(printable(name), style="bold"), Text(printable(value)))
    return made


def size_text(size_bytes: float) -> str:
    size, unit = size_bytes, "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if size < 1000:
            break
        size, unit = size / 1000, larger
    return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"


def count_text(number: int, one: str, several: str = "") -> str:
    """Return ``1 artifact`` or ``2 artifacts``; ``several`` is the plural where it is not ``one`` with an s."""
    return f"{number} {one if number == 1 else several or f'{one}s'}"


def age_text(created_at: str, now: datetime | None = None) -> str:
    """Return how long ago an ISO 8601 time was, or its date if that is over a month; other text as it stands."""
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


def time_text(time_s: float | None) -> str:
    return "" if time_s is None else datetime.fromtimestamp(time_s, timezone.utc).isoformat(timespec="seconds")


def value_text(value: Any) -> str:
    """Return a plain JSON value in one line, text without quotation marks."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def flat(value: Any, prefix: str = "") -> list[tuple[str, Any]]:
    """Return the leaves of nested mappings under dotted names, in the order in which they stand."""
    if not isinstance(value, Mapping) or not value:
        return [(prefix, value)]
    return [leaf for name, item in value.items() for leaf in flat(item, f"{prefix}.{name}" if prefix else str(name))]
