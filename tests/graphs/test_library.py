"""Graphs as libraries: mapped once, from verified bytes, and nothing of a dropped part stays."""

from __future__ import annotations

import ctypes
import gc
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from onediff.infer_compiler import compile as onediff_compile
from torch import nn

from helpers.mounts import with_own_tmpfs
from pipevault.digest import digest_file
from pipevault.errors import CannotFreezeError, CorruptEntryError, UnloadableGraphError
from pipevault.files.opened import open_verified
from pipevault.graphs import library as library_module
from pipevault.graphs.document import read_part
from pipevault.graphs.inductor import _collect
from pipevault.graphs.library import EXTERN_NAME, LIBRARY_NAME, GraphFiles, map_library, mapped_libraries
from pipevault.graphs.part import part_state

pytestmark = pytest.mark.compile

X = torch.arange(8.0).reshape(2, 4)


class Block(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.mix = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.mix(x))


@torch.library.custom_op("pipevault_tests::doubled", mutates_args=())
def doubled(x: torch.Tensor) -> torch.Tensor:
    return x * 2


@doubled.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


class WithOperator(nn.Module):
    """Calls an operator that has no C interface, so that its calls stand in a file beside the library."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = torch.ops.pipevault_tests.doubled(x) + 1
        return result


def saved(module: nn.Module, folder: Path) -> Path:
    folder.mkdir()
    part = onediff_compile(module, backend="inductor")
    with torch.no_grad():
        part(X)
    part.save_graph(folder / "block")
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Saved graphs of a :class:`Block`."""
    return saved(Block(1).eval(), tmp_path_factory.mktemp("graphs") / "saved")


@pytest.fixture
def library(folder: Path) -> Path:
    [document] = read_part(folder / "block")[0]
    return folder / "artifacts" / document.library


@pytest.fixture
def unmapped(monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """The libraries that a test maps, as if the process had none before."""
    mapped: dict[str, Path] = {}
    monkeypatch.setattr(library_module, "_MAPPED", mapped)
    return mapped


def loaded(folder: Path, seed: int) -> Any:
    part = onediff_compile(Block(seed).eval(), backend="inductor")
    part.load_graph(folder / "block")
    return part


def opened(path: Path) -> GraphFiles:
    return GraphFiles({LIBRARY_NAME: open_verified(path, digest_file(path), what="The library")})


def maps_of(name: str) -> set[str]:
    return {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if name in line}


class TestMapping:
    def test_what_is_put_in_its_place_meanwhile_does_not_run(
        self, library: Path, tmp_path: Path, unmapped: dict[str, Path]
    ) -> None:
        path = Path(shutil.copy(library, tmp_path / "library"))
        with opened(path) as files:
            (tmp_path / "other").write_bytes(b"no library, nor what was verified")
            os.replace(tmp_path / "other", path)
            name = map_library("a", files)
        assert hasattr(ctypes.CDLL(str(name)), "AOTInductorModelContainerRun")

    def test_a_library_is_mapped_once_and_serves_many_parts(self, folder: Path) -> None:
        parts = [loaded(folder, seed) for seed in range(3)]
        before, mapped = mapped_libraries(), maps_of("/artifacts/")
        more = [loaded(folder, seed) for seed in range(3, 6)]
        assert mapped_libraries() == before
        assert maps_of("/artifacts/") == mapped
        with torch.no_grad():
            for seed, part in enumerate([*parts, *more]):
                torch.testing.assert_close(part(X), Block(seed)(X))

    def test_a_file_system_without_code(self, library: Path, tmp_path: Path, unmapped: dict[str, Path]) -> None:
        def run() -> None:
            os.system(f"mount -o remount,noexec {tmp_path / 'disk'}")  # the tmpfs of this process alone
            path = Path(shutil.copy(library, tmp_path / "disk" / "library"))
            with opened(path) as files:
                with pytest.raises(OSError, match="failed to map"):
                    ctypes.CDLL(str(files[LIBRARY_NAME].path))
                assert "memfd" in os.readlink(map_library("a", files))

        with_own_tmpfs(tmp_path / "disk", "20m", run)

    def test_code_that_cannot_be_mapped_at_all_is_named(
        self, tmp_path: Path, unmapped: dict[str, Path], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = tmp_path / "library"
        path.write_bytes(b"no library at all")
        with opened(path) as files, pytest.raises(UnloadableGraphError, match=r"cannot be mapped.*noexec") as caught:
            map_library("a", files)
        assert caught.value.path == path
        assert not unmapped

    def test_no_descriptor_is_left_open_by_a_load(self, folder: Path) -> None:
        loaded(folder, 1)
        before = len(os.listdir("/proc/self/fd"))
        for seed in range(5):
            loaded(folder, seed)
        assert len(os.listdir("/proc/self/fd")) == before


class TestFreeing:
    def test_the_weights_of_a_dropped_part_are_freed_at_once(self, folder: Path) -> None:
        gc.collect()
        gc.disable()
        try:
            part = loaded(folder, 1)
            with torch.no_grad():
                part(X)
            weights = [parameter.untyped_storage()._weak_ref() for parameter in part.parameters()]
            del part
            assert [torch.UntypedStorage._expired(data) for data in weights] == [True, True]
        finally:
            gc.enable()


class TestFilesBesideALibrary:
    def test_an_operator_without_a_c_interface_has_a_file_of_its_own(self, tmp_path: Path) -> None:
        folder = saved(WithOperator().eval(), tmp_path / "saved")
        [document] = read_part(folder / "block")[0]
        assert set(document.beside) == {EXTERN_NAME}
        part = onediff_compile(WithOperator().eval(), backend="inductor")
        part.load_graph(folder / "block")
        assert torch.equal(part(X), X * 2 + 1)
        assert part_state(part).uses["frozen"] == 1

    def test_it_is_verified_like_the_library(self, tmp_path: Path) -> None:
        folder = saved(WithOperator().eval(), tmp_path / "saved")
        [document] = read_part(folder / "block")[0]
        beside = folder / "artifacts" / document.beside[EXTERN_NAME]
        beside.write_bytes(beside.read_bytes() + b" ")
        with pytest.raises(CorruptEntryError, match=EXTERN_NAME):
            onediff_compile(WithOperator().eval(), backend="inductor").load_graph(folder / "block")

    @pytest.mark.parametrize("name", ["../x", "a/b", "..", "", ".hidden", "x" * 300])
    def test_a_name_that_leads_elsewhere_is_refused(self, folder: Path, tmp_path: Path, name: str) -> None:
        [document] = read_part(folder / "block")[0]
        text = (folder / "block").read_text()
        changed = text.replace('"beside":{}', f'"beside":{{"{name}":"{document.library}"}}')
        assert changed != text
        (tmp_path / "block").write_text(changed)
        with pytest.raises(CorruptEntryError, match=r"`graphs\[0\].beside`: expected `str` matching"):
            read_part(tmp_path / "block")


class TestCollecting:
    """What Inductor lists for a GPU, for which no compiler runs here."""

    def files(self, folder: Path, *more: str) -> list[str]:
        names = ["a.wrapper.so", "a.wrapper.cpp", "b.kernel.cpp", "a.wrapper_metadata.json", "b.kernel_metadata.json"]
        for name in (*names, *more):
            (folder / name).write_text('{"AOTI_CPU_ISA": "AVX2"}')
        return [str(folder / name) for name in (*names, *more)]

    def test_kernels_beside_the_library_are_kept_and_sources_are_not(self, tmp_path: Path) -> None:
        (tmp_path / "out").mkdir()
        built = _collect(self.files(tmp_path, "k0.cubin", "a.wrapper.json"), tmp_path / "out")
        assert set(built.beside) == {"k0.cubin", EXTERN_NAME}
        assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [EXTERN_NAME, LIBRARY_NAME, "k0.cubin"]
        assert built.machine == {"AOTI_CPU_ISA": "AVX2"}

    def test_objects_of_torchscript_are_refused(self, tmp_path: Path) -> None:
        (tmp_path / "out").mkdir()
        with pytest.raises(CannotFreezeError, match="TorchScript"):
            _collect(self.files(tmp_path, "custom_objs_config.json"), tmp_path / "out")
