"""Global switches of torch that change generated code or the kernels that are chosen: factors of the key."""

from __future__ import annotations

import sys
from typing import Any


def code_flags() -> dict[str, Any]:
    """The switches as they are now, read back from torch."""
    import torch

    backends: Any = torch.backends
    return {
        "deterministic_algorithms": torch.are_deterministic_algorithms_enabled(),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "cudnn_benchmark": backends.cudnn.benchmark,
        "cudnn_deterministic": backends.cudnn.deterministic,
        "attention": {
            "flash": backends.cuda.flash_sdp_enabled(),
            "memory_efficient": backends.cuda.mem_efficient_sdp_enabled(),
            "math": backends.cuda.math_sdp_enabled(),
            "cudnn": backends.cuda.cudnn_sdp_enabled(),
            "diffusers": _diffusers_attention_backend(),
        },
        "inductor_config": _inductor_config_digest(),
    }


def _diffusers_attention_backend() -> str:
    """The backend that ``diffusers.attention_backend`` chose; its default where diffusers is not in use."""
    dispatch: Any = sys.modules.get("diffusers.models.attention_dispatch")
    if dispatch is None:
        return "native"
    name, _ = dispatch._AttentionBackendRegistry.get_active_backend()
    return str(name.value)


def _inductor_config_digest() -> str:
    """What Inductor's own cache key takes too: overrides and TORCHINDUCTOR_* variables count, paths do not."""
    from torch._inductor import config

    # A compilation leaves the machine it was for in this dictionary, in place.
    with config.patch({"aot_inductor.metadata": {}}):
        return config.get_hash().hex()
