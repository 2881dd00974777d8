"""SHA-256 over the values of a module's weights: for graphs that carry them, and for records."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

from pipevault.digest import canonical_json
from pipevault.errors import CannotFreezeError
from pipevault.fingerprint.adapters import named_computing_modules
from pipevault.fingerprint.tensors import CHUNK_SIZE_BYTES, tensor_digest

if TYPE_CHECKING:
    import torch


def weights_digest(module: torch.nn.Module, *, chunk_size_bytes: int = CHUNK_SIZE_BYTES) -> str:
    """Return the hex SHA-256 over names, dtypes, shapes and bytes of all parameters and buffers, persistent or not.

    Every name counts, also one that shares its tensor with another; layout in memory and device do not. At
    most ``chunk_size_bytes`` are copied at a time. Raises :class:`CannotFreezeError` for weights that have no
    values or cannot be read as plain bytes.
    """
    hasher = hashlib.sha256()
    known: dict[tuple[object, ...], str] = {}
    for name, tensor in sorted(_named_weights(module), key=lambda item: item[0]):
        hasher.update(_tensor_header(name, tensor))
        for inner in _plain_tensors(name, tensor):
            same = (str(inner.device), inner.data_ptr(), inner.dtype, inner.shape, inner.stride())
            if same not in known:
                known[same] = tensor_digest(inner, chunk_size_bytes=chunk_size_bytes)
            hasher.update(known[same].encode())
    return hasher.hexdigest()


def _named_weights(module: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    for path, owner in named_computing_modules(module):
        for name, tensor in (*owner._parameters.items(), *owner._buffers.items()):
            if tensor is not None:
                yield f"{path}.{name}" if path else name, tensor


def _tensor_header(name: str, tensor: torch.Tensor) -> bytes:
    from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

    if isinstance(tensor, UninitializedParameter | UninitializedBuffer):
        raise CannotFreezeError(f"The weight {name!r} has no shape yet: run the module once, then freeze it.")
    return canonical_json([name, str(tensor.dtype), list(tensor.shape)]) + b"\n"


def _plain_tensors(name: str, tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """The dense tensors that hold the values: ``tensor`` itself, or the parts of a wrapper as of torchao."""
    import torch

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
