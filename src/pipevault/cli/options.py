"""Options that several commands share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import click

from pipevault.errors import SettingsError

Function = TypeVar("Function", bound=Callable[..., Any])


class CountRange(click.ParamType):  # type: ignore[type-arg,unused-ignore] # generic from click 8.3 on
    """A whole number above 0, or two of them with dots between: ``1..4``."""

    name = "number"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | tuple[int, int]:
        ends = str(value).split("..")
        if len(ends) > 2 or not all(end.strip().isascii() and end.strip().isdigit() and int(end) for end in ends):
            self.fail(f"{value!r} is no whole number above 0, nor a range of them such as 1..4.", param, ctx)
        numbers = [int(end) for end in ends]
        return numbers[0] if len(numbers) == 1 else (numbers[0], numbers[1])


dir_option = click.option(
    "--dir",
    metavar="FOLDER",
    type=click.Path(path_type=Path),
    help="The vault. Default: PIPEVAULT_DIR, config file, user's cache.",
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON for programs.")
model_argument = click.argument("model", metavar="MODEL")


def call_options(function: Function) -> Function:
    """Add the options that tell of a call, of the graphs for it and of the parts that get them."""
    for option in (
        click.option(
            "--parts",
            metavar="NAMES",
            multiple=True,
            callback=_part_names,
            help="Parts to freeze, with commas or the option again; auto: those that gain 3 %. Default: all.",
        ),
        click.option(
            "--regions",
            metavar="HOW",
            help="blocks, off (whole parts) or auto. Default: PIPEVAULT_REGIONS, config file, auto.",
        ),
        click.option(
            "--level",
            metavar="NAME",
            help="Level; strict and invariant have graphs of their own. Default: PIPEVAULT_LEVEL, repeatable.",
        ),
        click.option(
            "--weights",
            metavar="POLICY",
            help="bound (a fine-tune uses the same graphs) or baked. Default: PIPEVAULT_WEIGHTS, config file, bound.",
        ),
        click.option(
            "--guidance/--no-guidance",
            default=None,
            help="Classifier-free guidance. Default: the pipeline's own.",
        ),
        click.option("--frames", metavar="NUMBER", type=CountRange(), help="Frames of a video, or a range."),
        click.option(
            "--batch-size",
            metavar="NUMBER",
            type=CountRange(),
            help="Prompts in one call, or a range: 1..4. Default: 1; for demo, its ten digits.",
        ),
        click.option("--device", metavar="NAME", help="cpu, cuda, ... Default: the GPU if there is one."),
        click.option("--dtype", metavar="NAME", help="float32, float16 or bfloat16. Default: float32."),
    ):
        function = option(function)
    return function


def _part_names(
    _: click.Context, __: click.Parameter, values: Sequence[str]
) -> tuple[str, ...] | Literal["auto"] | None:
    """``("unet,vae.decoder", "text_encoder")`` as three names; ``None`` where the option was not given."""
    if list(values) == ["auto"]:
        return "auto"
    names = tuple(name.strip() for value in values for name in value.split(","))
    if not all(names):
        raise SettingsError("--parts takes names with commas between them, such as unet,vae.decoder.")
    return names or None
