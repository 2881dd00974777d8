"""The drift of outputs where bits cannot be the same, measured in fresh processes, for the tolerance of a golden.

Each cause of drift is a process of its own that draws the cases without frozen graphs: eager code as it is, with
another number of threads, and with the kernels of a smaller instruction set. What comes out is compared with what the
frozen graphs drew. The limits are :data:`MARGIN` times the largest distance of all causes, and never below
:data:`SMALLEST`: a pixel is rounded to whole steps, so the least drift there is moves one by a step or not at all.

The child is ``python -m pipevault.evidence.golden.drift SUITE FOLDER CASE…``; it leaves ``FOLDER/CASE.npz``.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from pipevault.cache.loaded import LoadedState
from pipevault.cache.outcome import Outcome
from pipevault.errors import PipevaultError
from pipevault.evidence.generation_job import other_threads, smaller_kernels
from pipevault.evidence.golden.check import distance_of
from pipevault.evidence.golden.drawn import Drawn, samples_of, seen_latents
from pipevault.evidence.golden.files import Tolerance
from pipevault.evidence.golden.suite_file import Limits, Suite, read_suite
from pipevault.evidence.metrics import Distance
from pipevault.files.child import leave_error, run_child
from pipevault.files.scratch import scratch_folder
from pipevault.runtime.generation import generate
from pipevault.settings import Settings

MARGIN = 2.0
SMALLEST = Limits(pixels_max_abs=2.0, pixels_mean_abs=0.05, latents_max_abs=1e-5, latents_mean_abs=1e-6)
"""Two steps of 255 in single pixels, one pixel in twenty by one step, and a few units in the last place of float32
latents of the size that they have.
"""

_CHILD = "pipevault.evidence.golden.drift"


def causes(machine: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """Return the environment variables of each cause of drift that this machine can show."""
    found: dict[str, dict[str, str]] = {"eager": {}}
    if machine.get("type") == "cpu":
        threads, kernels = other_threads(machine["threads"]), smaller_kernels(machine["capability"])
        found["eager, 2 threads" if machine["threads"] == 1 else "eager, 1 thread"] = threads
        found |= {f"eager, {name} kernels": kernels for name in kernels.values()}
    return found


def measure_tolerances(suite: Suite, drawn: Mapping[str, Drawn]) -> dict[str, Tolerance]:
    """Measure a tolerance for each case from what it drew here. :class:`PipevaultError` if a process fails."""
    distances: dict[str, dict[str, dict[str, Distance]]] = {name: {} for name in drawn}
    machine = next(iter(drawn.values())).record.machine
    for cause, environment in causes(machine).items():
        what = f"Measuring the tolerance of {suite.path} for {cause!r}"
        with scratch_folder("golden") as folder:
            run_child(_CHILD, [str(suite.path), str(folder), *drawn], folder, name=what, environment=environment)
            for name, one in drawn.items():
                distances[name][cause] = distance_of(one, _read(folder / f"{name}.npz", one))
    return {name: tolerance_of(found) for name, found in distances.items()}


def tolerance_of(distances: Mapping[str, Mapping[str, Distance]]) -> Tolerance:
    limits = {}
    for kind in ("pixels", "latents"):
        found = [by_kind[kind] for by_kind in distances.values() if kind in by_kind]
        for measure in ("max_abs", "mean_abs"):
            name = f"{kind}_{measure}"
            if found:
                limits[name] = max(MARGIN * max(getattr(one, measure) for one in found), getattr(SMALLEST, name))
    measured = {cause: {kind: one.to_json() for kind, one in by_kind.items()} for cause, by_kind in distances.items()}
    return Tolerance(Limits(**limits), MARGIN, measured)


def _read(path: Path, like: Drawn) -> Drawn:
    with np.load(path, allow_pickle=False) as arrays:
        samples, latents = (
            tuple(array for name, array in arrays.items() if name.startswith(kind)) for kind in ("sample", "latents")
        )
    return Drawn(like.record, samples, latents)


def _draw_eagerly(suite: Suite, names: tuple[str, ...], folder: Path) -> None:
    level = Settings.resolve(level=suite.level).level
    for case in suite.selected(names):
        pipe = suite.open()
        arguments = {**case.request.call_arguments(pipe), "seed": case.request.seed}
        state = LoadedState(Outcome("off"), weakref.ref(pipe), level=level)
        with seen_latents(pipe) as latents:
            output = generate(pipe, type(pipe).__call__, (), arguments, partial(lambda found: found, state))
        arrays = {f"sample-{index}": np.asarray(sample) for index, sample in enumerate(samples_of(output))}
        arrays |= {f"latents-{index}": array for index, array in enumerate(latents)}
        np.savez(folder / f"{case.name}.npz", allow_pickle=False, **arrays)


def main(arguments: list[str]) -> int:
    """Return the exit code of the child: 0, or 1 with an error left for the parent."""
    suite, folder, *names = arguments
    try:
        _draw_eagerly(read_suite(suite), tuple(names), Path(folder))
    except PipevaultError as error:
        leave_error(Path(folder), error)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
