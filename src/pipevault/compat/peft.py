"""Touch points with peft: which of its layers do nothing."""

from __future__ import annotations

import sys
from typing import Any


def is_idle_layer(module: Any) -> bool:
    """Return whether ``module`` is a peft layer that does nothing else than call its base layer.

    That is so where all active adapters are merged into the base layer, or none is left in the layer. A disabled
    layer that holds merged adapters takes them out again when it is called.
    """
    peft: Any = sys.modules.get("peft.tuners.tuners_utils")
    if peft is None or not isinstance(module, peft.BaseTunerLayer):
        return False
    if module.merged:
        return not module.disable_adapters and set(module.active_adapters) <= set(module.merged_adapters)
    return not module._get_available_adapters()
