"""Names of test cases that are the same in every process, as pytest-xdist needs them."""

from __future__ import annotations

import re


def without_address(value: object) -> str:
    """Return the ``repr`` of a value without the address that the default one ends with."""
    return re.sub(r" at 0x[0-9a-fA-F]+", "", repr(value))
