"""SHA-256 over the elements of a tensor."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from pipevault.digest import digest_chunks

if TYPE_CHECKING:
    import torch

CHUNK_SIZE_BYTES = 16 << 20


def tensor_digest(tensor: torch.Tensor, *, chunk_size_bytes: int = CHUNK_SIZE_BYTES) -> str:
    """Return the hex SHA-256 over a dense tensor's elements in row-major order, whatever its strides and device."""
    return digest_chunks(map(_bytes_view, _chunks(tensor.detach(), chunk_size_bytes))).hex


def _chunks(tensor: torch.Tensor, size_bytes: int) -> Iterator[torch.Tensor]:
    """Contiguous CPU tensors that hold the elements in row-major order; views where no copy is needed."""
    if tensor.is_conj() or tensor.is_neg():
        tensor = tensor.resolve_conj().resolve_neg()
    total_bytes = tensor.numel() * tensor.element_size()
    if total_bytes == 0:
        return
    if tensor.is_contiguous():
        tensor = tensor.view(-1)
    if total_bytes <= size_bytes or (tensor.is_contiguous() and tensor.device.type == "cpu"):
        yield tensor.cpu().contiguous()
        return
    row_size_bytes = total_bytes // tensor.shape[0]
    if row_size_bytes > size_bytes and tensor.dim() > 1:
        for row in tensor.unbind(0):
            yield from _chunks(row, size_bytes)
        return
    rows = max(1, size_bytes // row_size_bytes)
    for start in range(0, tensor.shape[0], rows):
        yield tensor.narrow(0, start, min(rows, tensor.shape[0] - start)).cpu().contiguous()


def _bytes_view(tensor: torch.Tensor) -> memoryview:
    import torch

    # A single element counts as contiguous whatever its stride, which a view with other elements refuses.
    flat = tensor.as_strided((tensor.numel(),), (1,))
    view: memoryview = flat.view(torch.uint8).numpy().data
    return view
