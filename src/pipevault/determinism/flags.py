"""Global switches of torch that change generated code or the kernels that are chosen: factors of the key."""

from __future__ import annotations

import sys
from typing import Any

from pipevault.digest import digest_json


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
    """Over what Inductor's own cache key takes: overrides and TORCHINDUCTOR_* variables count, paths do not.

    Inductor's digest itself pickles sets, so it changes with the hash seed of the process.
    """
    from torch._inductor import config

    values = dict(config.save_config_portable())
    values.pop("aot_inductor.metadata", None)  # a compilation leaves the machine it was for there
    return digest_json({name: _plain(value) for name, value in values.items()}).short


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return sorted([str(name), _plain(item)] for name, item in value.items())
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, (set, frozenset)):
        return sorted(map(repr, value))
    if value is None or isinstance(value, (bool, int, str)):
        return value
    return getattr(value, "__qualname__", None) or repr(value)
