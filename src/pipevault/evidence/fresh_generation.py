"""The work of a fresh process: open a pipeline, make it ready, generate, write the pictures.

Whatever the method, the noise is the same: a CPU generator for each sample and float32 draws on the host. That is all
that an eager or a torch.compile run has of pipevault, and inside the parts, which draw nothing, not even that.
"""

from __future__ import annotations

import functools
import json
import os
import resource
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from torch._C import _len_torch_function_stack
from torch.overrides import _pop_mode_temporarily

from pipevault.cache.keys import execution_device
from pipevault.cache.loaded import outcome
from pipevault.cache.outcome import Clock, Outcome
from pipevault.cache.pipeline_cache import PipelineCache
from pipevault.cache.regions import repeated_blocks
from pipevault.calls.call import parameters
from pipevault.calls.describe import digest_array
from pipevault.calls.outputs import as_array, of_first_field, samples
from pipevault.calls.samples import samples_of
from pipevault.errors import BadCallError, PipevaultError
from pipevault.evidence.files import Array
from pipevault.evidence.generation_job import COMPILED_BY_BLOCKS, RESULT_FILE, GenerationJob, GenerationResult
from pipevault.files.child import leave_error
from pipevault.fingerprint.toolchain import toolchain_factors
from pipevault.graphs import parts as graph_parts
from pipevault.graphs.inductor import GRAPH_FORMAT
from pipevault.opening import open_pipeline
from pipevault.pipeline import Pipeline
from pipevault.runtime.drawing import Sources, draw
from pipevault.runtime.records import record_of

Draw: TypeAlias = Callable[[Mapping[str, Any]], "tuple[Any, str | None]"]
"""From the arguments of a call to its output and the SHA-256 of the noise."""

_STEP_CALLBACK = "callback_on_step_end"


def generate_for(job: GenerationJob, folder: Path, *, started_at_s: float) -> GenerationResult:
    """Run ``job`` and write its pictures and latents to ``folder``. ``started_at_s`` is in seconds since the epoch."""
    import diffusers  # noqa: F401 - its import counts as import and not as opening

    clock, imported_s = Clock(None), time.time() - started_at_s
    with clock.timed("open"):
        pipe = open_pipeline(job.model, dtype=job.dtype, device=job.device, pipeline_class=job.pipeline_class)
    arguments = job.request.call_arguments(pipe)
    if "prompt" in parameters(pipe) and not any(name.startswith("prompt") for name in arguments):
        raise BadCallError(f"{type(pipe).__name__} draws what a prompt says. Give at least one, with --prompt TEXT.")
    device = execution_device(pipe, graph_parts.find_parts(pipe))
    with clock.timed("ready"):
        generate, loaded = _make_ready(pipe, job)
    load_seconds = dict(loaded.seconds) if loaded else {}
    pictures: list[Array] = []
    pixels: list[tuple[str, ...]] = []
    noise: str | None = None
    steps = _LastLatents()
    steps_s: tuple[float, ...] = ()
    calls_s: list[float] = []
    for _ in range(job.generations):
        steps = _LastLatents()
        call = {**arguments, _STEP_CALLBACK: steps} if _STEP_CALLBACK in parameters(pipe) else arguments
        begun_s = time.perf_counter()
        output, noise = generate(call)
        calls_s.append(time.perf_counter() - begun_s)
        steps_s = steps_s or tuple(ended_s - begun_s for ended_s in steps.ended_s)
        drawn = [as_array(one.content) for one in of_first_field(samples(output))]
        pictures = pictures or drawn
        pixels.append(tuple(map(digest_array, drawn)))
    seconds = {"import": imported_s, **clock.seconds, **dict(zip(("first", "warm"), calls_s, strict=False))}
    if job.artifacts is not None and not job.artifacts.exists() and (kept := torch.compiler.save_cache_artifacts()):
        job.artifacts.write_bytes(kept[0])
    return GenerationResult(
        pictures=tuple(_saved(one, folder / f"picture-{index}.npy") for index, one in enumerate(pictures)),
        pixels=pixels[0] if pixels else (),
        warm_pixels=pixels[1] if len(pixels) > 1 else (),
        latents=steps.write(folder / "latents.npy"),
        noise=noise,
        seconds=seconds,
        outcome=loaded.status if loaded else "",
        left_eager=loaded.reason if loaded and loaded.status == "partial" else "",
        key=loaded.key.hex if loaded and loaded.key else None,
        device=device.type,
        threads=torch.get_num_threads(),
        capability=str(torch.backends.cpu.get_cpu_capability()),
        versions=toolchain_factors(graph_format=GRAPH_FORMAT),
        peak_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        load_seconds=load_seconds,
        calls_s=tuple(calls_s),
        steps_s=steps_s,
    )


def _make_ready(pipe: Any, job: GenerationJob) -> tuple[Draw, Outcome | None]:
    seed = job.request.seed
    if job.method == "frozen":
        names = ("mode", "level", "regions", "jobs", "compile_profile", "build_config")
        cache = PipelineCache(job.dir, **{name: getattr(job, name) for name in names})
        cache.load(pipe, **{**job.request.load_arguments(pipe), **job.load})

        def draw_frozen(arguments: Mapping[str, Any]) -> tuple[Any, str | None]:
            output = pipe(**arguments, seed=seed)
            return output, record_of(output).results["noise"]

        return draw_frozen, outcome(pipe)
    if job.artifacts is not None and job.artifacts.exists():
        torch.compiler.load_cache_artifacts(job.artifacts.read_bytes())
    for part in graph_parts.find_parts(pipe).values():
        blocks = [block for _, block in repeated_blocks(part)] if job.method == COMPILED_BY_BLOCKS else []
        for module in blocks or [part]:
            # Its own arithmetic must run as it would without pipevault, and a mode must not be traced.
            forward = module.forward if job.method == "eager" else torch.compile(module.forward)
            module.forward = _outside_modes(forward)

    def draw_plain(arguments: Mapping[str, Any]) -> tuple[Any, str | None]:
        accepted = parameters(pipe)
        count = samples_of(arguments, accepted, pipeline=type(pipe)).count
        sources = Sources.of_call(arguments, seed=seed, is_seeded=True, count=count, accepted=accepted)
        modules = graph_parts.find_parts(pipe).values()
        drawn = draw(lambda given: pipe(**given), arguments, sources, count, is_alone=True, modules=modules)
        return drawn.output, drawn.noise

    return draw_plain, None


def _outside_modes(forward: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(forward)
    def outside(*args: Any, **kwargs: Any) -> Any:
        with ExitStack() as stack:
            for _ in range(_len_torch_function_stack()):
                stack.enter_context(_pop_mode_temporarily())
            return forward(*args, **kwargs)

    return outside


class _LastLatents:
    """A ``callback_on_step_end`` that keeps the latents after the last step, of each call where there are several.

    Hooks on modules, as goldens have them, would be traced by torch.compile and change what is measured.
    """

    def __init__(self) -> None:
        self._of_calls: list[torch.Tensor] = []
        self.ended_s: list[float] = []
        """When each step ended."""

    def __call__(self, pipe: Pipeline, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        self.ended_s.append(time.perf_counter())
        if isinstance(latents := tensors.get("latents"), torch.Tensor):
            if step > 0 and self._of_calls:
                self._of_calls.pop()
            self._of_calls.append(latents)
        return tensors

    def write(self, path: Path) -> Path | None:
        if not self._of_calls:
            return None
        return _saved(torch.cat(self._of_calls).detach().to("cpu", torch.float32).numpy(), path)


def _saved(array: Array, path: Path) -> Path:
    np.save(path, array)
    return path


def main(job_file: Path) -> int:
    """Return the exit code of the child: 0 with a result, 1 with an error file; any other exception goes its way."""
    document = json.loads(job_file.read_text("utf-8"))
    job, folder = GenerationJob.from_json(document["job"]), job_file.parent
    try:
        result = generate_for(job, folder, started_at_s=document["started_at_s"])
    except PipevaultError as error:
        leave_error(folder, error)
        return 1
    (folder / RESULT_FILE).write_text(json.dumps(asdict(result), default=os.fspath), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
