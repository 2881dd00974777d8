"""Dockerfile and compose.yaml: no image is built here; what they copy, call and promise is looked at."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import click
import pytest

from pipevault.cli.app import app

ROOT = Path(__file__).resolve().parents[2]
DOCKERFILE = ROOT / "Dockerfile"
COMMANDS = {"FROM", "RUN", "ARG", "ENV", "COPY", "WORKDIR", "USER", "EXPOSE", "HEALTHCHECK", "CMD", "SHELL"}


def instructions(text: str) -> list[tuple[str, str]]:
    """Return the instructions of a Dockerfile in order, each with its arguments on one line."""
    joined = re.sub(r"\\\n\s*", "", re.sub(r"^#.*\n", "", text, flags=re.MULTILINE))
    return [(name, rest) for name, _, rest in (line.partition(" ") for line in joined.splitlines() if line)]


@pytest.fixture(scope="module")
def steps() -> list[tuple[str, str]]:
    return instructions(DOCKERFILE.read_text("utf-8"))


def test_hadolint_has_nothing_to_say() -> None:
    hadolint = shutil.which("hadolint") or shutil.which("hadolint", path=str(Path(sys.executable).parent))
    if hadolint is None:
        pytest.skip("hadolint is not installed")
    result = subprocess.run([hadolint, "--no-color", str(DOCKERFILE)], capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (0, "")


def test_instructions_are_known_and_the_server_is_the_last_stage(steps: list[tuple[str, str]]) -> None:
    assert {name for name, _ in steps} <= COMMANDS
    starts = [index for index, (name, _) in enumerate(steps) if name == "FROM"]
    assert len(starts) == 2
    build, server = steps[starts[0] : starts[1]], steps[starts[1] :]
    assert any("g++" in rest for _, rest in build)
    assert not any("g++" in rest for _, rest in server)
    assert ("COPY", "--from=build /opt/vault /opt/vault") in server
    assert any(name == "ENV" and "PIPEVAULT_MODE=require" in rest for name, rest in server)
    assert [name for name, _ in server].index("USER") < [name for name, _ in server].index("CMD")


def test_both_stages_have_the_same_threads(steps: list[tuple[str, str]]) -> None:
    assert [rest for name, rest in steps if name == "ARG" and rest.startswith("THREADS")] == ["THREADS=1"] * 2
    assert sum(name == "ENV" and "OMP_NUM_THREADS=${THREADS}" in rest for name, rest in steps) == 2


def test_what_is_copied_is_there_and_is_sent_to_the_builder(steps: list[tuple[str, str]]) -> None:
    copied = [rest.split()[:-1] for name, rest in steps if name == "COPY" and not rest.startswith("--from")]
    sent = [line[1:] for line in (ROOT / ".dockerignore").read_text("utf-8").splitlines() if line.startswith("!")]
    for source in [item for items in copied for item in items]:
        assert (ROOT / source).exists(), source
        assert any(fnmatch(source, pattern) or source.startswith(f"{pattern}/") for pattern in sent), source


def test_commands_and_their_options_exist(steps: list[tuple[str, str]]) -> None:
    lines = "\n".join(rest for name, rest in steps if name == "RUN")
    called = re.findall(r"bin/pipevault (\w+)((?: +(?:--)?[^&\s]+)*)", lines)
    assert [command for command, _ in called] == ["prewarm", "verify"]
    for name, rest in called:
        command = app.get_command(click.Context(app), name)
        assert command is not None
        known = {option for parameter in command.params for option in parameter.opts}
        assert set(re.findall(r"--[\w-]+", rest)) <= known


def test_the_compose_file_builds_what_the_dockerfile_takes(steps: list[tuple[str, str]]) -> None:
    yaml: Any = pytest.importorskip("yaml")
    service = yaml.safe_load((ROOT / "compose.yaml").read_text("utf-8"))["services"]["server"]
    arguments = {rest.partition("=")[0] for name, rest in steps if name == "ARG"}
    assert set(service["build"]["args"]) <= arguments
    assert all(isinstance(value, str) for value in service["build"]["args"].values())
    exposed = next(rest for name, rest in steps if name == "EXPOSE")
    assert [port.rpartition(":")[2] for port in service["ports"]] == [exposed]
    assert service["read_only"] is True
    assert "/tmp" in service["tmpfs"]
