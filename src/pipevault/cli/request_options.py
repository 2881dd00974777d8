"""Options that say what to generate, and how the model for it is opened."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from pipevault.cli.options import class_option, device_option, together
from pipevault.cli.pipelines import parse_size
from pipevault.demo import DIGIT_WORDS
from pipevault.demo import prompt as digit_prompt
from pipevault.opening import DEMO_MODEL

if TYPE_CHECKING:
    from pipevault.evidence.request import Request

seed_option = click.option(
    "--seed", metavar="NUMBER", type=int, default=0, show_default=True, help="-1 draws one, which is then reported."
)

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
    seed_option,
)
"""Adds what :func:`request_from` takes."""

OPENING = ("dtype", "device", "pipeline_class")
opening_options = together(
    click.option("--dtype", metavar="NAME", help="float32, float16 or bfloat16. Default: float32."),
    device_option,
    class_option,
)
"""Adds :data:`OPENING`, which ``open_pipeline`` takes."""


def request_from(
    model: str,
    *,
    prompts: Sequence[str],
    seed: int,
    steps: int | None,
    guidance_scale: float | None,
    size: str | None,
) -> Request:
    """Return what to generate, with the demo's own defaults and a seed that is known.

    Raises :class:`~pipevault.errors.SettingsError` for an invalid size and :class:`~pipevault.errors.BadSeedError` for
    an invalid seed.
    """
    parsed = None if size is None else parse_size(size)
    from pipevault.determinism.seeds import effective_seed
    from pipevault.evidence.request import Request

    if model == DEMO_MODEL and not prompts:
        prompts = [digit_prompt(digit) for digit in range(len(DIGIT_WORDS))]
    return Request(
        prompts=tuple(prompts),
        seed=effective_seed(seed),
        steps=steps,
        guidance_scale=guidance_scale,
        height=None if parsed is None else parsed.height,
        width=None if parsed is None else parsed.width,
    ).with_defaults_of(model)
