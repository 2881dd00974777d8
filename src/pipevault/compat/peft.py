"""Touch points with peft: which adapters a layer has."""

from __future__ import annotations

import sys
from typing import Any


def is_adapter_layer(module: object) -> bool:
    """Return whether ``module`` is a peft layer around a base layer."""
    peft: Any = sys.modules.get("peft.tuners.tuners_utils")
    return peft is not None and isinstance(module, peft.BaseTunerLayer)


def adapters_of(layer: Any) -> set[str]:
    """Return the names of the adapters that the peft layer ``layer`` holds weights for."""
    return set(layer._get_available_adapters())
