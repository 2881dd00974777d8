"""Options that several commands share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

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
    """Adds ``dtype``, ``device``, ``batch_size``, ``frames`` and ``guidance``."""
    for option in (
        click.option(
            "--guidance/--no-guidance",
            default=None,
            help="Classifier-free guidance. Default: the pipeline's own.",
        ),
        click.option("--frames", metavar="NUMBER", type=click.IntRange(min=1), help="Frames of a video."),
        click.option(
            "--batch-size", metavar="NUMBER", type=click.IntRange(min=1), help="Prompts in one call. Default: 1."
        ),
        click.option("--device", metavar="NAME", help="cpu, cuda, ... Default: the GPU if there is one."),
        click.option("--dtype", metavar="NAME", help="float32, float16 or bfloat16. Default: float32."),
    ):
        function = option(function)
    return function
