"""The command as a whole: help, version, exit codes, how errors look, Ctrl-C, readers that leave, completion."""

from __future__ import annotations

import ast
import importlib
import json
import os
import pkgutil
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

import pipevault
from helpers.command_runner import Run
from pipevault import errors
from pipevault.cli import render
from pipevault.cli.app import COMMANDS, GROUPS, Commands
from pipevault.cli.exits import KINDS, MEANINGS, Exit, kind_of
from pipevault.digest import Digest
from pipevault.store.vault import Vault


def pipevault_process(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pipevault", *map(str, arguments)]
    variables = {**os.environ, **environment}
    return subprocess.run(command, env=variables, capture_output=True, text=True, stdin=subprocess.DEVNULL)


def subclasses(root: type[Any]) -> Iterator[type[Any]]:
    for found in root.__subclasses__():
        yield found
        yield from subclasses(found)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_each_command_has_examples(run: Run, command: str) -> None:
    result = run(command, "--help")
    assert result.exit_code == 0
    assert "Examples:" in result.stdout
    assert f"  pipevault {command}" in result.stdout


def test_help_lists_every_command_in_its_group_and_every_exit_code(run: Run) -> None:
    blocks = dict(re.findall(r"^(\w[\w ]*):\n((?:  .*\n)+)", run("--help").stdout, re.MULTILINE))
    for title, names in GROUPS.items():
        assert re.findall(r"^  (\w+)  ", blocks[title], re.MULTILINE) == list(names)
    assert re.findall(r"^ +(\d+)  \w", blocks["Exit codes"], re.MULTILINE) == [str(int(code)) for code in Exit]
    words = " ".join(blocks["Exit codes"].split())
    assert [meaning for meaning in MEANINGS.values() if meaning not in words] == []


def test_the_help_fits_80_columns(run: Run) -> None:
    for command in ([], *([name] for name in COMMANDS)):
        lines = run(*command, "--help", terminal_width=80).stdout.splitlines()
        assert [line for line in lines if len(line) > 80 and not line.lstrip().startswith("pipevault ")] == []


class TestExitCodes:
    def test_there_are_six(self) -> None:
        assert {exit.name: int(exit) for exit in Exit} == {
            "DONE": 0,
            "NO": 1,
            "USAGE": 2,
            "REFUSED": 3,
            "NOT_NOW": 4,
            "INTERRUPTED": 130,
        }

    def test_every_error_class_has_a_row(self) -> None:
        """Every error class of the package, wherever it stands, but those that begin with an underscore."""
        found: set[type[Any]] = {errors.PipevaultError, *subclasses(errors.PipevaultError)}
        ours = {error for error in found if error.__module__.startswith("pipevault.") and error.__name__[0] != "_"}
        assert {error.__name__ for error in ours - set(KINDS)} == set()

    def test_no_module_has_an_error_class_of_its_own(self) -> None:
        """They would be seen above only if something had imported their module."""
        names = {error.__name__ for error in KINDS}
        for module in pkgutil.walk_packages(pipevault.__path__, "pipevault."):
            spec = importlib.util.find_spec(module.name)
            assert spec is not None
            assert spec.origin is not None
            if module.name == "pipevault.errors":
                continue
            for node in ast.walk(ast.parse(Path(spec.origin).read_text("utf-8"))):
                if isinstance(node, ast.ClassDef):
                    bases = {ast.unparse(base).rpartition(".")[2] for base in node.bases}
                    assert not bases & names, f"{module.name}.{node.name} belongs into errors.py"

    def test_each_class_has_a_word_of_its_own(self) -> None:
        words = [word for _, word in KINDS.values()]
        assert len(set(words)) == len(words)
        assert [word for word in words if not re.fullmatch(r"[a-z]+(-[a-z]+)*", word)] == []

    def test_codes_and_words_that_scripts_rely_on(self, tmp_path: Path) -> None:
        expected: list[tuple[BaseException, int, str]] = [
            (errors.MissError("x", "ab", "why"), 1, "miss"),
            (errors.UnknownKeyError("x", "ab"), 1, "unknown-key"),
            (errors.DifferentOutputError("x"), 1, "different-output"),
            (errors.NoRecordError("x"), 1, "no-record"),
            (errors.UnknownModeError("x", ("compile",)), 2, "unknown-mode"),
            (errors.BadSeedError("x", -2), 2, "bad-seed"),
            (errors.BadCallError("x"), 2, "bad-call"),
            (errors.CorruptEntryError("x", tmp_path), 3, "corrupt-entry"),
            (errors.SignatureError("x", tmp_path), 3, "bad-signature"),
            (errors.EntryInUseError("x", "ab"), 3, "entry-in-use"),
            (errors.TrainingModeError("x", "unet"), 3, "training-mode"),
            (errors.VaultFullError("x", tmp_path), 4, "vault-full"),
            (errors.LockTimeoutError("x", "ab", 1.0), 4, "lock-timeout"),
            (errors.WrongMachineError("x"), 4, "wrong-machine"),
            (errors.MissingExtraError("x", "video"), 4, "missing-extra"),
            (errors.PipevaultError("x"), 4, "failed"),
            (ZeroDivisionError("x"), 4, "failed"),
        ]
        assert [(error, *kind_of(error)) for error, _, _ in expected] == expected

    def test_a_subclass_of_somebody_elses_has_the_row_of_its_base(self) -> None:
        class _Own(errors.BadSeedError):
            pass

        assert kind_of(_Own("x", 1)) == KINDS[errors.BadSeedError]


def failing(error: BaseException, *, first: object = None) -> click.Command:
    """The command line with a command that prints ``first`` as JSON, if it is given, and raises ``error``."""

    def fail(as_json: bool) -> None:
        if first is not None:
            render.print_json(first)
        raise error

    class FailingCommand(Commands):
        def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command:
            option = click.Option(["--json", "as_json"], is_flag=True)
            return click.Command(cmd_name, callback=fail, params=[option])

    return FailingCommand("pipevault")


class TestErrors:
    def run(self, error: BaseException, *options: str, first: object = None) -> Result:
        return CliRunner().invoke(failing(error, first=first), ["fail", *options])

    def test_one_line_on_stderr_that_begins_with_the_kind(self) -> None:
        result = self.run(errors.CorruptEntryError("the first line\n  and the second", Path("x")))
        assert (result.exit_code, result.stdout) == (3, "")
        assert result.stderr == "pipevault: corrupt-entry: the first line and the second\n"

    def test_json_has_the_kind_and_the_message(self) -> None:
        result = self.run(errors.MissError("There is none.", "ab", "why"), "--json")
        assert result.exit_code == 1
        assert json.loads(result.stdout) == {"code": "miss", "message": "There is none."}
        assert result.stderr == "pipevault: miss: There is none.\n"

    def test_a_command_that_has_printed_its_document_prints_no_other(self) -> None:
        result = self.run(errors.DifferentOutputError("They differ."), "--json", first={"equal": False})
        assert json.loads(result.stdout) == {"equal": False}
        assert result.exit_code == 1

    def test_wrong_usage_is_a_document_too(self, run: Run) -> None:
        result = run("ls", "--sort", "colour", "--json")
        assert (result.exit_code, json.loads(result.stdout)["code"]) == (2, "usage")
        assert "'colour'" in json.loads(result.stdout)["message"]
        assert run("ls", "--sort", "colour").stdout == ""

    def test_debug_shows_the_traceback_too(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("PIPEVAULT_DEBUG", "1")
        result = self.run(errors.PipevaultError("what happened"))
        assert result.exit_code == 4
        assert "Traceback (most recent call last)" in result.stderr
        assert result.stderr.endswith("\npipevault: failed: what happened\n")

    def test_an_error_of_another_library_names_its_class_and_how_to_see_its_stack(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        result = self.run(ZeroDivisionError("division by zero"))
        assert result.exit_code == 4
        line = "failed: ZeroDivisionError: division by zero. PIPEVAULT_DEBUG=1 shows where it was raised."
        assert result.stderr == f"pipevault: {line}\n"
        monkeypatch.setenv("PIPEVAULT_DEBUG", "1")
        assert "Traceback (most recent call last)" in self.run(ZeroDivisionError("division by zero")).stderr


def test_no_arguments_show_the_help(run: Run) -> None:
    result = run()
    assert "Usage: pipevault" in result.stdout + result.stderr


class TestInterrupt:
    """Ctrl-C: exit code 130 and one line at most, whatever it strikes."""

    @pytest.fixture(autouse=True)
    def _interrupts_are_not_ignored(self) -> Iterator[None]:
        """A shell starts what runs in its background with SIGINT ignored, and children inherit that."""
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        yield
        signal.signal(signal.SIGINT, before)

    def struck_in(self, module: str, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
        """A run in which Ctrl-C is pressed while ``module`` is imported, in place of which there is nothing."""
        (folder / f"{module}.py").write_text(
            "import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(5)\n"
        )
        paths = os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])
        return pipevault_process(*arguments, PYTHONPATH=paths)

    @pytest.mark.parametrize("module", ["dataclasses", "click", "msgspec", "torch", "diffusers"])
    def test_while_something_is_imported(self, tmp_path: Path, module: str) -> None:
        result = self.struck_in(module, tmp_path, "explain", "demo", "--dir", str(tmp_path / "vault"))
        assert (result.returncode, result.stdout, result.stderr) == (130, "", "pipevault: interrupted\n")

    def test_in_the_first_line_of_the_command(self, tmp_path: Path) -> None:
        (tmp_path / "signal.py").write_text("import os, time\nos.kill(os.getpid(), 2)\ntime.sleep(5)\n")
        paths = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
        result = subprocess.run(
            [sys.executable, "-c", "from pipevault_command import main; main()"],
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONPATH": paths},
        )
        assert (result.returncode, result.stderr) == (130, "pipevault: interrupted\n")

    def test_an_import_that_makes_another_error_of_it(self, tmp_path: Path) -> None:
        (tmp_path / "torch.py").write_text(
            "import os, signal, time\n"
            "try:\n    os.kill(os.getpid(), signal.SIGINT)\n    time.sleep(5)\n"
            "except BaseException:\n    raise ImportError('half imported')\n"
        )
        paths = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
        result = pipevault_process("explain", "demo", "--dir", tmp_path / "vault", PYTHONPATH=paths)
        assert (result.returncode, result.stderr) == (130, "pipevault: interrupted\n")

    @pytest.mark.parametrize(
        "catch",
        ["try:\n    strike()\nexcept BaseException:\n    strike()", "class A:\n    def __del__(self): strike()\nA()"],
        ids=["the second one ends it", "one that a finalizer swallows"],
    )
    def test_where_it_is_swallowed(self, catch: str) -> None:
        code = (
            "import os, signal, time\nfrom pipevault.cli.interrupts import catch_interrupts\ncatch_interrupts()\n"
            f"def strike():\n    os.kill(os.getpid(), signal.SIGINT)\n    time.sleep(0.1)\n{catch}\nprint('went on')"
        )
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert (result.returncode, result.stdout, result.stderr) == (130, "", "pipevault: interrupted\n")

    def test_what_a_shell_ignores_in_the_background_stays_ignored(self) -> None:
        code = (
            "import signal\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\n"
            "from pipevault.cli.interrupts import catch_interrupts\ncatch_interrupts()\n"
            "print(signal.getsignal(signal.SIGINT) is signal.SIG_IGN)"
        )
        assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "True\n"

    @pytest.mark.parametrize("error", [KeyboardInterrupt(), click.Abort()], ids=repr)
    def test_in_a_command(self, error: BaseException, capfd: pytest.CaptureFixture[str]) -> None:
        code = (
            "import sys\nfrom test_cli_app import failing\nimport click\n"
            f"failing({type(error).__module__.replace('builtins', '__builtins__')}.{type(error).__name__}())"
            ".main(['fail'])"
        )
        paths = os.pathsep.join([*map(str, Path(__file__).parents[:2]), os.environ.get("PYTHONPATH", "")])
        result = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": paths}
        )
        assert (result.returncode, result.stderr) == (130, "pipevault: interrupted\n")


class TestReaderThatLeaves:
    """``pipevault … | head -1``: no word about it, and the exit code is that of the command."""

    def closed(self, *arguments: str | Path) -> subprocess.CompletedProcess[bytes]:
        reader, writer = os.pipe()
        os.close(reader)
        command = [sys.executable, "-m", "pipevault", *map(str, arguments)]
        try:
            return subprocess.run(command, stdout=writer, stderr=subprocess.PIPE)
        finally:
            os.close(writer)

    @pytest.mark.parametrize("options", [(), ("--json",)])
    def test_ls(self, vault: Vault, options: tuple[str, ...]) -> None:
        result = self.closed("ls", "--dir", vault.root, *options)
        assert result.returncode == 0
        assert b"roken" not in result.stderr

    def test_a_table_after_another(self, vault: Vault, small_key: Digest) -> None:
        result = self.closed("show", small_key.hex, "--dir", vault.root)
        assert (result.returncode, result.stderr) == (0, b"")

    def test_the_verdict_stays(self, vault: Vault, large_key: Digest) -> None:
        artifact = vault.lookup(large_key)
        assert artifact is not None
        vault.layout.artifact_file(artifact.artifacts[1].digest).write_bytes(b"damaged")
        assert self.closed("verify", "--dir", vault.root, "--json").returncode == 3

    @pytest.mark.parametrize("arguments", [["--help"], ["demo", "--help"], ["golden", "check", "-h"], ["--version"]])
    def test_help(self, arguments: list[str]) -> None:
        result = self.closed(*arguments)
        assert (result.returncode, result.stderr) == (0, b"")


class TestOutputThatCannotBeWritten:
    @pytest.mark.parametrize("options", [(), ("--json",)])
    def test_a_full_disk(self, vault: Vault, small_key: Digest, options: tuple[str, ...]) -> None:
        command = [sys.executable, "-m", "pipevault", "show", small_key.hex, "--dir", str(vault.root), *options]
        with Path("/dev/full").open("w") as full:
            result = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
        line = "cannot-save: Standard output cannot be written: No space left on device. Send it elsewhere."
        assert (result.returncode, result.stderr) == (4, f"pipevault: {line}\n")

    @pytest.mark.parametrize("arguments", [["--help"], ["demo", "--help"], ["golden", "check", "-h"], ["--version"]])
    def test_the_help_on_a_full_disk(self, arguments: list[str]) -> None:
        with Path("/dev/full").open("w") as full:
            command = [sys.executable, "-m", "pipevault", *arguments]
            result = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
        line = "cannot-save: Standard output cannot be written: No space left on device. Send it elsewhere."
        assert (result.returncode, result.stderr) == (4, f"pipevault: {line}\n")

    def test_both_outputs_full(self, vault: Vault, small_key: Digest) -> None:
        command = [sys.executable, "-m", "pipevault", "show", small_key.hex, "--dir", str(vault.root), "--json"]
        with Path("/dev/full").open("w") as full:
            assert subprocess.run(command, stdout=full, stderr=full).returncode == 4

    def test_a_closed_output(self, vault: Vault) -> None:
        command = f"unset COLUMNS; exec {sys.executable} -m pipevault ls --dir {vault.root} >&-"
        result = subprocess.run(["sh", "-c", command], stderr=subprocess.PIPE, text=True)
        assert (result.returncode, "isatty" in result.stderr) == (0, False)


def test_only_the_command_hides_that_transformers_does_without_torchvision() -> None:
    code = (
        "import contextlib\nfrom pipevault.cli.app import main\n"
        "from transformers import SiglipImageProcessor\n"
        "with contextlib.suppress(SystemExit):\n    main(['where'])\n"
        "from transformers import CLIPImageProcessor\n"
        "from transformers.utils.import_utils import logger\nlogger.warning('something else')"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stderr
    assert re.findall(r"`(\w+)` requires torchvision", told) == ["SiglipImageProcessor"], "before, in a program"
    assert "something else" in told


@pytest.mark.parametrize(
    ("shell", "typed", "offered"), [("bash", "pipevault pr", "prune"), ("zsh", "pipevault pr", "prune")]
)
def test_a_shell_completes_commands(shell: str, typed: str, offered: str) -> None:
    result = pipevault_process(_PIPEVAULT_COMPLETE=f"{shell}_complete", COMP_WORDS=typed, COMP_CWORD="1")
    assert offered in result.stdout.replace(",", "\n").split("\n")
    assert "ls" not in result.stdout.replace(",", "\n").split("\n")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_for_a_shell(shell: str) -> None:
    if shell == "bash" and subprocess.run(["bash", "-c", "exit 0"]).returncode:
        pytest.skip("no bash")
    assert "_PIPEVAULT_COMPLETE" in pipevault_process(_PIPEVAULT_COMPLETE=f"{shell}_source").stdout


class TestProcess:
    def test_version(self) -> None:
        result = pipevault_process("--version")
        assert (result.returncode, result.stdout.split()[0]) == (0, "pipevault")

    def test_unknown_command(self) -> None:
        result = pipevault_process("lss")
        assert result.returncode == 2
        assert "No such command 'lss'. Did you mean ls?" in result.stderr
        assert "No such command 'qqq'" in pipevault_process("qqq").stderr

    def test_unknown_key(self, vault: Vault) -> None:
        result = pipevault_process("show", "0123456789", "--dir", vault.root)
        assert result.returncode == 1
        assert result.stderr.count("\n") == 1
        assert "0123456789" in result.stderr

    def test_damaged_manifest(self, vault: Vault, broken_key: Digest) -> None:
        result = pipevault_process("show", broken_key.hex, "--dir", vault.root)
        assert result.returncode == 3
        assert "Traceback" not in result.stderr

    def test_folder_that_is_no_vault(self, tmp_path: Path) -> None:
        (tmp_path / "letter.txt").write_text("hello")
        result = pipevault_process("ls", "--dir", tmp_path)
        assert result.returncode == 1
        assert "letter.txt" in result.stderr

    def test_an_empty_path_is_not_the_current_folder(
        self, run: Run, vault: Vault, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(vault.root)
        assert run("ls", "--dir", ".").exit_code == 0
        result = run("ls", "--dir", "", "--json")
        assert (result.exit_code, json.loads(result.stdout)["code"]) == (2, "usage")
        assert "the path is empty" in result.stderr

    def test_a_damaged_marker(self, run: Run, vault: Vault) -> None:
        vault.layout.vault_file.write_text("{")
        result = run("ls", "--dir", vault.root, "--json")
        assert (result.exit_code, json.loads(result.stdout)["code"]) == (3, "damaged-vault")

    def test_vault_of_a_newer_version(self, vault: Vault) -> None:
        vault.layout.vault_file.write_text('{"pipevault_vault": 99}')
        result = pipevault_process("ls", "--dir", vault.root)
        assert result.returncode == 3
        assert "Upgrade" in result.stderr

    def test_a_mode_in_the_environment_that_does_not_exist(self) -> None:
        result = pipevault_process("where", PIPEVAULT_MODE="fast")
        assert result.returncode == 2
        assert "compile, require, off" in result.stderr

    def test_a_config_file_that_does_not_exist(self, tmp_path: Path) -> None:
        result = pipevault_process("where", PIPEVAULT_CONFIG=str(tmp_path / "none.toml"))
        assert result.returncode == 2
        assert "none.toml" in result.stderr


def test_the_page_about_the_command_line_has_every_exit_code() -> None:
    page = (Path(__file__).parents[2] / "docs" / "cli.md").read_text("utf-8")
    assert re.findall(r"^\| (\d+) \|", page, re.MULTILINE) == [str(int(code)) for code in Exit]
