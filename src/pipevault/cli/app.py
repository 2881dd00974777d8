"""The command ``pipevault``: its commands, and the one table that turns errors into exit codes."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any

import click

from pipevault import errors
from pipevault.cli import render
from pipevault.settings import DEBUG_VARIABLE

EXIT_CODES: tuple[tuple[type[errors.PipevaultError], int, str], ...] = (
    (errors.BadSuiteError, 26, "a golden suite cannot be used as it is written"),
    (errors.UnknownLevelError, 23, "there is no such determinism level"),
    (errors.BadSeedError, 28, "what was given as a seed is none"),
    (errors.GeneratorDeviceError, 24, "a generator is on a device that it cannot draw for"),
    (errors.GeneratorCountError, 25, "fewer or more generators than samples"),
    (errors.UnknownRecordKeyError, 19, "the vault does not hold the entry that a record names"),
    (errors.SettingsError, 2, "an option, a setting or an environment variable cannot be used"),
    (errors.BadCallError, 2, "the pipeline does not accept this call (size, inputs)"),
    (errors.UnknownKeyError, 3, "no entry has this key, or several begin with it"),
    (errors.MissError, 4, "mode require: the vault holds no usable entry"),
    (errors.UnfrozenCallError, 4, "a call fits no frozen graph"),
    (errors.CannotFreezeError, 5, "the pipeline or a part of it cannot be frozen"),
    (errors.ChangedPartError, 5, "a frozen part was changed"),
    (errors.CorruptEntryError, 6, "an artifact or a manifest is damaged"),
    (errors.SignatureError, 34, "an entry has no signature by a trusted key where one is required"),
    (errors.VaultFullError, 7, "no space was left while publishing"),
    (errors.UnloadableGraphError, 38, "the system refuses to map the code of a graph"),
    (errors.TemporaryFolderError, 39, "no temporary folder can be used to compile in"),
    (errors.OldVaultError, 35, "an earlier pipevault wrote the vault, in a format that is no longer read"),
    (errors.VaultError, 8, "the vault folder cannot be used"),
    (errors.TurnTimeoutError, 36, "other threads used a pipeline or torch's switches for too long"),
    (errors.LockTimeoutError, 9, "another process held a key's lock for too long"),
    (errors.WrongMachineError, 10, "an artifact was built for another machine"),
    (errors.NoRecordError, 11, "the file holds no run record"),
    (errors.NewerRecordError, 12, "a later pipevault wrote the run record"),
    (errors.OldRecordError, 37, "an earlier pipevault wrote the run record, in a form that is no longer read"),
    (errors.RecordDigestError, 13, "the run record was changed after it was written"),
    (errors.BadRecordError, 14, "a field of the run record is missing or wrong"),
    (errors.RecordTooLargeError, 15, "the run record does not fit into a file of this format"),
    (errors.CannotSaveError, 16, "an output could not be written"),
    (errors.MissingExtraError, 17, "an optional dependency is not installed"),
    (errors.NotComparableError, 18, "two outputs differ in shape or type"),
    (errors.ChangedWeightsError, 20, "the weights are not those of the record or golden"),
    (errors.OtherMachineError, 21, "the record or golden is of another machine type"),
    (errors.DifferentOutputError, 22, "the output differs from the one that was recorded"),
    (errors.PinError, 30, "a pin cannot be made or removed"),
    (errors.EntryInUseError, 31, "the entry is pinned, or a live process has loaded it"),
    (errors.NewerBundleError, 33, "a later pipevault wrote the bundle"),
    (errors.BundleError, 32, "a bundle is damaged, unsafe, or none"),
    (errors.DifferentKeyError, 29, "versions or settings are not those of the record"),
    (errors.NoGoldenError, 27, "nothing was recorded for a case of the suite"),
    (errors.PipevaultError, 1, "any other error; doctor: something needs attention"),
)
"""Error class, exit code, meaning. The first row that fits decides: a subclass stands before its base."""

INTERRUPTED = 130

COMMANDS: Mapping[str, str] = {
    "demo": "pipevault.cli.demo:demo",
    "prewarm": "pipevault.cli.prewarm:prewarm",
    "bench": "pipevault.cli.bench:bench",
    "compare": "pipevault.cli.compare:compare",
    "sweep": "pipevault.cli.sweep:sweep",
    "replay": "pipevault.cli.replay:replay",
    "ls": "pipevault.cli.commands:list_entries",
    "show": "pipevault.cli.commands:show",
    "explain": "pipevault.cli.explain:explain",
    "golden": "pipevault.cli.golden:golden",
    "rm": "pipevault.cli.removal:remove",
    "prune": "pipevault.cli.prune:prune",
    "pin": "pipevault.cli.pins:pin",
    "unpin": "pipevault.cli.pins:unpin",
    "pins": "pipevault.cli.pins:pins",
    "keygen": "pipevault.cli.keys:keygen",
    "sign": "pipevault.cli.keys:sign",
    "verify": "pipevault.cli.verify:verify",
    "export": "pipevault.cli.bundle:export",
    "import": "pipevault.cli.bundle:import_",
    "stats": "pipevault.cli.stats:stats",
    "where": "pipevault.cli.commands:where",
    "doctor": "pipevault.cli.doctor:doctor",
}
"""Where each command is; imported when it is called, so that a quick one stays quick."""


def exit_code(error: errors.PipevaultError) -> int:
    return next(code for error_class, code, _ in EXIT_CODES if isinstance(error, error_class))


def report(error: errors.PipevaultError) -> int:
    """Prints ``error`` as one line on standard error, with ``PIPEVAULT_DEBUG=1`` after its traceback; its exit code."""
    if os.environ.get(DEBUG_VARIABLE) == "1":
        import traceback

        render.say("".join(traceback.format_exception(error)), err=True, nl=False)
    render.say(f"pipevault: {' '.join(str(error).split())}", err=True)
    return exit_code(error)


class Commands(click.Group):
    """The commands of :data:`COMMANDS`; their errors are reported and set the exit code."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module, _, name = COMMANDS[cmd_name].partition(":")
        command = getattr(import_module(module), name)
        assert isinstance(command, click.Command)
        return command

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except errors.PipevaultError as error:
            ctx.exit(report(error))
        except KeyboardInterrupt:
            ctx.exit(_interrupted())
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except Exception as error:  # whatever a model, a library or the system raises: nobody asked for its stack
            ctx.exit(report(_unforeseen(error)))

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        meanings: dict[int, list[str]] = {}
        for _, code, meaning in EXIT_CODES:
            meanings.setdefault(code, []).append(meaning)
        rows = [(code, "; ".join(texts)) for code, texts in sorted(meanings.items())]
        with formatter.section("Exit codes"):
            lines = [(0, "success"), *rows, (INTERRUPTED, "interrupted")]
            formatter.write_dl([(f"{code:>3}", meaning) for code, meaning in lines])
        formatter.write_paragraph()
        formatter.write_text(f"{DEBUG_VARIABLE}=1 adds the traceback to an error.")


def _unforeseen(error: Exception) -> errors.PipevaultError:
    wrapped = errors.PipevaultError(f"{type(error).__name__}: {error}. {DEBUG_VARIABLE}=1 shows where it was raised.")
    wrapped.__cause__ = error
    return wrapped


def _interrupted() -> int:
    render.say("pipevault: interrupted", err=True)
    return INTERRUPTED


def _print_version(ctx: click.Context, _: click.Parameter, wanted: bool) -> None:
    if wanted:
        from pipevault import __version__

        render.say(f"pipevault {__version__}")
        ctx.exit()


@click.command(
    "pipevault", cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110}
)
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_print_version,
    help="Show the version and exit.",
)
def app() -> None:
    """Freeze the compiled graphs of a diffusion pipeline once, load the same graphs everywhere."""


class _PlainLines(logging.Formatter):
    """Messages without what a terminal would obey: they tell of manifests and records that anybody may have written."""

    def format(self, record: logging.LogRecord) -> str:
        return render.printable(super().format(record))


def _show_log() -> None:
    handler = logging.StreamHandler()
    handler.setLevel(logging.WARNING)
    handler.setFormatter(_PlainLines("%(message)s"))
    logging.getLogger("pipevault").addHandler(handler)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; leaves with ``SystemExit``."""
    _show_log()
    app.main(args=None if arguments is None else list(arguments), prog_name="pipevault")
