"""The type of the fixture ``run``."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from click.testing import Result

Run: TypeAlias = Callable[..., Result]
