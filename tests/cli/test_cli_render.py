"""Sizes, ages, tables and the progress display."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from datetime import datetime, timezone
from pathlib import Path
from types import MappingProxyType
from typing import TypeAlias

import pytest
from rich.console import Console

from pipevault.cache.outcome import Clock, Step
from pipevault.cli import render
from pipevault.cli.progress import DETAIL_LENGTH, StepProgress, step_label
from pipevault.digest import Digest

NOW = datetime(2025, 2, 1, 12, tzinfo=timezone.utc)


class TerminalText(io.StringIO):
    def isatty(self) -> bool:
        return True


Terminal: TypeAlias = Callable[[], AbstractContextManager[TerminalText]]


@pytest.mark.parametrize(
    ("size_bytes", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (5_312_211, "5.3 MB"), (10**13, "10.0 TB"), (10**16, "10000.0 TB")],
)
def test_size(size_bytes: int, text: str) -> None:
    assert render.size_text(size_bytes) == text


@pytest.mark.parametrize(
    ("created_at", "text"),
    [
        ("2025-02-01T11:59:30+00:00", "just now"),
        ("2025-02-01T12:00:09+00:00", "just now"),
        ("2025-02-01T11:30:00+00:00", "30 min ago"),
        ("2025-02-01T11:30:00", "30 min ago"),
        ("2025-02-01T11:30:00+02:00", "2 h ago"),
        ("2025-01-29T11:00:00+00:00", "3 d ago"),
        ("2024-11-01T11:00:00+00:00", "2024-11-01"),
        ("yesterday", "yesterday"),
    ],
)
def test_age(created_at: str, text: str) -> None:
    assert render.age_text(created_at, NOW) == text


def test_a_value_with_markup_is_shown_as_it_stands() -> None:
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(render.table(("A",), [("[bold]x[/bold]",)]))
    console.print(render.facts([("name", "[red]y")]))
    text = console.export_text()
    assert "[bold]x[/bold]" in text
    assert "[red]y" in text


def test_a_table_without_rows_is_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    render.show(render.table(("A",), []), render.facts([("name", "y")]), render.table(("B",), []))
    assert capsys.readouterr().out == "name  y\n"


def test_digests_paths_and_dataclasses_in_a_document(capsys: pytest.CaptureFixture[str]) -> None:
    step = Step("unet", "compile", 1.5)
    render.print_json({"key": Digest("a" * 64), "path": Path("/vault"), "steps": (step,), "map": MappingProxyType({})})
    assert json.loads(capsys.readouterr().out) == {
        "key": "a" * 64,
        "path": "/vault",
        "steps": [{"part": "unet", "action": "compile", "seconds": 1.5, "detail": "", "position": "", "failed": False}],
        "map": {},
    }
    with pytest.raises(TypeError, match="A set cannot stand in a document"):
        render.print_json({"keys": {1}})


@pytest.mark.parametrize("width", [80, 40, 20])
def test_a_key_is_never_broken_across_lines(width: int) -> None:
    key = "6754ab906843"
    console = Console(width=width, record=True, file=io.StringIO())
    rows = [(key, "a long text " * 20, "another one " * 20)]
    console.print(render.table(("KEY", "REASON", "DETAIL"), rows))
    assert key in console.export_text()


def test_rows_are_cut_in_elastic_columns_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "30")
    columns, rows = ("KEY", "MODEL", "SIZE"), [("6754ab906843", "StableDiffusionPipeline", "604.5 kB")]
    render.show_rows(columns, rows, right=("SIZE",), elastic=("MODEL",))
    assert capsys.readouterr().out.splitlines() == [
        "KEY           MODEL       SIZE",
        "─" * 30,
        "6754ab906843  Stabl…  604.5 kB",
    ]


def test_leaves_of_nested_mappings_keep_their_order() -> None:
    nested = {"b": {"d": 1, "c": [1, {"x": 2}]}, "a": None, "e": {}}
    assert render.flat(nested) == [("b.d", 1), ("b.c", [1, {"x": 2}]), ("a", None), ("e", {})]


@pytest.mark.parametrize(("value", "text"), [("cpu", "cpu"), (1, "1"), (None, "null"), ([1, "é"], '[1, "é"]')])
def test_value(value: object, text: str) -> None:
    assert render.value_text(value) == text


@pytest.fixture
def terminal() -> Terminal:
    """Standard error as a terminal inside the context that it gives; pytest's own takes its place before each test."""

    @contextmanager
    def replaced() -> Iterator[TerminalText]:
        stream, before = TerminalText(), sys.stderr
        sys.stderr = stream
        try:
            yield stream
        finally:
            sys.stderr = before

    return replaced


class TestPlainProgress:
    @pytest.fixture(autouse=True)
    def _capture(self, capsys: pytest.CaptureFixture[str]) -> None:
        self.capsys = capsys

    def shown(self, *steps: Step) -> list[str]:
        with StepProgress() as progress:
            for step in steps:
                progress(step)
        return self.capsys.readouterr().err.splitlines()

    def test_a_step_has_a_line_when_it_begins_and_when_it_ends(self) -> None:
        begins, ends = self.shown(Step("unet", "compile"), Step("unet", "compile", 12.345))
        assert begins.endswith(" s] unet: compiling")
        assert ends.endswith(" s] unet: compiling - done in 12.35 s")

    def test_a_step_that_fails_is_not_done(self) -> None:
        with StepProgress() as progress, suppress(ZeroDivisionError), Clock(progress).step("compile", "unet"):
            raise ZeroDivisionError
        _, ends = self.capsys.readouterr().err.splitlines()
        assert ends.endswith(" s] unet: compiling - failed after 0.00 s")

    def test_a_step_of_the_whole_pipeline(self) -> None:
        [line] = self.shown(Step("", "publish"))
        assert line.endswith(" s] publishing")

    def test_brief_steps_show_only_when_they_were_long(self) -> None:
        assert self.shown(Step("", "lookup"), Step("", "lookup", 0.01)) == []
        [line] = self.shown(Step("", "verify"), Step("", "verify", 3.0))
        assert "verifying artifacts - done in 3.00 s" in line

    def test_a_graph_is_told_by_its_place_and_not_by_its_signature(self) -> None:
        signature = "(float32[2,4])"
        steps = [Step("unet", "compile", None, signature, "2 of 5"), Step("unet", "check", None, signature)]
        assert [line.partition("] ")[2] for line in self.shown(*steps)] == [
            "unet: compiling (2 of 5)",
            "unet: comparing with eager",
        ]

    def test_the_subject_stands_before_each_step(self) -> None:
        with StepProgress() as progress:
            progress.subject = "512x512 (1 of 2)"
            progress(Step("unet", "compile"))
        assert self.capsys.readouterr().err.endswith("] 512x512 (1 of 2) unet: compiling\n")

    def test_an_unknown_action_is_shown_by_its_name(self) -> None:
        assert step_label(Step("vae", "tune", None, "3 of 9")) == "vae: tune (3 of 9)"

    def test_a_long_detail_is_cut(self) -> None:
        label = step_label(Step("unet", "export", None, "x" * 500))
        assert len(label) < 100
        assert "x" * (DETAIL_LENGTH - 1) + "…" in label


def test_live_progress_has_a_row_for_each_part_that_can_begin_anew(terminal: Terminal) -> None:
    with terminal() as shown, StepProgress() as progress:
        for step in (
            Step("", "capture"),
            Step("", "capture", 0.5),
            Step("unet", "compile"),
            Step("unet", "export", None, "[1,4]"),
            Step("unet", "compile", 9.0),
            Step("unet", "compile"),
        ):
            progress(step)
        live = progress._live
        assert live is not None
        rows = {task.description: task.finished for task in live.tasks}
        assert rows == {"recording every part's calls": True, "unet: compiling": False}
        progress(Step("unet", "compile", 1.0))
        assert all(task.finished for task in live.tasks)
    assert "unet: compiling" in shown.getvalue()


def test_live_progress_marks_a_step_that_failed(terminal: Terminal) -> None:
    with terminal() as shown, StepProgress() as progress, suppress(ZeroDivisionError), Clock(progress).step("compile"):
        raise ZeroDivisionError
    assert "✓" not in shown.getvalue()
    assert "compiling - failed" in shown.getvalue()


def test_live_progress_has_rows_of_its_own_for_each_subject(terminal: Terminal) -> None:
    with terminal(), StepProgress() as progress:
        for progress.subject in ("8x8", "16x16"):
            progress(Step("unet", "compile"))
        assert progress._live is not None
        assert [task.description for task in progress._live.tasks] == ["8x8 unet: compiling", "16x16 unet: compiling"]


def test_the_display_stops_after_an_error(terminal: Terminal) -> None:
    progress = StepProgress()
    with terminal(), suppress(ZeroDivisionError), progress:
        raise ZeroDivisionError
    assert progress._live is not None
    assert not progress._live.live.is_started
