"""Global switches of torch that change generated code or the kernels that are chosen: factors of the key."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from functools import partial
from pathlib import PurePath
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import torch

from pipevault.compat.pytorch import builtin_attention, inductor_default, inductor_options
from pipevault.determinism.switches import FLAGS, FLOAT16_SWITCHES
from pipevault.digest import digest_json

_MAX_CODE_DEPTH = 4

_known: tuple[dict[str, Any], dict[str, Any]] | None = None
"""The options when they were last asked for, and what was made of them: a load asks for each part."""


def code_flags() -> dict[str, Any]:
    """Return the switches as they are now, read back from torch."""
    names = ["float32_precision", "cudnn_benchmark", "cudnn_deterministic", "mkldnn_deterministic"]
    backends: Any = torch.backends
    if backends.cuda.is_built():
        names.append("cublas_workspace")
    return {
        # Tensors that code makes without naming them get these, in the graph too.
        "default_dtype": str(torch.get_default_dtype()).removeprefix("torch."),
        "default_device": torch.get_default_device().type,
        "deterministic_algorithms": torch.are_deterministic_algorithms_enabled(),
        **{name: FLAGS[name].read() for name in names},
        "float16_matmul": {name: FLAGS[name].read() for name in FLOAT16_SWITCHES},
        "attention": {
            **FLAGS["attention"].read(),
            "diffusers": FLAGS["diffusers_attention"].read(),
            "function": _attention_function(),
        },
        **_inductor_factors(),
    }


def _attention_function() -> str:
    """``torch`` for the built-in ``scaled_dot_product_attention``; else name and code of what was put in its place.

    Packages with attention kernels of their own, such as SageAttention, are commonly installed in this way.
    """
    function: Any = torch.nn.functional.scaled_dot_product_attention
    if function is builtin_attention() and isinstance(function, BuiltinFunctionType):
        return "torch"
    return f"{getattr(function, '__qualname__', type(function).__qualname__)} {digest_json(_code(function, 0)).short}"


def _code(value: Any, depth: int) -> Any:
    """Return plain JSON for a callable and what it reaches by name; other packages count by their version."""
    if isinstance(value, partial):
        return ["partial", *(_code(item, depth) for item in (value.func, list(value.args), dict(value.keywords)))]
    if isinstance(value, MethodType):
        return [_code(value.__func__, depth), type(value.__self__).__qualname__]
    if isinstance(value, FunctionType):
        package = (value.__module__ or "").partition(".")[0]
        version = getattr(sys.modules.get(package), "__version__", None)
        names = [value.__qualname__, str(version) if version else ""]
        if depth == _MAX_CODE_DEPTH or package == "torch":
            return names
        used = {name: value.__globals__[name] for name in value.__code__.co_names if name in value.__globals__}
        for name, cell in zip(value.__code__.co_freevars, value.__closure__ or (), strict=True):
            with suppress(ValueError):  # an empty cell: a name that was never bound
                used[name] = cell.cell_contents
        held = {**used, "defaults": [value.__defaults__, value.__kwdefaults__]}
        return [*names, _bytecode(value.__code__), _code(held, depth + 1)]
    if isinstance(value, dict):
        return sorted([str(name), _code(item, depth)] for name, item in value.items())
    if isinstance(value, (list, tuple)):
        return [_code(item, depth) for item in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return _plain(value)
    if isinstance(value, (type, BuiltinFunctionType, ModuleType)):
        name = getattr(value, "__qualname__", None) or value.__name__
        return [name, str(getattr(value, "__version__", ""))]
    call = next((vars(base)["__call__"] for base in type(value).__mro__ if "__call__" in vars(base)), None)
    inner = getattr(value, "__wrapped__", None) or getattr(value, "fn", None)
    called = inner if isinstance(inner, FunctionType) else call if isinstance(call, FunctionType) else None
    state = getattr(value, "__dict__", {}) if inner is None and depth < _MAX_CODE_DEPTH else {}
    plain = {name: item for name, item in state.items() if isinstance(item, (bool, int, float, str))}
    return [type(value).__qualname__, _code(called, depth), _code(plain, depth)]


def _bytecode(code: CodeType) -> list[Any]:
    constants = [_bytecode(item) if isinstance(item, CodeType) else _plain(item) for item in code.co_consts]
    return [code.co_code.hex(), list(code.co_names), constants]


def _inductor_factors() -> dict[str, Any]:
    """A digest over what Inductor's own cache key takes, and the options whose value is not torch's default.

    Absolute paths do not count: they say where a cache, a compiler or a virtual environment lies. Inductor's own digest
    pickles sets, so it changes with the hash seed of the process.
    """
    global _known
    options = inductor_options()
    options.pop("aot_inductor.metadata", None)  # a compilation leaves the machine it was for there
    if _known is not None and _known[0] == options:
        return dict(_known[1])
    values = {name: _plain(value) for name, value in options.items() if not _is_place(value)}
    overrides = {name: value for name, value in values.items() if value != _plain(inductor_default(name, value=value))}
    factors = {"inductor_config": digest_json(values).short, "inductor_overrides": overrides}
    _known = options, factors
    return dict(factors)


def _is_place(value: Any) -> bool:
    return isinstance(value, (str, PurePath)) and os.path.isabs(value)


def _plain(value: Any) -> Any:
    """Return plain JSON; absolute paths are left out of containers too."""
    if isinstance(value, dict):
        return sorted([str(name), _plain(item)] for name, item in value.items() if not _is_place(item))
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value if not _is_place(item)]
    if isinstance(value, (set, frozenset)):
        return sorted(repr(item) for item in value if not _is_place(item))
    if _is_place(value):
        return None
    if value is None or isinstance(value, (bool, int, str)):
        return value
    name = getattr(value, "__qualname__", None)
    text = repr(value)
    return name or (type(value).__qualname__ if " at 0x" in text else text)
