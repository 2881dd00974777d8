"""What every family must keep: right pixels at the first, second and third call, in another process, with other
arguments, after unloading and after a load that failed. ``python contract.py NAME VAULT`` is the other process.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch

import pipevault
from families.build import FAMILIES, Family
from helpers.pipelines import FAST_BUILD
from pipevault.cache.loaded import loaded_state

SEED = 5
TOLERANCE = {"float32": 2e-3, "float16": 5e-2, "bfloat16": 2e-1}
"""Of the largest value of the eager output: a few steps repeat the distance of a single call."""


@dataclass
class Report:
    """What came of one family. ``failures`` has an item for each promise that was broken."""

    name: str
    parts: dict[str, str] = field(default_factory=dict)
    eager_parts: dict[str, str] = field(default_factory=dict)
    denoiser: str = ""
    load_s: float = 0.0
    hit_s: float = 0.0
    largest: float = 0.0
    sensitivity: float = 0.0
    variations: dict[str, str] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def arrays(output: Any) -> np.ndarray:
    """The pixels, latents or samples of an output."""
    for name in ("images", "frames", "audios"):
        if (value := getattr(output, name, None)) is not None:
            return np.asarray(value.detach().float() if isinstance(value, torch.Tensor) else value)
    raise AssertionError(f"{type(output).__name__} has neither images nor frames nor audios")


def draw(pipe: Any, call: Mapping[str, Any], **changes: Any) -> np.ndarray:
    """One generation with a seeded generator."""
    with torch.no_grad():
        return arrays(pipe(**{**call, **changes}, generator=torch.Generator().manual_seed(SEED)))


def sha256(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


def distance(array: np.ndarray, eager: np.ndarray) -> float:
    """Largest difference by the largest eager value; infinite where shapes or finiteness differ."""
    if array.shape != eager.shape or not np.array_equal(np.isfinite(array), np.isfinite(eager)):
        return float("inf")
    scale = float(np.nanmax(np.abs(eager))) or 1.0
    return float(np.nanmax(np.abs(array.astype(np.float64) - eager.astype(np.float64)))) / scale


def cache(root: Path, **settings: Any) -> pipevault.PipelineCache:
    return pipevault.PipelineCache(root, build_config=FAST_BUILD, **settings)


def _check_threads(report: Report, family: Family, pipe: Any) -> None:
    """(g) Two threads call the pipeline, each with seeds of its own, and the program's streams stay where they were."""

    def one(seed: int) -> np.ndarray:
        with torch.no_grad():
            return arrays(pipe(**family.call, seed=seed))

    alone = {seed: one(seed) for seed in (1, 2)}
    before = torch.get_rng_state()
    with ThreadPoolExecutor(2) as pool:
        seeds = [1, 2, 2, 1]
        for seed, found in zip(seeds, pool.map(one, seeds), strict=True):
            if not np.array_equal(found, alone[seed]):
                report.failures.append(f"(g) seed {seed} has other bits in a thread")
    if not torch.equal(before, torch.get_rng_state()):
        report.failures.append("(g) torch's stream was left in another state")


def _check_streams(report: Report, family: Family, pipe: Any, reference: Any) -> None:
    """(h) Without a generator it draws from torch's own stream, and leaves it where eager diffusers does."""
    states = []
    for one in (reference, pipe):
        torch.manual_seed(SEED)
        with torch.no_grad():
            one(**family.call)
        states.append(torch.get_rng_state())
    if not torch.equal(*states):
        report.failures.append("(h) torch's stream is left in another place than by eager diffusers")


def check_family(family: Family, root: Path, *, compile_variations: tuple[str, ...] = ()) -> Report:
    """Run the whole contract. ``compile_variations`` are frozen on the spot; the others may run eagerly."""
    report = Report(family.name)

    def expect(condition: bool, what: str) -> None:
        if not condition:
            report.failures.append(what)

    shaken = family.make()
    with torch.no_grad():
        for module in shaken.components.values():
            for parameter in module.parameters() if isinstance(module, torch.nn.Module) else ():
                parameter.mul_(1 + 1e-6)
    reference = family.make()
    keys = cache(root)
    before = keys.key(reference, call=dict(family.call))
    eager = draw(reference, family.call)
    # Random weights may blow up rounding: what a millionth in the weights moves, another order of sums moves too.
    report.sensitivity = distance(draw(shaken, family.call), eager)
    tolerance = max(TOLERANCE[family.dtype], 3 * report.sensitivity)
    after = keys.key(reference, call=dict(family.call))
    expect(before == after, f"an eager call changes the key: {'; '.join(map(str, before.differences(after)))}")
    pipe = family.make()
    started_s = time.perf_counter()
    cache(root).load(pipe, call=dict(family.call))
    report.load_s = round(time.perf_counter() - started_s, 1)
    state = loaded_state(pipe)
    assert state is not None
    for name, part in pipevault.outcome(pipe).parts.items():
        report.parts[name] = part.status
        if part.status == "eager":
            report.eager_parts[name] = part.reason
    report.denoiser = report.parts.get(family.denoiser, "absent")

    first = draw(pipe, family.call)
    report.largest = distance(first, eager)
    expect(report.largest <= tolerance, f"(a) the first call is {report.largest:.2g} off eager")
    for number in (2, 3):
        expect(np.array_equal(draw(pipe, family.call), first), f"(b) call {number} has other bits")
    expect(
        all(part.uses["frozen"] for name, part in state.states(pipe).items() if report.parts[name] == "frozen"),
        "(b) a part that is called frozen ran no graph",
    )

    _check_threads(report, family, pipe)
    _check_streams(report, family, pipe, reference)

    other = _other_process(family, root)
    report.hit_s = other.get("ready_s", 0.0)
    expect(other.get("sha256") == sha256(first), f"(c) another process: {other.get('error') or 'other bits'}")

    for name, changes in family.variations.items():
        _variation(report, family, root, pipe, reference, name, changes, compile_variations, tolerance)
    if family.scheduler is not None:
        reference.scheduler = family.scheduler(reference)
        pipe.scheduler = family.scheduler(pipe)
        _variation(report, family, root, pipe, reference, "scheduler", {}, compile_variations, tolerance)

    fresh = family.make()
    cache(root).load(fresh)
    draw(fresh, family.call)
    pipevault.unload(fresh)
    expect(np.array_equal(draw(fresh, family.call), eager), "(e) eager after unload has other bits")

    failed = family.make()
    try:
        cache(root.with_name(f"{root.name}-failing"), progress=_fail).load(failed, call=dict(family.call))
        report.failures.append("(f) the load that was made to fail did not fail")
    except InterruptionError:
        expect(np.array_equal(draw(failed, family.call), eager), "(f) eager after a failed load has other bits")
    return report


class InterruptionError(Exception):
    """Raised in the middle of a load."""


def _fail(step: Any) -> None:
    if step.action == "compile":
        raise InterruptionError


def _variation(
    report: Report,
    family: Family,
    root: Path,
    pipe: Any,
    reference: Any,
    name: str,
    changes: Mapping[str, Any],
    compile_variations: tuple[str, ...],
    tolerance: float,
) -> None:
    """(d) Right pixels, by a graph or by the policy, twice with the same bits."""
    on_unfrozen = "compile" if name in compile_variations else "eager"
    cache(root, on_unfrozen=on_unfrozen).load(pipe)
    state = loaded_state(pipe)
    assert state is not None
    states = state.states(pipe)
    before = {part: (s.uses["frozen"], s.uses["eager"]) for part, s in states.items()}
    try:
        expected = draw(reference, family.call, **changes)
        if not np.array_equal(draw(reference, family.call, **changes), expected):
            report.variations[name] = "unrepeatable"  # the eager pipeline itself draws something else each time
            return
        got = draw(pipe, family.call, **changes)
        again = draw(pipe, family.call, **changes)
    except Exception as error:
        report.variations[name] = f"{type(error).__name__}: {error}"
        report.failures.append(f"(d) {name}: {type(error).__name__}: {str(error).splitlines()[0]}")
        return
    off = distance(got, expected)
    denoiser = states.get(family.denoiser)
    by_graph = denoiser is not None and denoiser.uses["frozen"] > before[family.denoiser][0]
    report.variations[name] = "graph" if by_graph else "eager"
    if off > tolerance:
        report.failures.append(f"(d) {name} is {off:.2g} off eager")
    if not np.array_equal(got, again):
        report.failures.append(f"(d) {name}: the second call has other bits")


def _other_process(family: Family, root: Path) -> dict[str, Any]:
    command = [sys.executable, str(Path(__file__)), family.name, str(root)]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    try:
        document: dict[str, Any] = json.loads(finished.stdout.splitlines()[-1])
    except (ValueError, IndexError):
        return {"error": finished.stderr[-400:]}
    return document


def main(name: str, root: Path) -> None:
    family = FAMILIES[name]
    pipe = family.make()
    started_s = time.perf_counter()
    try:
        cache(root, mode="require").load(pipe, call=dict(family.call))
        ready_s = time.perf_counter() - started_s
        print(json.dumps({"sha256": sha256(draw(pipe, family.call)), "ready_s": round(ready_s, 3)}))
    except pipevault.errors.PipevaultError as error:
        print(json.dumps({"error": f"{type(error).__name__}: {error}"}))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
