"""Every switch of torch that a determinism level reads and sets (see :mod:`pipevault.determinism.levels`)."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from operator import attrgetter
from typing import Any

import torch

from pipevault.compat.diffusers import attention_backend
from pipevault.compat.pytorch import has_tunable_op, inductor_deterministic, set_inductor_deterministic

IEEE = "ieee"
PRECISION_OPERATIONS = ("cuda.matmul", "cudnn.conv", "cudnn.rnn", "mkldnn.matmul", "mkldnn.conv", "mkldnn.rnn")
CUBLAS_VARIABLE = "CUBLAS_WORKSPACE_CONFIG"
FLOAT16_SWITCHES = (
    "allow_fp16_reduced_precision_reduction",
    "allow_bf16_reduced_precision_reduction",
    "allow_fp16_accumulation",
)
_ATTENTION_KERNELS = {"flash": "flash", "memory_efficient": "mem_efficient", "math": "math", "cudnn": "cudnn"}
"""The kernels that ``scaled_dot_product_attention`` may choose from, and what torch calls them in its functions."""

_BACKENDS: Any = torch.backends


@dataclass(frozen=True)
class Flag:
    """One switch. What ``state`` gives is what ``write`` takes to put it back; ``plain`` makes plain JSON of it.

    A switch without ``write`` can only be observed. One that is ``per_thread`` has a value in each context.
    """

    state: Callable[[], Any]
    write: Callable[[Any], None] | None = None
    plain: Callable[[Any], Any] = lambda state: state
    per_thread: bool = False

    def read(self) -> Any:
        return self.plain(self.state())

    def put_back(self, state: Any) -> None:
        if self.write is not None and self.state() != state:
            self.write(state)


def _attribute(path: str, name: str) -> Flag:
    """The switch ``torch.backends.<path>.<name>``; off, and not to be set, where torch is too old to have it.

    Some reductions have a second one, for split-K, and are set together with it.
    """
    owner = attrgetter(path)(_BACKENDS)

    def state() -> Any:
        value, second = getattr(owner, name, False), f"{name}_split_k"
        return (value, getattr(owner, second)) if hasattr(owner, second) else value

    def write(value: Any) -> None:
        if hasattr(owner, name):
            setattr(owner, name, value)

    return Flag(state, write, lambda state: state[0] if isinstance(state, tuple) else state)


def _precision() -> dict[str, str]:
    """Return what float32 is computed in, for each kind of operation: ``ieee`` (or ``none``), ``tf32`` or ``bf16``.

    ``torch.get_float32_matmul_precision()`` raises where the program used ``fp32_precision``, so it is not asked.
    """
    if _has_precision():
        return {name: str(attrgetter(name)(_BACKENDS).fp32_precision) for name in PRECISION_OPERATIONS}
    old = {
        "cuda.matmul": "tf32" if _BACKENDS.cuda.matmul.allow_tf32 else IEEE,
        **dict.fromkeys(("cudnn.conv", "cudnn.rnn"), "tf32" if _BACKENDS.cudnn.allow_tf32 else IEEE),
        "mkldnn.matmul": "bf16" if torch.get_float32_matmul_precision() == "medium" else IEEE,
    }
    return {name: old.get(name, IEEE) for name in PRECISION_OPERATIONS}


def _has_precision() -> bool:
    """Return True if torch has the interface of 2.9, a value for each kind of operation."""
    return hasattr(_BACKENDS.cuda.matmul, "fp32_precision")


def _write_precision(values: Mapping[str, str]) -> None:
    """Through the old interface first, then the new one for the rest: torch raises later if only the new one was set.

    https://docs.pytorch.org/docs/stable/notes/numerical_accuracy.html
    """
    old_names = {"bf16": "medium", "tf32": "high"}
    torch.set_float32_matmul_precision(
        old_names.get(values["mkldnn.matmul"]) or old_names.get(values["cuda.matmul"], "highest")
    )
    _BACKENDS.cudnn.allow_tf32 = values["cudnn.conv"] == "tf32"
    for operation, value in values.items() if _has_precision() else ():
        owner = attrgetter(operation)(_BACKENDS)
        if owner.fp32_precision != value:
            owner.fp32_precision = value


def _read_attention() -> dict[str, bool]:
    return {name: getattr(_BACKENDS.cuda, f"{kernel}_sdp_enabled")() for name, kernel in _ATTENTION_KERNELS.items()}


def _write_attention(values: Mapping[str, bool]) -> None:
    for name, value in values.items():
        getattr(_BACKENDS.cuda, f"enable_{_ATTENTION_KERNELS[name]}_sdp")(value)


def _write_workspace(value: str | None) -> None:
    if value is None:
        os.environ.pop(CUBLAS_VARIABLE, None)
    else:
        os.environ[CUBLAS_VARIABLE] = value


# Order counts: deterministic algorithms switch Inductor's mode too, so that one is put back after it.
FLAGS: Mapping[str, Flag] = {
    "deterministic_algorithms": Flag(
        lambda: ("off", "warn", "error")[torch.get_deterministic_debug_mode()],
        lambda value: torch.use_deterministic_algorithms(value != "off", warn_only=value == "warn"),
    ),
    "inductor_deterministic": Flag(inductor_deterministic, set_inductor_deterministic, per_thread=True),
    "cudnn_benchmark": _attribute("cudnn", "benchmark"),
    "cudnn_deterministic": _attribute("cudnn", "deterministic"),
    "mkldnn_deterministic": _attribute("mkldnn", "deterministic"),
    "float32_precision": Flag(
        _precision,
        _write_precision,
        lambda state: {name: IEEE if value == "none" else value for name, value in state.items()},
    ),
    **{name: _attribute("cuda.matmul", name) for name in FLOAT16_SWITCHES},
    "attention": Flag(_read_attention, _write_attention),
    "diffusers_attention": Flag(attention_backend),
    # TunableOp times GEMM kernels while the program runs; it exists in GPU builds alone.
    "run_time_tuning": Flag(
        lambda: has_tunable_op() and torch.cuda.tunable.tuning_is_enabled(),
        lambda value: torch.cuda.tunable.tuning_enable(value),
    ),
    "threads": Flag(torch.get_num_threads, torch.set_num_threads),
    "cublas_workspace": Flag(partial(os.environ.get, CUBLAS_VARIABLE), _write_workspace),
}
