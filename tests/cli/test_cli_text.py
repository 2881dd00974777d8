"""Nothing that a manifest, an event, a record or a name brings along is obeyed by a terminal."""

from __future__ import annotations

import ast
import json
import logging
import re
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import pipevault
from helpers.sample_records import sample_record
from pipevault.cli import app as app_module
from pipevault.cli import render
from pipevault.cli.app import COMMANDS, app
from pipevault.digest import Digest, digest_bytes
from pipevault.key import Key
from pipevault.store.manifest import ArtifactRef, Manifest
from pipevault.store.stats.summary import count
from pipevault.store.vault import Vault

EVIL = "\x1b[31mred\x1b[0m\x1b]0;title\x07\x1b]8;;http://evil\x1b\\link\x9b2J\x85\rover\x08\x00\u202egnp\u2066[bold]x[/bold]"
FILE_NAME = f"{EVIL.replace('/', '').replace(chr(0), '')}.png"
OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")
PACKAGE = Path(pipevault.__file__).parent
MAY_PRINT = {"render.py", "progress.py"}


def hostile_entry(vault: Vault, folder: Path, number: int) -> Digest:
    data = f"graph {number}".encode()
    digest = digest_bytes(data)
    (folder / digest.hex).write_bytes(data)
    key = Key({"pipeline": {"class": EVIL, "name": number}, "dtype": {EVIL: EVIL}, "machine": {"type": EVIL}})
    parts = {EVIL: {"status": "eager", "reason": EVIL, "graphs": []}}
    info = {"check": {"distance": 0.5}, "machine": {"host": EVIL}, "toolchain": {"torch": EVIL}, EVIL: EVIL}
    manifest = Manifest(key, parts, (ArtifactRef(digest, len(data), "graph.pt2"),), info, "2025-01-31T12:00:00+00:00")
    vault.publish(manifest, {digest: folder / digest.hex})
    return manifest.key.digest


@pytest.fixture
def root(tmp_path: Path) -> Path:
    vault = Vault.open(tmp_path / "vault")
    keys = [hostile_entry(vault, tmp_path, number) for number in range(3)]
    count(vault.layout, "miss", key=keys[0], reason=EVIL)
    broken = vault.layout.manifest_file(keys[2])
    broken.write_text(json.dumps({**json.loads(broken.read_text()), "created_at": EVIL}))
    record = sample_record(
        pipeline={"class": EVIL, "model": EVIL, "revision": EVIL, "scheduler": EVIL}, call={"prompt": EVIL, EVIL: EVIL}
    )
    (tmp_path / "record.json").write_text(record.to_json())
    (tmp_path / "other.json").write_text(json.dumps({"pipevault_record": EVIL}))
    return tmp_path


def commands(root: Path) -> list[list[str]]:
    vault, record = ["--dir", str(root / "vault")], str(root / "record.json")
    key = next(m.key.digest.hex for m in Vault.open(root / "vault").manifests() if isinstance(m, Manifest))
    return [
        ["ls", *vault],
        ["ls", *vault, "--json"],
        ["show", key, *vault],
        ["show", EVIL, *vault],
        ["rm", EVIL, *vault],
        ["prune", "--older-than", "1d", "--dry-run", *vault],
        ["pin", key, "--name", "prod", *vault],
        ["pin", EVIL, "--name", EVIL, *vault],
        ["pins", *vault],
        ["unpin", EVIL, *vault],
        ["verify", *vault],
        ["verify", *vault, "--json"],
        ["stats", *vault],
        ["stats", *vault, "--json"],
        ["export", EVIL, "-o", str(root / "a.pvb"), *vault],
        ["export", key, "-o", str(root / "b.pvb"), *vault],
        ["import", str(root / "record.json"), *vault],
        ["keygen", "-o", str(root / "signing.key"), "--comment", EVIL],
        ["sign", EVIL, "--key", EVIL, *vault],
        ["where", *vault],
        [
            "replay",
            record,
            str(root / "other.json"),
            str(root / f"{EVIL.replace('/', '').replace(chr(0), '')}.png"),
            *vault,
        ],
        ["replay", record, *vault, "--json"],
        ["compare", EVIL],
        ["bench", EVIL, "--ways", "eager"],
        ["sweep", EVIL, "--seeds", "0..1", "--out", str(root / "sweep")],
        ["golden", "check", EVIL],
        ["golden", "check", record],
        ["explain", EVIL, *vault],
        ["prewarm", EVIL, "--size", "8x8", *vault],
        ["demo", "--digits", EVIL],
    ]


def test_every_command_is_fed(root: Path) -> None:
    assert {line[0] for line in commands(root)} >= set(COMMANDS) - {"doctor"}


@pytest.mark.parametrize("index", range(30))
def test_no_command_prints_what_a_terminal_obeys(root: Path, index: int) -> None:
    arguments = commands(root)[index]
    result = CliRunner().invoke(app, arguments)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    printed = result.stdout + result.stderr
    assert printed
    assert not OBEYED.search(printed), OBEYED.findall(printed)
    if "--json" in arguments:
        json.loads(result.stdout)


def test_there_are_as_many_cases_as_commands_lines(root: Path) -> None:
    assert len(commands(root)) == 30


def test_markup_is_shown_as_it_stands(root: Path) -> None:
    printed = CliRunner().invoke(app, ["ls", "--dir", str(root / "vault")]).stdout
    assert "[bold]x[/bold]" in printed.replace("\n", "")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (EVIL, "redlinkovergnp[bold]x[/bold]"),
        ("plain ü 漢字 🎨\n\ttab", "plain ü 漢字 🎨\n\ttab"),
        ("a\r\nb\rc", "a\nbc"),
        ("\udcff", "?"),
        ("\x1b]52;c;ZXZpbA==\x07after", "after"),
        ("\x1bPq sixel \x1b\\after", "after"),
        ("\x1b", ""),
        ("\x1b[", ""),
    ],
)
def test_what_is_printable(text: str, expected: str) -> None:
    assert render.printable(text) == expected


def test_json_is_the_same_document_and_obeyed_by_nobody(capsys: pytest.CaptureFixture[str]) -> None:
    document = {"text": EVIL, "lone": "\udc80"}
    render.print_json(document)
    printed = capsys.readouterr().out
    assert not OBEYED.search(printed)
    assert json.loads(printed) == document


def test_log_lines_too(capsys: pytest.CaptureFixture[str]) -> None:
    logger = logging.getLogger("pipevault")
    handlers = list(logger.handlers)
    try:
        app_module._show_log()
        logger.warning("a manifest says %s", EVIL)
    finally:
        logger.handlers[:] = handlers
    printed = capsys.readouterr().err
    assert "a manifest says redlink" in printed
    assert not OBEYED.search(printed)


@pytest.mark.parametrize("path", sorted((PACKAGE / "cli").glob("*.py")), ids=lambda path: path.name)
def test_nothing_else_prints(path: Path) -> None:
    """A command that printed by itself would forget to look at its text."""
    if path.name in MAY_PRINT:
        return
    calls = [ast.unparse(node.func) for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    forbidden: list[Any] = [name for name in calls if name in ("print", "click.echo", "click.secho", "Console")]
    assert forbidden == []
