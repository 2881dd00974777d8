"""Building the key of a pipeline's entry from what it is, where it runs and how it is called."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from pipevault.determinism.flags import code_flags
from pipevault.digest import Digest, digest_json
from pipevault.fingerprint.machine import machine_factors
from pipevault.fingerprint.model import architecture
from pipevault.fingerprint.toolchain import toolchain_factors
from pipevault.fingerprint.weights import weights_digest
from pipevault.graphs.inductor import GRAPH_FORMAT, BuildOptions
from pipevault.key import Key
from pipevault.manager.call import CallShape, shape_factors


def build_key(
    pipe: Any,
    parts: Mapping[str, nn.Module],
    shape: CallShape,
    *,
    backend: str,
    build: BuildOptions,
) -> Key:
    """The key of ``pipe`` called at ``shape`` (see :func:`~pipevault.manager.call.resolve_shape`)."""
    weights: dict[str, Any] = {"policy": build.weights}
    if build.weights == "baked":
        weights["parts"] = {name: weights_digest(module) for name, module in parts.items()}
    return Key(
        {
            "pipeline": {"class": f"{type(pipe).__module__}.{type(pipe).__qualname__}"},
            "architecture": {name: architecture(module) for name, module in parts.items()},
            "weights": weights,
            "call": shape_factors(shape),
            "dtype": {name: _dtype(module) for name, module in parts.items()},
            "machine": machine_factors(execution_device(pipe, parts)),
            "toolchain": toolchain_factors(graph_format=GRAPH_FORMAT),
            "backend": {"name": backend, **build.to_json()},
            "determinism": code_flags(),
        }
    )


def part_identity(key: Key, part: str) -> str:
    """What decides the code of one part's graphs beside their signatures, so that two entries can share them."""
    shared = ("machine", "toolchain", "backend", "determinism")
    factors: dict[str, Any] = {group: key.factors[group] for group in shared}
    factors["architecture"] = key.factors["architecture"][part]
    factors["weights"] = key.factors["weights"].get("parts", {}).get(part)
    return digest_json(factors).hex


def execution_device(pipe: Any, parts: Mapping[str, nn.Module]) -> torch.device:
    """Where the parts compute: an offloaded pipeline's weights rest elsewhere, which diffusers takes 10 ms to find."""
    if any(hasattr(module, "_hf_hook") or hasattr(module, "_diffusers_hook") for module in parts.values()):
        device = getattr(pipe, "_execution_device", None)
        if isinstance(device, torch.device):
            return device
    tensor = next((tensor for module in parts.values() for tensor in module.parameters()), None)
    return torch.device("cpu") if tensor is None else tensor.device


def short(digest: Digest | None) -> str:
    return digest.short if digest else "none"


def _dtype(module: nn.Module) -> str | None:
    tensor = next((t for t in module.parameters() if t.is_floating_point()), None)
    return None if tensor is None else str(tensor.dtype)[6:]
