"""SHA-256 over the elements of a tensor."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from pipevault.digest import digest_chunks

CHUNK_SIZE_BYTES = 16 << 20


def tensor_digest(tensor: torch.Tensor) -> str:
    """Return the hex SHA-256 over a dense tensor's elements in row-major order, whatever its strides and device.

    At most :data:`CHUNK_SIZE_BYTES` are copied at a time.
    """
    return digest_chunks(map(_bytes_view, _chunks(tensor.detach()))).hex


def _chunks(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """Contiguous CPU tensors that hold the elements in row-major order; views where no copy is needed."""
    if tensor.is_conj() or tensor.is_neg():
        tensor = tensor.resolve_conj().resolve_neg()
    if tensor.nbytes == 0:
        return
    if tensor.is_contiguous():
        tensor = tensor.view(-1)
    if tensor.nbytes <= CHUNK_SIZE_BYTES or (tensor.is_contiguous() and tensor.device.type == "cpu"):
        yield tensor.cpu().contiguous()
        return
    row_size_bytes = tensor.nbytes // tensor.shape[0]
    if row_size_bytes > CHUNK_SIZE_BYTES and tensor.dim() > 1:
        for row in tensor.unbind(0):
            yield from _chunks(row)
        return
    for rows in tensor.split(max(1, CHUNK_SIZE_BYTES // row_size_bytes)):  # type: ignore[no-untyped-call]
        yield rows.cpu().contiguous()


def _bytes_view(tensor: torch.Tensor) -> memoryview:
    # A single element counts as contiguous whatever its stride, which a view with other elements refuses.
    flat = tensor.as_strided((tensor.numel(),), (1,))
    view: memoryview = flat.view(torch.uint8).numpy().data
    return view
