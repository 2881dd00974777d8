"""Files that a command writes, refused before anything is compiled."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click


class OutputFile(click.Path):
    """An option that takes the path of a file in a folder that exists."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        path = Path(os.fsdecode(super().convert(value, param, ctx)))
        if path.is_dir() or not path.absolute().parent.is_dir():
            self.fail(f"{path} cannot be written: give a file in a folder that exists.", param, ctx)
        return path
