"""A bar on standard error for work that is counted in bytes; nothing where that is no terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

from pipevault.cli.render import printable


@contextmanager
def byte_bar(label: str, stream: TextIO | None = None) -> Iterator[Callable[[int, int], None]]:
    """A function to give as ``progress=``: it takes the bytes done so far and the bytes in all."""
    stream = sys.stderr if stream is None else stream
    if not stream.isatty():
        yield lambda done_bytes, total_bytes: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(file=stream), transient=True) as bar:
        task = bar.add_task(printable(label), total=None)
        yield lambda done_bytes, total_bytes: bar.update(task, completed=done_bytes, total=total_bytes)
