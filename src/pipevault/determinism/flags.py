"""Global switches of torch that change generated code or the kernels that are chosen: factors of the key."""

from __future__ import annotations

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
        },
    }
