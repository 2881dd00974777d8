"""Identity of a part, and the key of one of its graphs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from pipevault.determinism.flags import code_flags
from pipevault.fingerprint.machine import machine_factors
from pipevault.fingerprint.model import architecture
from pipevault.fingerprint.toolchain import toolchain_factors
from pipevault.fingerprint.weights import weights_digest
from pipevault.graphs.inductor import GRAPH_FORMAT, BuildOptions
from pipevault.graphs.signature import Signature
from pipevault.key import Key


def part_factors(
    module: nn.Module,
    device: torch.device,
    *,
    backend: str,
    build: BuildOptions,
    known: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Return the factors that decide the code of a part's graphs beside their signatures. Nothing of the pipeline.

    ``known`` is its architecture, where that was computed already.
    """
    weights: dict[str, Any] = {"policy": build.weights}
    if build.weights == "baked":
        weights["digest"] = weights_digest(module)
    return {
        "architecture": dict(known or architecture(module)),
        "weights": weights,
        "dtype": module_dtype(module),
        "machine": machine_factors(device),
        "toolchain": toolchain_factors(graph_format=GRAPH_FORMAT),
        "backend": {"name": backend, **build.to_json()},
        "determinism": code_flags(),
    }


def graph_key(factors: Mapping[str, Any], signature: Signature, constants: Mapping[str, str]) -> Key:
    """Return the key of the graph for ``signature`` of the part with these ``factors``.

    ``constants`` has the SHA-256 of each attribute that the graph has as a constant, by the steps to it.
    """
    own = {"signature": signature.to_json(), **({"constants": dict(constants)} if constants else {})}
    return Key({**factors, **own})


def module_dtype(module: nn.Module) -> str | None:
    """Return the dtype of the first floating-point weight, such as ``float16``."""
    tensor = next((t for t in module.parameters() if t.is_floating_point()), None)
    return None if tensor is None else str(tensor.dtype)[6:]
