"""The keys of a part's graphs and of a pipeline's plans, from what they are, where they run and how they are called."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from pipevault.cache.onediff_backends import onediff_backend
from pipevault.calls.call import CallShape, described
from pipevault.calls.call_shapes import CallRange, call_factors
from pipevault.determinism.flags import code_flags
from pipevault.digest import Digest
from pipevault.fingerprint.classes import class_identity, is_released, original_class, qualified_name
from pipevault.fingerprint.machine import machine_factors, machine_record
from pipevault.fingerprint.model import Architecture, architecture
from pipevault.fingerprint.toolchain import toolchain_factors, toolchain_record
from pipevault.fingerprint.volatile import SKIPPED_NAMES
from pipevault.fingerprint.weights import weights_digest
from pipevault.graphs.inductor import GRAPH_FORMAT, BuildOptions
from pipevault.graphs.parts import get_part
from pipevault.graphs.signature import CallSignature, autocast_dtype
from pipevault.key import Key
from pipevault.pipeline import Pipeline

_SCALARS = (bool, int, float, str)
_NO_DEFAULT = object()


@dataclass(frozen=True)
class PartIdentity:
    """All that decides the code of a part's graphs next to their signatures, and nothing of the pipeline."""

    architecture: Architecture
    factors: Mapping[str, Any]

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
        found = known or architecture(module)
        baked = {"digest": weights_digest(module)} if build.weights == "baked" else {}
        factors = {
            "architecture": found.to_json(),
            "weights": {"policy": build.weights, **baked},
            "dtype": module_dtype(module),
            **_shared_factors(device, backend, build),
        }
        return cls(found, factors)

    @property
    def shelf(self) -> Digest:
        """The shelf of the part's graphs."""
        return self.graph_key(CallSignature(())).shelf

    def graph_key(self, signature: CallSignature, constants: Mapping[str, str] | None = None) -> Key:
        """Return the key of the graph for ``signature`` that has attributes as ``constants``: SHA-256, by steps."""
        own = {"signature": signature.to_json(), **({"constants": dict(constants)} if constants else {})}
        return Key({**self.factors, **own})


def module_dtype(module: nn.Module) -> str | None:
    """Return the dtype of the first floating-point weight, such as ``float16``."""
    tensor = next((t for t in module.parameters() if t.is_floating_point()), None)
    return None if tensor is None else str(tensor.dtype)[6:]


def build_key(
    pipe: Pipeline,
    parts: Mapping[str, nn.Module],
    shape: CallShape | CallRange,
    *,
    backend: str,
    build: BuildOptions,
    known: Mapping[str, Architecture] | None = None,
    regions: Mapping[str, str] | None = None,
    worthwhile: bool = False,
) -> Key:
    """Return the key of the plan of ``pipe`` called at ``shape``, with architectures that are ``known`` and the blocks
    of parts that are frozen by ``regions``.
    """
    known = known or {}
    device = execution_device(pipe, parts)
    shared = _shared_factors(device, backend, build)
    if (onediff := onediff_backend(backend, build)) is not None:
        for group, factors in onediff.factors().items():
            shared[group] |= factors
    if regions:
        shared["backend"]["regions"] = dict(regions)
    if worthwhile:
        shared["backend"]["parts"] = "auto"
    weights: dict[str, Any] = {"policy": build.weights}
    if build.weights == "baked":
        weights["parts"] = {name: weights_digest(module) for name, module in parts.items()}
    architectures = {name: (known.get(name) or architecture(module)).to_json() for name, module in parts.items()}
    return Key(
        {
            "pipeline": pipeline_factors(pipe, parts),
            "architecture": architectures,
            "weights": weights,
            "call": {**call_factors(shape), "autocast": autocast_dtype(device.type)},
            "dtype": {name: module_dtype(module) for name, module in parts.items()},
            **shared,
        }
    )


def _shared_factors(device: torch.device, backend: str, build: BuildOptions) -> dict[str, Any]:
    return {
        "machine": machine_factors(device),
        "toolchain": toolchain_factors(graph_format=GRAPH_FORMAT),
        "backend": {"name": backend, **build.to_json()},
        "determinism": code_flags(),
    }


def made_here() -> dict[str, Any]:
    """Return what a manifest tells of the machine and the toolchain that made its entry."""
    return {"machine": machine_record(), "toolchain": toolchain_record(graph_format=GRAPH_FORMAT)}


def pipeline_factors(pipe: Pipeline, parts: Mapping[str, nn.Module]) -> dict[str, Any]:
    """Return what decides, next to its parts, with which signatures a pipeline calls them: its class and settings, its
    scheduler, the length of its tokenizers' prompts, and the modules that own parts, such as a VAE with its tiling.
    """
    attributes = getattr(pipe, "__dict__", {})
    components: dict[str, Any] = {}
    for name, value in attributes.items():
        if name.startswith("_") or isinstance(value, (nn.Module, type)):
            continue
        length = getattr(value, "model_max_length", None)
        if isinstance(length, int):
            components[name] = {"model_max_length": length}
        elif hasattr(value, "set_timesteps") or isinstance(getattr(value, "config", None), Mapping):
            components[name] = {**_class(value), "config": _settings(value)}
    for name in sorted({part.rpartition(".")[0] for part in parts} - {""}):
        owner = get_part(pipe, name)
        if not isinstance(owner, nn.Module):
            continue
        components[name] = {**_class(owner), **_scalar_attributes(owner), "config": _settings(owner)}
    lengths = {name: value for name, value in attributes.items() if name.endswith("max_length")}
    settings = {**_settings(pipe), **lengths}
    return {
        **_class(pipe),
        "components": components,
        # A component stands in the configuration as a pair: the library and the name of its class.
        "config": {name: value for name, value in settings.items() if isinstance(value, _SCALARS)},
    }


def execution_device(pipe: Pipeline, parts: Mapping[str, nn.Module]) -> torch.device:
    """Return the device on which the parts compute, which diffusers takes 10 ms to find where weights are offloaded."""
    if any(_is_hooked(module) or _is_hooked(get_part(pipe, name.partition(".")[0])) for name, module in parts.items()):
        device = getattr(pipe, "_execution_device", None)
        if isinstance(device, torch.device):
            return device
    tensor = next((tensor for module in parts.values() for tensor in module.parameters()), None)
    return torch.device("cpu") if tensor is None else tensor.device


def _is_hooked(module: Any) -> bool:
    return hasattr(module, "_hf_hook") or hasattr(module, "_diffusers_hook")


def _class(value: Any) -> dict[str, str]:
    """Name of the class of ``value``; outside released packages the code too, which takes longer to find."""
    cls = original_class(value)
    if is_released(cls.__module__):
        return {"class": qualified_name(cls)}
    name, _, code = class_identity(cls).partition(" code:")
    return {"class": name, "code": code}


def _settings(value: Any) -> dict[str, Any]:
    config = getattr(value, "config", None)
    if config is not None and not isinstance(config, Mapping):
        config = getattr(config, "__dict__", None)
    return _described(config or {})


def _scalar_attributes(module: nn.Module) -> dict[str, Any]:
    """Switches such as ``use_tiling``. A name with an underscore is state that a call may leave behind."""
    cls = original_class(module)
    scalars = {name: value for name, value in vars(module).items() if isinstance(value, _SCALARS)}
    return _described({name: value for name, value in scalars.items() if getattr(cls, name, _NO_DEFAULT) != value})


def _described(values: Mapping[str, Any]) -> dict[str, Any]:
    kept = (name for name in values if not name.startswith("_") and not SKIPPED_NAMES[name])
    return {name: described(values[name]) for name in kept}
