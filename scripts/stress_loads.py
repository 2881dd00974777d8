#!/usr/bin/env python3
"""Load and drop the same graph again and again, and open it in place and as a package, in one run.

Run: ``.venv/bin/python scripts/stress_loads.py``; ``--json``. Compiles one tiny graph. The exit code is 1 if a promise
was broken: memory or mapped libraries that grow with the number of loads, weights that a dropped pipeline leaves
behind.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from figures import Figure, markdown

LOADS = 100
SETTLED = 10
MOST_GROWTH_MB = 5.0
RUNS = 30
WIDTH = 512
"""Of a part whose weights take a megabyte, so that a load that keeps them shows."""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0] if __doc__ else None)
    parser.add_argument("--loads", type=int, default=LOADS)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="stress-loads-") as folder:
        figures = [*measure_loads(Path(folder) / "vault", options.loads), *measure_opening(Path(folder))]
    print(json.dumps([asdict(figure) for figure in figures]) if options.json else markdown(figures))
    return 1 if any(figure.kept is False for figure in figures) else 0


def measure_loads(vault: Path, loads: int) -> list[Figure]:
    """What ``loads`` loads, calls and drops of one pipeline leave in the process."""
    from pipevault import PipelineCache
    from pipevault.graphs.library import mapped_libraries

    cache = PipelineCache(vault, build_config={"aot_inductor.compile_wrapper_opt_level": "O0"})

    def once() -> list[int]:
        pipe = cache.load(_toy())
        pipe(seed=1)
        return [parameter.untyped_storage()._weak_ref() for parameter in pipe.transformer.parameters()]

    for _ in range(SETTLED):
        once()
    gc.collect()
    before_mb, mapped = _resident_mb(), _mapped_files()
    gc.disable()
    try:
        left = sum(not _is_free(data) for _ in range(loads) for data in once())
    finally:
        gc.enable()
    grown_mb = _resident_mb() - before_mb
    more = len(_mapped_files() - mapped)
    return [
        Figure(
            f"resident memory after {loads} loads and drops, beyond the first {SETTLED}",
            f"{grown_mb:.1f} MB",
            f"{MOST_GROWTH_MB:.0f} MB",
            grown_mb <= MOST_GROWTH_MB,
        ),
        Figure("libraries that they leave mapped", f"{more} (of {len(mapped_libraries())})", "0", more == 0),
        Figure("weights that a drop does not free, with the garbage collector off", str(left), "0", left == 0),
    ]


def measure_opening(folder: Path) -> list[Figure]:
    """One graph opened in place, verified, against the same graph in torch's archive, in turn."""
    import torch
    from torch._inductor import aot_compile
    from torch._inductor.package.package import package_aoti

    from pipevault.compat.aot_inductor import GraphRunner
    from pipevault.digest import digest_file
    from pipevault.files.opened import open_verified
    from pipevault.graphs.inductor import strip_symbols
    from pipevault.graphs.library import LIBRARY_NAME, GraphFiles, map_library

    program = torch.export.export(_toy().transformer, (torch.ones(1, 8, WIDTH), torch.tensor(1.0)))
    options = {
        "aot_inductor.package": True,
        "aot_inductor.package_constants_in_so": False,
        "always_keep_tensor_constants": True,
        "aot_inductor.compile_wrapper_opt_level": "O0",
    }
    args, kwargs = program.example_inputs
    with torch.no_grad():
        made: Any = aot_compile(program.module(check_guards=False), args, kwargs, options=options)
    files = [file for file in made if isinstance(file, str)]
    package = Path(package_aoti(str(folder / "graph.pt2"), files))  # type: ignore[arg-type]
    [library] = [Path(file) for file in files if file.endswith(".so")]
    strip_symbols(library)
    digest, cpu = digest_file(library), torch.device("cpu")
    loader: Any = torch._C._aoti.AOTIModelPackageLoader

    def in_place() -> None:
        with open_verified(library, digest, what="The library") as file:
            name = map_library(digest.hex, GraphFiles({LIBRARY_NAME: file}))
        GraphRunner(name, cpu)

    def as_package() -> None:
        loader(str(package), "model", False, 1, -1)

    first_s = _seconds(in_place)
    again, packed = [], []
    for _ in range(RUNS):
        again.append(_seconds(in_place))
        packed.append(_seconds(as_package))
    ratio = statistics.median(packed) / statistics.median(again)
    return [
        Figure("a graph verified and opened in place, the first time", f"{1e3 * first_s:.2f} ms"),
        Figure("again in the same process", f"{1e3 * statistics.median(again):.2f} ms"),
        Figure(
            "the same graph through torch's archive, not verified",
            f"{1e3 * statistics.median(packed):.2f} ms, {ratio:.1f} times",
        ),
    ]


def _toy() -> Any:
    """A pipeline of one tiny part, without state."""
    import torch
    from diffusers.utils import BaseOutput
    from torch import nn

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mix = nn.Linear(WIDTH, WIDTH)

        def forward(self, latents: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
            return latents - 0.1 * torch.tanh(self.mix(latents)) * torch.cos(step)

    class Toy:
        def __init__(self) -> None:
            torch.manual_seed(0)
            self.transformer = Net().eval()

        def __call__(self, num_inference_steps: int = 3, generator: Any = None) -> Any:
            latents = torch.randn(1, 8, WIDTH, generator=generator)
            with torch.no_grad():
                for step in range(num_inference_steps):
                    latents = self.transformer(latents, torch.tensor(float(step)))
            return BaseOutput(images=latents)

    return Toy()


def _is_free(weak_storage: int) -> bool:
    import torch

    is_free = torch.UntypedStorage._expired(weak_storage)
    torch.UntypedStorage._free_weak_ref(weak_storage)  # type: ignore[no-untyped-call]  # it keeps the memory itself
    return bool(is_free)


def _seconds(function: Callable[[], None]) -> float:
    started_s = time.perf_counter()
    function()
    return time.perf_counter() - started_s


def _resident_mb() -> float:
    """Resident memory, without what the allocator has back and keeps."""
    ctypes.CDLL(None).malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def _mapped_files() -> set[str]:
    """Every file of which code is mapped, by inode: copies of one library are several."""
    lines = (line.split() for line in Path("/proc/self/maps").read_text().splitlines())
    return {f"{fields[3]}:{fields[4]}" for fields in lines if "x" in fields[1] and fields[4] != "0"}


if __name__ == "__main__":
    sys.exit(main())
