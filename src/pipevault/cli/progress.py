"""Progress on standard error: the steps of a load, with plain lines where that is not a terminal, and bytes."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import TracebackType
from typing import TYPE_CHECKING, Any

from pipevault.cli.render import note, printable

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from pipevault.cache.outcome import Step

ACTIONS = {
    "fingerprint": "reading the pipeline's fingerprint",
    "lookup": "looking into the vault",
    "verify": "verifying artifacts",
    "capture": "recording every part's calls",
    "export": "exporting",
    "compile": "compiling",
    "check": "comparing with eager",
    "save": "saving",
    "publish": "publishing",
    "load": "loading",
    "wait": "waiting",
    "draw": "drawing",
}
BRIEF_ACTIONS = frozenset({"fingerprint", "lookup", "verify", "save"})
"""Milliseconds as a rule, so they are shown only if they took :data:`NOTABLE_S` or longer."""
NOTABLE_S = 1.0
GRAPH_ACTIONS = frozenset({"compile", "check"})
"""Steps of a part that come for each of its graphs; they begin with its place among all in place of its signature."""
DETAIL_LENGTH = 60


class StepProgress:
    """A context manager to give as ``progress=``. ``subject``, which may change, is what the next steps are about."""

    def __init__(self) -> None:
        self.subject = ""
        self._live: Progress | None = None
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> StepProgress:
        # Made here and not at the first step: importing it must not count as a part of the load.
        self._started_s = time.monotonic()
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import Progress, SpinnerColumn, Task, TextColumn, TimeElapsedColumn
            from rich.text import Text

            class Mark(SpinnerColumn):
                def render(self, task: Task) -> Any:
                    return Text("✗", "red") if task.fields.get("failed") else super().render(task)

            spinner = Mark(finished_text="[green]✓[/]")
            label = TextColumn("{task.description}", markup=False)
            self._live = Progress(spinner, TimeElapsedColumn(), label, console=Console(stderr=True))
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def __call__(self, step: Step) -> None:
        if step.action in BRIEF_ACTIONS and (step.seconds is None or step.seconds < NOTABLE_S):
            return
        if step.part and step.action in GRAPH_ACTIONS and step.seconds is None:
            step = replace(step, detail=step.position)
        label = printable(f"{self.subject} {step_label(step)}".lstrip()) + (" - failed" if step.failed else "")
        if self._live is not None:
            self._show_live(self._live, step, label)
            return
        elapsed_s = time.monotonic() - self._started_s
        ended = "" if step.seconds is None else f" {'after' if step.failed else '- done in'} {step.seconds:.2f} s"
        note(f"[{elapsed_s:7.1f} s] {label}{ended}")

    def _show_live(self, live: Progress, step: Step, label: str) -> None:
        row = f"{self.subject} {step.part or step.action}"
        if row not in self._tasks:
            self._tasks[row] = live.add_task(label, total=1)
        elif step.seconds is None and live.tasks[self._tasks[row]].finished:
            live.reset(self._tasks[row])
        completed = None if step.seconds is None else 1
        live.update(self._tasks[row], description=label, completed=completed, failed=step.failed)


def step_label(step: Step) -> str:
    action = ACTIONS.get(step.action, step.action)
    label = f"{step.part}: {action}" if step.part else action
    if not step.detail:
        return label
    detail = step.detail if len(step.detail) <= DETAIL_LENGTH else f"{step.detail[: DETAIL_LENGTH - 1]}…"
    return f"{label} ({detail})"


@contextmanager
def byte_bar(label: str) -> Iterator[Callable[[int, int], None]]:
    """Show a bar on a terminal. Give a function to pass as ``progress=``: it takes the bytes done and those in all."""
    if not sys.stderr.isatty():
        yield lambda done_bytes, total_bytes: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(printable(label), total=None)
        yield lambda done_bytes, total_bytes: bar.update(task, completed=done_bytes, total=total_bytes)
