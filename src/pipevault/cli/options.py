"""The class of all commands, options that several of them share, each written once, and the vault that they name."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import click

from pipevault.cli import render
from pipevault.digest import Digest
from pipevault.errors import SettingsError
from pipevault.settings import Settings
from pipevault.store.places import iter_keys
from pipevault.store.vault import Vault

Function = TypeVar("Function", bound=Callable[..., Any])
Parts = tuple[str, ...] | Literal["auto"] | None


class Command(click.Command):
    """A command that prints its help as everything is printed: to a reader that leaves, or to a full disk."""

    def get_help_option(self, ctx: click.Context) -> click.Option | None:
        if (option := super().get_help_option(ctx)) is not None:
            option.callback = _print_help
        return option


def _print_help(ctx: click.Context, _: click.Parameter, wanted: bool) -> None:
    if wanted and not ctx.resilient_parsing:
        render.say(ctx.get_help())
        ctx.exit()


class Group(Command, click.Group):
    """A command that has commands."""

    command_class = Command


command = functools.partial(click.command, cls=Command)


def open_vault(dir: Path | None) -> Vault:
    """Open the vault in ``dir`` or, without it, that of the settings; it must exist."""
    return Vault.of(Settings.resolve(dir=dir))


def keys_in(vault: Vault, prefixes: Sequence[str]) -> list[Digest]:
    """Return the keys that begin with ``prefixes``, each once; all keys of the vault for none."""
    if not prefixes:
        return list(iter_keys(vault.layout))
    return list(dict.fromkeys(vault.find(prefix).key.digest for prefix in prefixes))


def together(*options: Callable[[Function], Function]) -> Callable[[Function], Function]:
    def add(function: Function) -> Function:
        for option in reversed(options):
            function = option(function)
        return function

    return add


def names_in(values: Sequence[str]) -> tuple[str, ...]:
    """Return the names of an option that takes commas and may come again: ``("unet,vae.decoder", "text_encoder")``."""
    return tuple(name.strip() for value in values for name in value.split(","))


def take(given: dict[str, Any], *names: str) -> dict[str, Any]:
    """Return the options ``names`` of a command, and remove them from those that were ``given``."""
    return {name: given.pop(name) for name in names}


class CountRange(click.ParamType):  # type: ignore[type-arg,unused-ignore] # generic from click 8.3 on
    """A whole number above 0, or two of them with dots between: ``1..4``."""

    name = "number"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | tuple[int, int]:
        ends = str(value).split("..")
        if len(ends) > 2 or not all(end.strip().isascii() and end.strip().isdigit() and int(end) for end in ends):
            self.fail(f"invalid number {value!r}: expected a whole number above 0, or a range, 1..4.", param, ctx)
        numbers = [int(end) for end in ends]
        if numbers[0] > numbers[-1]:
            self.fail(f"{value!r} runs downwards. Write {numbers[1]}..{numbers[0]}.", param, ctx)
        return numbers[0] if len(numbers) == 1 else (numbers[0], numbers[1])


class _GivenPath(click.Path):
    """A path; an empty one, as of a variable that is not set, would be the current folder."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if value == "":
            self.fail("the path is empty. Give one, or leave the option out.", param, ctx)
        return super().convert(value, param, ctx)


class OutputFile(click.Path):
    """The path of a file to write in a folder that exists, refused before anything is compiled."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        path = Path(os.fsdecode(super().convert(value, param, ctx)))
        if path.is_dir() or not path.absolute().parent.is_dir():
            self.fail(f"{path} cannot be written: give a file in a folder that exists.", param, ctx)
        return path


def path_option(*names: str, metavar: str, help: str, **more: Any) -> Callable[[Function], Function]:
    return click.option(*names, metavar=metavar, type=_GivenPath(path_type=Path), help=help, **more)


def mode_option(*modes: str) -> Callable[[Function], Function]:
    return click.option("--mode", metavar="NAME", help=f"{' or '.join(modes)}. Default: the setting, compile.")


dir_option = path_option("--dir", metavar="FOLDER", help="The vault. Default: the setting, the user's cache.")
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON for programs.")
vault_options = together(dir_option, json_option)
dry_run_option = click.option("--dry-run", is_flag=True, help="Only say what would be done.")
keys_argument = click.argument("keys", metavar="[KEY]...", nargs=-1)
model_argument = click.argument("model", metavar="MODEL")
device_option = click.option("--device", metavar="NAME", help="cpu, cuda, ... Default: the GPU if there is one.")
class_option = click.option("--pipeline-class", metavar="NAME", help="A class of diffusers in place of the model's.")
jobs_option = click.option(
    "--jobs", metavar="NUMBER", type=click.IntRange(min=0), help="Graphs to compile at a time. Default: cores."
)
timeout_option = click.option(
    "--timeout", "timeout_s", metavar="SECONDS", type=click.FloatRange(min=1), help="For each process."
)

OPENING = ("dtype", "device", "pipeline_class")
opening_options = together(
    click.option("--dtype", metavar="NAME", help="float32, float16 or bfloat16. Default: float32."),
    device_option,
    class_option,
)
"""Adds :data:`OPENING`, which ``open_pipeline`` takes."""

request_options = together(
    click.option(
        "--prompt",
        "prompts",
        metavar="TEXT",
        multiple=True,
        help="A picture for each; the option any number of times. Default for demo: the ten digits.",
    ),
    click.option("--steps", metavar="NUMBER", type=click.IntRange(min=1), help="Default: the model's."),
    click.option("--guidance-scale", metavar="NUMBER", type=float, help="Default: the model's."),
    click.option("--size", metavar="WxH", help="Pixels. Default: the model's."),
    click.option(
        "--seed",
        metavar="NUMBER",
        type=int,
        default=0,
        show_default=True,
        help="-1 draws one, which is then reported.",
    ),
)
"""Adds what :func:`pipevault.cli.pipelines.request_from` takes."""


def call_options(*, several: bool = False) -> Callable[[Function], Function]:
    """Return what adds the options of a call; with ``several``, sizes, batch sizes and dtypes come any number
    of times.
    """

    def repeated(option: str, help: str, **more: Any) -> Callable[[Function], Function]:
        name = option.removeprefix("--").replace("-", "_")
        if several:
            return click.option(option, f"{name}s", multiple=True, help=f"{help} Any number of times.", **more)
        return click.option(option, name, help=help, **more)

    return together(
        repeated("--size", "Pixels, or a range: 512x512..1024x768. Default: the model's.", metavar="WxH"),
        repeated(
            "--batch-size",
            "Prompts in one call, or a range: 1..4. Default: 1; for demo 10.",
            metavar="NUMBER",
            type=CountRange(),
        ),
        repeated("--dtype", "float32, float16 or bfloat16. Default: float32.", metavar="NAME"),
        device_option,
        click.option(
            "--frames", "num_frames", metavar="NUMBER", type=CountRange(), help="Frames of a video, or a range."
        ),
        click.option(
            "--guidance/--no-guidance", default=None, help="Classifier-free guidance. Default: the pipeline's own."
        ),
        click.option(
            "--weights",
            metavar="POLICY",
            help="bound (a fine-tune uses the same graphs) or baked. Default: the setting, bound.",
        ),
        click.option(
            "--level",
            metavar="NAME",
            help="Level; strict and invariant have graphs of their own. Default: the setting, repeatable.",
        ),
        click.option("--regions", metavar="HOW", help="blocks, off (whole parts) or auto. Default: the setting, auto."),
        click.option(
            "--parts",
            metavar="NAMES",
            multiple=True,
            callback=_part_names,
            help="Parts to freeze, with commas or the option again; auto: those that gain 3 %. Default: all.",
        ),
    )


def _part_names(_: click.Context, __: click.Parameter, values: Sequence[str]) -> Parts:
    if list(values) == ["auto"]:
        return "auto"
    names = names_in(values)
    if not all(names):
        raise SettingsError("Empty name in --parts. Give names with commas between them, such as unet,vae.decoder.")
    return names or None
