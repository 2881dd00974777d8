"""SHA-256 over the values of a module's weights: for graphs that carry them, and for records."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import torch
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from pipevault.digest import canonical_json
from pipevault.errors import CannotFreezeError
from pipevault.fingerprint.tensors import tensor_digest
from pipevault.fingerprint.volatile import named_computing_modules


def weights_digest(module: torch.nn.Module) -> str:
    """Return the hex SHA-256 over names, dtypes, shapes and bytes of all parameters and buffers, persistent or not.

    Every name counts, also one that shares its tensor with another; layout in memory and device do not. Raises
    :class:`CannotFreezeError` for weights that have no values or cannot be read as plain bytes.
    """
    named = [
        (f"{path}.{name}" if path else name, tensor)
        for path, owner in named_computing_modules(module)
        for name, tensor in (*owner._parameters.items(), *owner._buffers.items())
        if tensor is not None
    ]
    hasher = hashlib.sha256()
    known: dict[tuple[object, ...], str] = {}
    for name, tensor in sorted(named, key=lambda item: item[0]):
        if isinstance(tensor, UninitializedParameter | UninitializedBuffer):
            raise CannotFreezeError(f"The weight {name!r} has no shape yet: run the module once, then freeze it.")
        hasher.update(canonical_json([name, str(tensor.dtype), list(tensor.shape)]) + b"\n")
        for inner in _plain_tensors(name, tensor):
            same = (str(inner.device), inner.data_ptr(), inner.dtype, inner.shape, inner.stride())
            if same not in known:
                known[same] = tensor_digest(inner)
            hasher.update(known[same].encode())
    return hasher.hexdigest()


def _plain_tensors(name: str, tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """The dense tensors that hold the values: ``tensor`` itself, or the parts of a wrapper as of torchao."""
    if hasattr(tensor, "__tensor_flatten__"):
        names, _ = tensor.__tensor_flatten__()
        for inner in sorted(names):
            yield from _plain_tensors(f"{name}.{inner}", getattr(tensor, inner))
    elif tensor.is_meta:
        raise CannotFreezeError(f"The weight {name!r} is on the meta device, without values: load it first.")
    elif tensor.layout != torch.strided or tensor.is_quantized:
        raise CannotFreezeError(
            f"The weight {name!r} is {tensor.layout}, {tensor.dtype}: only dense weights can be hashed."
        )
    else:
        yield tensor
