"""The command as a whole: help, version, exit codes, how errors look."""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from helpers.command_runner import Run
from pipevault import errors
from pipevault.cli.app import COMMANDS, EXIT_CODES, INTERRUPTED, Commands, exit_code
from pipevault.digest import Digest
from pipevault.store.vault import Vault


def pipevault(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pipevault", *map(str, arguments)]
    variables = {**os.environ, **environment}
    return subprocess.run(command, env=variables, capture_output=True, text=True, stdin=subprocess.DEVNULL)


def error_classes() -> list[type[errors.PipevaultError]]:
    return [
        found for _, found in inspect.getmembers(errors, inspect.isclass) if issubclass(found, errors.PipevaultError)
    ]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_each_command_has_examples(run: Run, command: str) -> None:
    result = run(command, "--help")
    assert result.exit_code == 0
    assert "Examples:" in result.stdout
    assert f"  pipevault {command}" in result.stdout


def test_help_lists_every_command_and_every_exit_code(run: Run) -> None:
    text = run("--help").stdout
    assert [name for name in COMMANDS if f"  {name} " not in text] == []
    words = " ".join(text.split())
    assert [meaning for _, _, meaning in EXIT_CODES if meaning not in words] == []
    listed = re.findall(r"^ +(\d+)  \w", text, re.MULTILINE)
    assert listed == [str(code) for code in sorted({0, INTERRUPTED, *(code for _, code, _ in EXIT_CODES)})]


def test_every_error_class_has_the_exit_code_of_its_own_row_or_its_nearest_base() -> None:
    listed = [row[0] for row in EXIT_CODES]
    for error_class in error_classes():
        nearest = next(base for base in error_class.__mro__ if base in listed)
        chosen = next(row[0] for row in EXIT_CODES if issubclass(error_class, row[0]))
        assert chosen is nearest, f"a base of {error_class.__name__} stands before it in EXIT_CODES"


def test_exit_codes_that_scripts_rely_on(tmp_path: Path) -> None:
    codes = {
        2: errors.UnknownModeError("x", ("compile",)),
        3: errors.UnknownKeyError("x", "ab"),
        4: errors.MissError("x", "ab", "why"),
        5: errors.TrainingModeError("x", "unet"),
        6: errors.CorruptEntryError("x", tmp_path),
        7: errors.VaultFullError("x", tmp_path),
        8: errors.NewerVaultError("x", tmp_path),
        9: errors.LockTimeoutError("x", "ab", 1.0),
        10: errors.WrongMachineError("x"),
        11: errors.NoRecordError("x"),
        12: errors.NewerRecordError("x"),
        13: errors.RecordDigestError("x"),
        14: errors.BadRecordError("x", "seeds"),
        15: errors.RecordTooLargeError("x"),
        16: errors.CannotSaveError("x", tmp_path),
        17: errors.MissingExtraError("x", "video"),
        18: errors.NotComparableError("x"),
        19: errors.UnknownRecordKeyError("x", "ab"),
        20: errors.ChangedWeightsError("x", ("unet",)),
        21: errors.OtherMachineError("x"),
        22: errors.DifferentOutputError("x"),
        23: errors.UnknownLevelError("x", ("off",)),
        24: errors.GeneratorDeviceError("x"),
        25: errors.GeneratorCountError("x"),
        26: errors.BadSuiteError("x", "case"),
        27: errors.NoGoldenError("x"),
        30: errors.PinError("x", "prod"),
        31: errors.EntryInUseError("x", "ab"),
        32: errors.BundleError("x", tmp_path),
        33: errors.NewerBundleError("x", tmp_path),
        34: errors.SignatureError("x", tmp_path),
        29: errors.DifferentKeyError("x"),
        28: errors.BadSeedError("x", -2),
        1: errors.PipevaultError("x"),
    }
    assert {exit_code(error): error for error in codes.values()} == codes


def failing(error: BaseException) -> click.Command:
    def fail() -> None:
        raise error

    class FailingCommand(Commands):
        def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command:
            return click.Command(cmd_name, callback=fail)

    return FailingCommand("pipevault")


def test_an_error_is_one_line_on_stderr() -> None:
    result = CliRunner().invoke(
        failing(errors.CorruptEntryError("the first line\n  and the second", Path("x"))), ["fail"]
    )
    assert result.exit_code == 6
    assert result.stdout == ""
    assert result.stderr == "pipevault: the first line and the second\n"


def test_debug_shows_the_traceback_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIPEVAULT_DEBUG", "1")
    result = CliRunner().invoke(failing(errors.PipevaultError("what happened")), ["fail"])
    assert result.exit_code == 1
    assert "Traceback (most recent call last)" in result.stderr
    assert result.stderr.endswith("\npipevault: what happened\n")


def test_an_error_that_is_none_of_ours_is_one_line_and_its_stack_is_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    result = CliRunner().invoke(failing(ZeroDivisionError("division by zero")), ["fail"])
    assert result.exit_code == 1
    line = "pipevault: ZeroDivisionError: division by zero. PIPEVAULT_DEBUG=1 shows where it was raised.\n"
    assert result.stderr == line
    monkeypatch.setenv("PIPEVAULT_DEBUG", "1")
    result = CliRunner().invoke(failing(ZeroDivisionError("division by zero")), ["fail"])
    assert "Traceback (most recent call last)" in result.stderr


def test_interrupted() -> None:
    result = CliRunner().invoke(failing(KeyboardInterrupt()), ["fail"])
    assert (result.exit_code, result.stderr) == (130, "pipevault: interrupted\n")


def test_no_arguments_show_the_help(run: Run) -> None:
    result = run()
    assert "Usage: pipevault" in result.stdout + result.stderr


class TestProcess:
    def test_version(self) -> None:
        result = pipevault("--version")
        assert (result.returncode, result.stdout.split()[0]) == (0, "pipevault")

    def test_unknown_command(self) -> None:
        result = pipevault("lss")
        assert result.returncode == 2
        assert "lss" in result.stderr

    def test_unknown_key(self, vault: Vault) -> None:
        result = pipevault("show", "0123456789", "--dir", vault.root)
        assert result.returncode == 3
        assert result.stderr.count("\n") == 1
        assert "0123456789" in result.stderr

    def test_damaged_manifest(self, vault: Vault, broken_key: Digest) -> None:
        result = pipevault("show", broken_key.hex, "--dir", vault.root)
        assert result.returncode == 6
        assert "Traceback" not in result.stderr

    def test_folder_that_is_no_vault(self, tmp_path: Path) -> None:
        (tmp_path / "letter.txt").write_text("hello")
        result = pipevault("ls", "--dir", tmp_path)
        assert result.returncode == 8
        assert "letter.txt" in result.stderr

    def test_vault_of_a_newer_version(self, vault: Vault) -> None:
        vault.layout.vault_file.write_text('{"pipevault_vault": 99}')
        result = pipevault("ls", "--dir", vault.root)
        assert result.returncode == 8
        assert "Upgrade" in result.stderr

    def test_a_mode_in_the_environment_that_does_not_exist(self) -> None:
        result = pipevault("where", PIPEVAULT_MODE="fast")
        assert result.returncode == 2
        assert "compile, require, off" in result.stderr

    def test_a_config_file_that_does_not_exist(self, tmp_path: Path) -> None:
        result = pipevault("where", PIPEVAULT_CONFIG=str(tmp_path / "none.toml"))
        assert result.returncode == 2
        assert "none.toml" in result.stderr
