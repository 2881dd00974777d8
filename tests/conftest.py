"""Markers and fixtures shared by all tests. What takes a compilation is made once for a test session."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from hypothesis import settings

settings.register_profile("repeatable", derandomize=True, deadline=None, database=None)
if examples := os.environ.get("RANDOM_EXAMPLES"):
    settings.register_profile("random", derandomize=False, deadline=None, max_examples=int(examples), print_blob=True)
settings.load_profile("random" if examples else "repeatable")

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parent))


FAMILIES = Path(__file__).parent / "families"
COMPILING = frozenset({"block_folder", "frozen_vault", "plain_vault", "small_part"})
"""Fixtures that compile: who uses one waits for it."""


@pytest.hookimpl(tryfirst=True)  # before -m is looked at
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if FAMILIES in item.path.parents:
            item.add_marker(pytest.mark.families)
        if COMPILING.intersection(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.compile)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("root") and os.geteuid() != 0:
        pytest.skip("only root may act as other users")
    if item.get_closest_marker("browser"):
        from helpers.browser import require_chromium

        require_chromium()


@pytest.fixture(scope="session")
def _compiler_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What compilers make again and again, for all tests."""
    return tmp_path_factory.mktemp("compiler")


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, _compiler_folder: Path) -> None:
    for name in [name for name in os.environ if name.startswith("PIPEVAULT_")]:
        monkeypatch.delenv(name)
    monkeypatch.delenv("COLUMNS", raising=False)  # which workers of pytest-xdist have
    cache = tmp_path.with_name(f"{tmp_path.name}-cache")
    (cache / "pipevault").mkdir(parents=True)
    (cache / "pipevault" / "compiler").symlink_to(_compiler_folder)
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))


@pytest.fixture(scope="session")
def block_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A compiled ``Block``, saved as onediffx's ``save_pipe`` saves a part: ``block_folder / "block"``."""

    def make(folder: Path) -> None:
        import torch
        from onediff.infer_compiler import compile as onediff_compile

        from helpers.pipelines import FAST_BUILD, Block
        from pipevault.graphs.inductor import BuildOptions
        from pipevault.graphs.part import BACKEND
        from pipevault.graphs.state import PartOptions

        torch.manual_seed(0)
        options = PartOptions(build=BuildOptions(config=FAST_BUILD))
        part = onediff_compile(Block().eval(), backend=BACKEND, options=options)
        with torch.no_grad():
            part(torch.randn(2, 16), scale=2.0)
        part.save_graph(folder / "block")

    from helpers.made_once import made_once

    return made_once(tmp_path_factory, "block", make)


@pytest.fixture(scope="session")
def frozen_vault(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A vault that holds the tiny Stable Diffusion pipeline at its default size. Tests must not write to it.

    The pixels that the compiling process drew lie next to it: ``pixels_of_the_compiling_process.npy``.
    """

    def make(folder: Path) -> None:
        import numpy as np

        import pipevault
        from helpers.pipelines import FAST_BUILD, draw, stable_diffusion

        pipe = stable_diffusion(folder / "tokenizer")
        pipevault.PipelineCache(folder / "vault", build_config=FAST_BUILD).load(pipe, batch_size=1)
        assert pipevault.outcome(pipe).status == "miss", pipevault.outcome(pipe).reason
        np.save(folder / "pixels_of_the_compiling_process.npy", draw(pipe).numpy())

    from helpers.made_once import made_once

    return made_once(tmp_path_factory, "frozen", make) / "vault"


@pytest.fixture(scope="session")
def plain_vault(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A vault that holds ``PlainPipeline`` at 8x8. Tests copy it before they write to it."""

    def make(folder: Path) -> None:
        import pipevault
        from helpers.pipelines import FAST_BUILD, PlainPipeline

        pipevault.PipelineCache(folder / "vault", build_config=FAST_BUILD).load(PlainPipeline(), batch_size=1)

    from helpers.made_once import made_once

    return made_once(tmp_path_factory, "plain", make) / "vault"
