"""Every switch of torch that a determinism level reads and sets (see :mod:`pipevault.determinism.levels`)."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial, reduce
from typing import Any

from pipevault.compat.diffusers import attention_backend
from pipevault.compat.pytorch import has_tunable_op, inductor_deterministic, set_inductor_deterministic

IEEE = "ieee"
PRECISION_OPERATIONS = ("cuda.matmul", "cudnn.conv", "cudnn.rnn", "mkldnn.matmul", "mkldnn.conv", "mkldnn.rnn")
CUBLAS_VARIABLE = "CUBLAS_WORKSPACE_CONFIG"


@dataclass(frozen=True)
class Flag:
    """One switch. ``read`` gives plain JSON; what ``snapshot`` gives is for ``write`` alone, so that it is put back
    exactly. A switch without ``write`` can only be observed. One that is ``per_thread`` has a value in each context.
    """

    name: str
    read: Callable[[], Any]
    write: Callable[[Any], None] | None = None
    snapshot: Callable[[], Any] | None = None
    per_thread: bool = False

    def state(self) -> Any:
        return self.read() if self.snapshot is None else self.snapshot()


_REDUCTION_SWITCHES = ("allow_fp16_reduced_precision_reduction", "allow_bf16_reduced_precision_reduction")
FLOAT16_SWITCHES = (*_REDUCTION_SWITCHES, "allow_fp16_accumulation")
_ATTENTION_SWITCHES = {
    "flash": ("flash_sdp_enabled", "enable_flash_sdp"),
    "memory_efficient": ("mem_efficient_sdp_enabled", "enable_mem_efficient_sdp"),
    "math": ("math_sdp_enabled", "enable_math_sdp"),
    "cudnn": ("cudnn_sdp_enabled", "enable_cudnn_sdp"),
}


def _backend(path: str) -> Any:
    import torch

    return reduce(getattr, path.split("."), torch.backends)


def _attribute(name: str, path: str, attribute: str) -> Flag:
    """The switch ``torch.backends.<path>.<attribute>``; off, and not to be set, where torch is too old to have it."""

    def write(value: Any) -> None:
        if hasattr(_backend(path), attribute):
            setattr(_backend(path), attribute, value)

    return Flag(name, lambda: getattr(_backend(path), attribute, False), write)


def _reduction(name: str) -> Flag:
    """A switch of ``torch.backends.cuda.matmul`` that a second one, for split-K, is set together with."""
    plain = _attribute(name, "cuda.matmul", name)
    second = f"{name}_split_k"

    def snapshot() -> Any:
        owner = _backend("cuda.matmul")
        return (plain.read(), getattr(owner, second)) if hasattr(owner, second) else plain.read()

    return Flag(name, plain.read, plain.write, snapshot)


def read_precision() -> dict[str, str]:
    """Return what float32 is computed in, for each kind of operation: ``ieee``, ``tf32`` or ``bf16``.

    ``torch.get_float32_matmul_precision()`` raises where the program used ``fp32_precision``, so it is not asked.
    """
    return {name: IEEE if value == "none" else value for name, value in _raw_precision().items()}


def _raw_precision() -> dict[str, str]:
    if _has_precision():
        return {name: str(_backend(name).fp32_precision) for name in PRECISION_OPERATIONS}
    import torch

    backends: Any = torch.backends
    old = {
        "cuda.matmul": "tf32" if backends.cuda.matmul.allow_tf32 else IEEE,
        **dict.fromkeys(("cudnn.conv", "cudnn.rnn"), "tf32" if backends.cudnn.allow_tf32 else IEEE),
        "mkldnn.matmul": "bf16" if torch.get_float32_matmul_precision() == "medium" else IEEE,
    }
    return {name: old.get(name, IEEE) for name in PRECISION_OPERATIONS}


def _has_precision() -> bool:
    """Return True if torch has the interface of 2.9, a value for each kind of operation."""
    return hasattr(_backend("cuda.matmul"), "fp32_precision")


def _write_precision(values: Mapping[str, str]) -> None:
    """Through the old interface first, then the new one for the rest: torch raises later if only the new one was set.

    https://docs.pytorch.org/docs/stable/notes/numerical_accuracy.html
    """
    import torch

    old_names = {"bf16": "medium", "tf32": "high"}
    torch.set_float32_matmul_precision(
        old_names.get(values["mkldnn.matmul"]) or old_names.get(values["cuda.matmul"], "highest")
    )
    torch.backends.cudnn.allow_tf32 = values["cudnn.conv"] == "tf32"
    for operation, value in values.items() if _has_precision() else ():
        owner = _backend(operation)
        if owner.fp32_precision != value:
            owner.fp32_precision = value


def read_attention() -> dict[str, bool]:
    """Which kernels ``scaled_dot_product_attention`` may choose from."""
    import torch

    return {name: getattr(torch.backends.cuda, read)() for name, (read, _) in _ATTENTION_SWITCHES.items()}


def _write_attention(values: Mapping[str, bool]) -> None:
    import torch

    for name, value in values.items():
        getattr(torch.backends.cuda, _ATTENTION_SWITCHES[name][1])(value)


def _read_deterministic_algorithms() -> str:
    """``off``, ``warn`` or ``error``, as ``torch.set_deterministic_debug_mode`` names them but for ``default``."""
    import torch

    return ("off", "warn", "error")[torch.get_deterministic_debug_mode()]


def _write_deterministic_algorithms(value: str) -> None:
    import torch

    torch.use_deterministic_algorithms(value != "off", warn_only=value == "warn")


def _read_threads() -> int:
    import torch

    return torch.get_num_threads()


def _write_threads(value: int) -> None:
    import torch

    torch.set_num_threads(value)


def _write_variable(name: str, value: str | None) -> None:
    if value is None:
        os.environ.pop(name, None)
    else:
        os.environ[name] = value


def _read_tunable_op() -> bool:
    """Return True if TunableOp may time GEMM kernels while the program runs; it exists in GPU builds alone."""
    import torch

    return has_tunable_op() and torch.cuda.tunable.tuning_is_enabled()


def _write_tunable_op(value: bool) -> None:
    import torch

    torch.cuda.tunable.tuning_enable(value)


# Order counts: deterministic algorithms switch Inductor's mode too, so that one is put back after it.
FLAGS: Mapping[str, Flag] = {
    flag.name: flag
    for flag in (
        Flag("deterministic_algorithms", _read_deterministic_algorithms, _write_deterministic_algorithms),
        Flag("inductor_deterministic", inductor_deterministic, set_inductor_deterministic, per_thread=True),
        _attribute("cudnn_benchmark", "cudnn", "benchmark"),
        _attribute("cudnn_deterministic", "cudnn", "deterministic"),
        _attribute("mkldnn_deterministic", "mkldnn", "deterministic"),
        Flag("float32_precision", read_precision, _write_precision, _raw_precision),
        *map(_reduction, _REDUCTION_SWITCHES),
        _attribute("allow_fp16_accumulation", "cuda.matmul", "allow_fp16_accumulation"),
        Flag("attention", read_attention, _write_attention),
        Flag("diffusers_attention", attention_backend),
        Flag("run_time_tuning", _read_tunable_op, _write_tunable_op),
        Flag("threads", _read_threads, _write_threads),
        Flag("cublas_workspace", partial(os.environ.get, CUBLAS_VARIABLE), partial(_write_variable, CUBLAS_VARIABLE)),
    )
}
