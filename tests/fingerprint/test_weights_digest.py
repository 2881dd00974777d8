from __future__ import annotations

import copy
import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from helpers.fresh_python import run_python
from helpers.tiny_models import Net, tiny_unet
from pipevault.errors import CannotFreezeError
from pipevault.fingerprint import tensors
from pipevault.fingerprint.tensors import tensor_digest
from pipevault.fingerprint.weights import weights_digest


def test_equal_weights_have_equal_digests() -> None:
    assert weights_digest(tiny_unet(seed=1)) == weights_digest(tiny_unet(seed=1))
    assert weights_digest(tiny_unet(seed=1)) != weights_digest(tiny_unet(seed=2))


def test_digest_is_the_same_in_another_process(tmp_path: Path) -> None:
    code = (
        "import torch; from pipevault.fingerprint.weights import weights_digest; torch.manual_seed(3);"
        "print(weights_digest(torch.nn.Linear(5, 3)))"
    )
    torch.manual_seed(3)
    assert run_python(code, cwd=tmp_path, PYTHONHASHSEED="7") == weights_digest(nn.Linear(5, 3))


def test_last_bit_of_one_element_counts() -> None:
    net: Any = Net()
    before = weights_digest(net)
    with torch.no_grad():
        net.inner[2].weight[-1, -1] = torch.nextafter(net.inner[2].weight[-1, -1], torch.tensor(9.0))
    assert weights_digest(net) != before


@pytest.mark.parametrize("persistent", [True, False])
def test_values_of_buffers_count_whether_persistent_or_not(persistent: bool) -> None:
    plain = Net()

    def holding(value: float) -> str:
        net = copy.deepcopy(plain)
        net.register_buffer("freqs", torch.full((3,), value), persistent=persistent)
        return weights_digest(net)

    assert holding(1.0) == holding(1.0)
    assert len({weights_digest(plain), holding(1.0), holding(2.0)}) == 3


def test_name_dtype_and_shape_count() -> None:
    def holding(name: str, tensor: torch.Tensor) -> str:
        module = nn.Module()
        module.register_buffer(name, tensor)
        return weights_digest(module)

    zeros = torch.zeros(4)
    others = [holding("b", zeros), holding("a", zeros.view(2, 2)), holding("a", zeros.view(torch.int32))]
    assert len({holding("a", zeros), *others}) == 4


def test_tied_weights_count_under_each_name() -> None:
    tied: Any = nn.ModuleList([nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)])
    tied[1].weight = tied[0].weight
    untied = copy.deepcopy(tied)
    untied[1].weight = nn.Parameter(tied[0].weight.detach().clone())
    assert weights_digest(tied) == weights_digest(untied)
    assert weights_digest(tied) != weights_digest(tied[:1])


@pytest.mark.parametrize(
    "dtype",
    [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.int8, torch.bool, torch.complex64],
    ids=str,
)
@pytest.mark.parametrize("chunk_size_bytes", [1, 7, 64, 1 << 20])
def test_layout_and_chunks_do_not_count(
    dtype: torch.dtype, chunk_size_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensors, "CHUNK_SIZE_BYTES", chunk_size_bytes)
    plain = torch.arange(2 * 3 * 4 * 5).remainder(97).to(torch.float32).view(2, 3, 4, 5).to(dtype)
    expected = hashlib.sha256(plain.view(-1).view(torch.uint8).numpy().tobytes()).hexdigest()
    transposed = plain.transpose(1, 3).contiguous().transpose(1, 3)
    channels_last = plain.to(memory_format=torch.channels_last)
    sliced = torch.cat([plain, plain], dim=1)[:, :3]
    assert not transposed.is_contiguous()
    for tensor in (plain, transposed, channels_last, sliced):
        assert tensor_digest(tensor) == expected


def test_scalar_empty_and_conjugate_tensors() -> None:
    assert tensor_digest(torch.tensor(1.5)) == tensor_digest(torch.tensor([1.5]))
    assert tensor_digest(torch.zeros(0, 3)) == hashlib.sha256().hexdigest()
    numbers = torch.tensor([1 + 2j])
    assert tensor_digest(numbers.conj()) == tensor_digest(numbers.conj().resolve_conj())


def test_no_second_copy_of_a_contiguous_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    view = tensors._bytes_view

    def record(tensor: torch.Tensor) -> memoryview:
        seen.append(tensor.data_ptr())
        return view(tensor)

    monkeypatch.setattr(tensors, "_bytes_view", record)
    monkeypatch.setattr(tensors, "CHUNK_SIZE_BYTES", 256)
    weight = torch.randn(64, 64)
    tensor_digest(weight)
    assert seen == [weight.data_ptr()]


def test_copies_of_strided_weights_stay_below_the_chunk_size(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    view = tensors._bytes_view

    def record(tensor: torch.Tensor) -> memoryview:
        sizes.append(tensor.numel() * tensor.element_size())
        return view(tensor)

    monkeypatch.setattr(tensors, "_bytes_view", record)
    monkeypatch.setattr(tensors, "CHUNK_SIZE_BYTES", 1000)
    tensor_digest(torch.randn(64, 64).t())
    assert max(sizes) <= 1000
    assert sum(sizes) == 64 * 64 * 4


def test_weights_without_values_are_refused() -> None:
    with pytest.raises(CannotFreezeError, match=r"'inner\.0\.bias' is on the meta device"):
        weights_digest(Net().to("meta"))


def test_weights_without_shape_are_refused() -> None:
    with pytest.raises(CannotFreezeError, match="has no shape yet"):
        weights_digest(nn.LazyLinear(3))


def test_sparse_weights_are_refused() -> None:
    module = nn.Module()
    module.register_buffer("table", torch.eye(3).to_sparse())
    with pytest.raises(CannotFreezeError, match=r"'table' is torch\.sparse_coo"):
        weights_digest(module)
