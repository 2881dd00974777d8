"""Options that several commands share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click

from pipevault.errors import SettingsError

Function = TypeVar("Function", bound=Callable[..., Any])

dir_option = click.option(
    "--dir",
    metavar="FOLDER",
    type=click.Path(path_type=Path),
    help="The vault. Default: PIPEVAULT_DIR, config file, user's cache.",
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON for programs.")
model_argument = click.argument("model", metavar="MODEL")


def call_options(function: Function) -> Function:
    """Adds ``dtype``, ``device``, ``batch_size``, ``frames``, ``guidance``, ``weights``, ``level`` and ``parts``."""
    for option in (
        click.option(
            "--parts",
            metavar="NAMES",
            multiple=True,
            callback=_part_names,
            help="Parts to freeze, with commas or the option again. Default: all that the call uses.",
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
        click.option("--frames", metavar="NUMBER", type=click.IntRange(min=1), help="Frames of a video."),
        click.option(
            "--batch-size",
            metavar="NUMBER",
            type=click.IntRange(min=1),
            help="Prompts in one call. Default: 1; for demo, its ten digits.",
        ),
        click.option("--device", metavar="NAME", help="cpu, cuda, ... Default: the GPU if there is one."),
        click.option("--dtype", metavar="NAME", help="float32, float16 or bfloat16. Default: float32."),
    ):
        function = option(function)
    return function


def _part_names(_: click.Context, __: click.Parameter, values: Sequence[str]) -> tuple[str, ...] | None:
    """``("unet,vae.decoder", "text_encoder")`` as three names; ``None`` where the option was not given."""
    names = tuple(name.strip() for value in values for name in value.split(","))
    if not all(names):
        raise SettingsError("--parts takes names with commas between them, such as unet,vae.decoder.")
    return names or None
