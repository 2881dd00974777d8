"""The command ``pipevault``: its commands, and what becomes of their errors."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from importlib import import_module
from typing import Any

import click

from pipevault import __version__
from pipevault.cli import exits, interrupts, render
from pipevault.cli.options import Group
from pipevault.errors import CannotSaveError
from pipevault.settings import DEBUG_VARIABLE

GROUPS: Mapping[str, Sequence[str]] = {
    "Freeze and run": ("demo", "prewarm", "bench"),
    "Look": ("ls", "show", "explain", "stats", "where", "doctor"),
    "Keep": ("pin", "unpin", "pins", "prune", "rm", "verify"),
    "Share": ("export", "import", "keygen", "sign"),
    "Prove": ("replay", "compare", "golden", "sweep"),
}
COMMANDS = tuple(name for names in GROUPS.values() for name in names)
_HOMES: Mapping[str, str] = {
    **dict.fromkeys(("ls", "show", "where"), "commands"),
    **dict.fromkeys(("pin", "unpin"), "pins"),
    **dict.fromkeys(("prune", "rm"), "removal"),
    **dict.fromkeys(("export", "import"), "bundle"),
    **dict.fromkeys(("keygen", "sign"), "keys"),
}
"""The modules of commands that have none of their name. Each is imported when it is called: a quick one stays quick."""

_AS_JSON = "pipevault.as_json"


class Commands(Group):
    """The commands of :data:`COMMANDS`; their errors are reported and set the exit code."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module = import_module(f"pipevault.cli.{_HOMES.get(cmd_name, cmd_name)}")
        return next(one for one in vars(module).values() if isinstance(one, click.Command) and one.name == cmd_name)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        near = get_close_matches(name, COMMANDS, n=1)
        if self.get_command(ctx, name) is None and near and not ctx.resilient_parsing:
            ctx.fail(f"No such command {name!r}. Did you mean {near[0]}?")
        return super().resolve_command(ctx, args)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        ctx.meta[_AS_JSON] = "--json" in args
        try:
            return super().parse_args(ctx, args)
        except CannotSaveError as error:  # of --help and --version
            ctx.exit(exits.report(error))

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (KeyboardInterrupt, click.Abort):
            ctx.exit(interrupts.tell_interrupted())
        except click.UsageError as error:
            if ctx.meta[_AS_JSON]:
                render.print_json({"code": "usage", "message": error.format_message()})
            raise
        except (click.ClickException, click.exceptions.Exit):
            raise
        except Exception as error:  # whatever a model, a library or the system raises: nobody asked for its stack
            if interrupts.has_struck():
                ctx.exit(interrupts.tell_interrupted())
            ctx.exit(exits.report(error, as_json=ctx.meta[_AS_JSON]))

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        width = max(map(len, COMMANDS))
        for title, names in GROUPS.items():
            with formatter.section(title):
                commands = ((name, self.get_command(ctx, name)) for name in names)
                formatter.write_dl(
                    [(name.ljust(width), found.get_short_help_str(100)) for name, found in commands if found]
                )

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Exit codes"):
            formatter.write_dl([(f"{code:>3}", meaning) for code, meaning in exits.MEANINGS.items()])
        formatter.write_paragraph()
        formatter.write_text(
            "The message of an error begins with its kind, such as miss or corrupt-entry, which is `code` in the "
            f"output of --json. {DEBUG_VARIABLE}=1 adds the traceback."
        )


def _print_version(ctx: click.Context, _: click.Parameter, wanted: bool) -> None:
    if wanted:
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
    """Messages without what a terminal would obey: manifests and records that they quote may be anybody's."""

    def format(self, record: logging.LogRecord) -> str:
        return render.printable(super().format(record))


def _show_log() -> None:
    from pipevault.compat.transformers import hide_torchvision_fallback

    handler = logging.StreamHandler()
    handler.setLevel(logging.WARNING)
    handler.setFormatter(_PlainLines("%(message)s"))
    logging.getLogger("pipevault").addHandler(handler)
    hide_torchvision_fallback()


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; leaves with ``SystemExit``."""
    interrupts.catch_interrupts()
    _show_log()
    app.main(args=None if arguments is None else list(arguments), prog_name="pipevault")
