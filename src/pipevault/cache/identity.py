"""Identity of a part, and the key of one of its graphs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from pipevault.determinism.flags import code_flags
from pipevault.digest import Digest
from pipevault.fingerprint.machine import machine_factors
from pipevault.fingerprint.model import Architecture, architecture
from pipevault.fingerprint.toolchain import toolchain_factors
from pipevault.fingerprint.weights import weights_digest
from pipevault.graphs.inductor import GRAPH_FORMAT, BuildOptions
from pipevault.graphs.signature import CallSignature
from pipevault.key import Key


@dataclass(frozen=True)
class Weights:
    """The weights policy, and for ``baked`` weights the SHA-256 of their values."""

    policy: str
    digest: str | None = None

    def to_json(self) -> dict[str, str]:
        return {"policy": self.policy, **({"digest": self.digest} if self.digest else {})}


@dataclass(frozen=True)
class PartIdentity:
    """All that decides the code of a part's graphs next to their signatures. Nothing of the pipeline."""

    architecture: Architecture
    weights: Weights
    dtype: str | None
    machine: Mapping[str, Any]
    toolchain: Mapping[str, Any]
    backend: str
    build: BuildOptions
    determinism: Mapping[str, Any]

    @classmethod
    def of(
        cls,
        module: nn.Module,
        device: torch.device,
        *,
        backend: str,
        build: BuildOptions,
        known: Architecture | None = None,
    ) -> PartIdentity:
        """Return the identity of a part on ``device``. ``known`` is its architecture, if computed already."""
        return cls(
            architecture=known or architecture(module),
            weights=Weights(build.weights, weights_digest(module) if build.weights == "baked" else None),
            dtype=module_dtype(module),
            machine=machine_factors(device),
            toolchain=toolchain_factors(graph_format=GRAPH_FORMAT),
            backend=backend,
            build=build,
            determinism=code_flags(),
        )

    def to_json(self) -> dict[str, Any]:
        """Return the factors of a key, by group."""
        return {
            "architecture": self.architecture.to_json(),
            "weights": self.weights.to_json(),
            "dtype": self.dtype,
            "machine": dict(self.machine),
            "toolchain": dict(self.toolchain),
            "backend": {"name": self.backend, **self.build.to_json()},
            "determinism": dict(self.determinism),
        }

    @property
    def shelf(self) -> Digest:
        """The shelf of the part's graphs."""
        return self.graph_key(CallSignature(())).shelf

    def graph_key(self, signature: CallSignature, constants: Mapping[str, str] | None = None) -> Key:
        """Return the key of the part's graph for ``signature``.

        ``constants`` has the SHA-256 of each attribute that the graph has as a constant, by the steps to it.
        """
        own = {"signature": signature.to_json(), **({"constants": dict(constants)} if constants else {})}
        return Key({**self.to_json(), **own})


def module_dtype(module: nn.Module) -> str | None:
    """Return the dtype of the first floating-point weight, such as ``float16``."""
    tensor = next((t for t in module.parameters() if t.is_floating_point()), None)
    return None if tensor is None else str(tensor.dtype)[6:]
