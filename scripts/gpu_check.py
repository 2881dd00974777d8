#!/usr/bin/env python3
"""Check pipevault on a CUDA machine, in one run of at most eight minutes: right, the same bits, how fast, refused.

Run: ``python scripts/gpu_check.py``. Models of the size of Stable Diffusion 1.5, SDXL and a short Flux are built from
configurations with random weights, so nothing is downloaded. For each, a process compares the frozen model with the
eager one and compiles it into a fresh vault, a second process loads it from there, and a third times it beside
``torch.compile``. A stage for which the rest of ``--budget-s`` is too short is skipped and listed. The results so far
are always in ``--out``; the exit code is 1 if a check failed. ``--dry-run`` does the same with tiny models on a CPU.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

RESULTS_DIR = Path(__file__).resolve().parent / "results"
MODELS = ("sd15", "dit", "sdxl")
SMALL_MODELS = ("sd15", "dit")
"""The first of these that runs is the one that is offloaded to the CPU."""
STEPS = 4
WARM_STEPS, TIMED_STEPS = 5, 20
DRY_STEPS = 2
POLL_S = 0.2
FAST_BUILD = {"aot_inductor.compile_wrapper_opt_level": "O0"}
NOT_MEASURED = ""

# Guesses of the seconds that a process takes on a card of 2023: one that has less left is not started.
NEED_S = {
    "sd15": {"freeze": 80.0, "hit": 25.0, "speed": 60.0},
    "dit": {"freeze": 50.0, "hit": 25.0, "speed": 45.0},
    "sdxl": {"freeze": 150.0, "hit": 35.0, "speed": 100.0},
}
REQUIRED = {"freeze": "cold load", "hit": "ready", "speed": "steps"}
"""The stage of each process without which what follows it makes no sense."""


class Budget:
    """Seconds that may be spent, counted from now."""

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._end = clock() + seconds

    def left_s(self) -> float:
        return self._end - self._clock()

    def shortage(self, need_s: float) -> str:
        """Why something that takes ``need_s`` is not begun, or nothing."""
        left_s = max(0.0, self.left_s())
        return "" if left_s >= need_s else f"it takes about {need_s:.0f} s and {left_s:.0f} s are left of the budget"


class Sink(Protocol):
    """Where stages tell what they found."""

    def check(self, name: str, ok: bool, detail: str) -> None: ...

    def skipped(self, what: str, why: str) -> None: ...

    def began(self, stage: str) -> None: ...

    def done(self, stage: str) -> None: ...


@dataclass(frozen=True)
class Stage:
    """One thing to do. ``run`` returns whether it came to its end; ``after`` names a stage that must have."""

    name: str
    need_s: float
    run: Callable[[], bool]
    after: str = ""


def run_stages(stages: Sequence[Stage], budget: Budget, sink: Sink, prefix: str = "") -> None:
    """Run each stage that the budget allows; what is not run, or raises, is told to ``sink``."""
    finished: set[str] = set()
    for stage in stages:
        label = f"{prefix}{stage.name}"
        if stage.after and stage.after not in finished:
            sink.skipped(label, f"{prefix}{stage.after} did not come to its end")
            continue
        if why := budget.shortage(stage.need_s):
            sink.skipped(label, why)
            continue
        sink.began(stage.name)
        try:
            ended = stage.run()
        except Exception as error:  # whatever it is, it is a failed check, and the other stages go on
            sink.check(label, False, _described(error))
            continue
        if ended:
            finished.add(stage.name)
            sink.done(stage.name)


def _described(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:600]}"


# --- models


@dataclass(frozen=True)
class Case:
    """One model in one dtype."""

    model: str
    dtype: str
    tiny: bool = False

    @property
    def name(self) -> str:
        return f"{self.model}-{self.dtype}"

    @property
    def part(self) -> str:
        return "transformer" if self.model == "dit" else "unet"

    @property
    def size(self) -> dict[str, int]:
        """What a call is given: rows of the batch, latent side (or image tokens), text tokens."""
        if self.model == "dit":
            return {"batch": 1, "image_tokens": 16, "text_tokens": 8} if self.tiny else FLUX_SIZE
        side = 8 if self.tiny else {"sd15": 64, "sdxl": 128}[self.model]
        return {"batch": 2, "side": side, "text_tokens": 8 if self.tiny else 77}


FLUX_SIZE = {"batch": 1, "image_tokens": 4096, "text_tokens": 512}

CONFIGS: dict[str, dict[str, Any]] = {
    "sd15": {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8},
    "sdxl": {
        "sample_size": 128,
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 10),
        "attention_head_dim": (5, 10, 20),
        "cross_attention_dim": 2048,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 1280 + 6 * 256,
    },
    "dit": {"num_layers": 4, "num_single_layers": 8, "guidance_embeds": True},
}
_TINY_UNET: dict[str, Any] = {
    "sample_size": 8,
    "layers_per_block": 1,
    "block_out_channels": (8,),
    "down_block_types": ("CrossAttnDownBlock2D",),
    "mid_block_type": None,
    "up_block_types": ("CrossAttnUpBlock2D",),
    "cross_attention_dim": 16,
    "norm_num_groups": 4,
}
TINY_CONFIGS: dict[str, dict[str, Any]] = {
    "sd15": {**_TINY_UNET, "attention_head_dim": 2},
    "sdxl": {
        **_TINY_UNET,
        "transformer_layers_per_block": (1,),
        "attention_head_dim": (2,),
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 4,
        "projection_class_embeddings_input_dim": 16 + 6 * 4,
    },
    "dit": {
        "num_layers": 1,
        "num_single_layers": 1,
        "guidance_embeds": True,
        "in_channels": 4,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 16,
        "pooled_projection_dim": 16,
        "axes_dims_rope": (4, 4, 8),
    },
}


def build_model(case: Case, device: Any) -> Any:
    """The model of ``case`` with seeded random weights: drawn on ``device``, so the same in each process there."""
    import torch
    from diffusers import FluxTransformer2DModel, UNet2DConditionModel

    cls: Any = FluxTransformer2DModel if case.model == "dit" else UNet2DConditionModel
    torch.manual_seed(0)
    with torch.device(device):
        model = cls(**(TINY_CONFIGS if case.tiny else CONFIGS)[case.model])
    return model.to(getattr(torch, case.dtype)).eval().requires_grad_(False)


class Pipeline:
    """What the pipelines have in common: noise from a seed, steps that follow the model's prediction, their times.

    Each output of a call is kept in ``outputs`` too, those of the runs inside of a load among them.
    """

    def __init__(self, case: Case, model: Any, device: Any) -> None:
        setattr(self, case.part, model)
        self.vae_scale_factor = 1
        self.device = device
        self.inputs = {name: value.to(device) for name, value in made_up_inputs(case, model.config).items()}
        self.step_s: list[float] = []
        self.outputs: list[dict[str, Any]] = []

    @property
    def _execution_device(self) -> Any:
        """Read by pipevault where hooks keep the weights elsewhere, as in diffusers' pipelines."""
        return self.device

    def __call__(self, num_inference_steps: int = STEPS, seed: int = 0) -> dict[str, Any]:
        import torch

        like = self.inputs["noise"]
        noise = torch.randn(like.shape, generator=torch.Generator().manual_seed(seed))
        latents = noise.to(self.device, like.dtype)
        prediction = latents
        times = torch.linspace(999, 1, num_inference_steps).long().to(self.device)
        with torch.no_grad():
            for time_step in times:
                synchronize(self.device)
                started_s = time.perf_counter()
                prediction = self.predict(latents, time_step)
                latents = latents - prediction / num_inference_steps
                synchronize(self.device)
                self.step_s.append(time.perf_counter() - started_s)
        output = {"latents": latents, "prediction": prediction}
        self.outputs.append(output)
        return output

    def predict(self, latents: Any, time_step: Any) -> Any:
        raise NotImplementedError


class UNetPipeline(Pipeline):
    """Calls a UNet as the pipelines of Stable Diffusion and SDXL do."""

    unet: Any

    def predict(self, latents: Any, time_step: Any) -> Any:
        more = {name: self.inputs[name] for name in ("text_embeds", "time_ids") if name in self.inputs}
        text = self.inputs["text"]
        return self.unet(
            latents, time_step, encoder_hidden_states=text, added_cond_kwargs=more or None, return_dict=False
        )[0]


class DiTPipeline(Pipeline):
    """Calls a transformer as Flux's pipeline does."""

    transformer: Any

    def predict(self, latents: Any, time_step: Any) -> Any:
        inputs = self.inputs
        return self.transformer(
            hidden_states=latents,
            timestep=time_step.expand(latents.shape[0]).to(latents.dtype) / 1000,
            guidance=inputs["guidance"],
            pooled_projections=inputs["pooled"],
            encoder_hidden_states=inputs["text"],
            txt_ids=inputs["txt_ids"],
            img_ids=inputs["img_ids"],
            return_dict=False,
        )[0]


def made_up_inputs(case: Case, config: Any) -> dict[str, Any]:
    """Seeded embeddings in place of those of text encoders; ``noise`` has the shape of the latents."""
    import torch

    size, dtype = case.size, getattr(torch, case.dtype)
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Any:
        return torch.randn(shape, generator=generator).to(dtype)

    batch, text_tokens = size["batch"], size["text_tokens"]
    if case.model == "dit":
        side = int(size["image_tokens"] ** 0.5)
        ids = torch.zeros(side, side, 3, dtype=dtype)
        ids[..., 1] += torch.arange(side)[:, None]
        ids[..., 2] += torch.arange(side)[None, :]
        return {
            "noise": torch.zeros(batch, size["image_tokens"], config.in_channels, dtype=dtype),
            "text": normal(batch, text_tokens, config.joint_attention_dim),
            "pooled": normal(batch, config.pooled_projection_dim),
            "guidance": torch.full((batch,), 3.5),
            "img_ids": ids.reshape(-1, 3),
            "txt_ids": torch.zeros(text_tokens, 3, dtype=dtype),
        }
    side = size["side"]
    inputs = {
        "noise": torch.zeros(batch, config.in_channels, side, side, dtype=dtype),
        "text": normal(batch, text_tokens, config.cross_attention_dim),
    }
    if config.addition_embed_type == "text_time":
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        pixels = 8 * side
        inputs["text_embeds"] = normal(batch, pooled)
        inputs["time_ids"] = torch.tensor([[pixels, pixels, 0, 0, pixels, pixels]] * batch, dtype=dtype)
    return inputs


def build_pipeline(case: Case, device: Any) -> Pipeline:
    pipe = (DiTPipeline if case.model == "dit" else UNetPipeline)(case, build_model(case, device), device)
    synchronize(device)
    return pipe


def synchronize(device: Any) -> None:
    if device.type == "cuda":
        import torch

        torch.cuda.synchronize(device)


def output_digest(output: Mapping[str, Any]) -> str:
    """The SHA-256 over every bit of an output."""
    import torch

    digest = hashlib.sha256()
    for name in sorted(output):
        digest.update(name.encode())
        digest.update(output[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def weights_sum(model: Any) -> float:
    """A number that tells whether two processes have the same weights, where hashing them would take long."""
    import torch

    return float(torch.stack([parameter.double().sum() for parameter in model.parameters()]).sum())


# --- work of one process, told line by line


@dataclass
class Events:
    """Appends what a process finds to a file that its parent reads while it runs."""

    path: Path
    prefix: str
    kind: str
    finished: list[str] = field(default_factory=list)

    def _tell(self, **event: Any) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(event) + "\n")

    def figures(self, **figures: Any) -> None:
        self._tell(figures=figures)

    def check(self, name: str, ok: bool, detail: str) -> None:
        self._tell(check={"name": name, "ok": ok, "detail": detail})

    def skipped(self, what: str, why: str) -> None:
        self._tell(skipped={"what": what, "why": why})

    def began(self, stage: str) -> None:
        self._tell(began=stage)

    def done(self, stage: str) -> None:
        self.finished.append(stage)
        self._tell(done=stage)


class Bench:
    """One model in one process: what the stages share."""

    def __init__(self, case: Case, vault: Path, events: Events, known: Mapping[str, Any], *, offload: bool) -> None:
        import torch

        self.case, self.vault, self.events, self.known, self.offload = case, vault, events, known, offload
        self.device = torch.device("cpu" if case.tiny else "cuda:0")
        self.steps = DRY_STEPS if case.tiny else STEPS
        self.pipe = build_pipeline(case, self.device)
        self.output: Any = None
        model = self.module
        parameters = sum(parameter.numel() for parameter in model.parameters())
        weights_bytes = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
        events.figures(parameters=parameters, weights_bytes=weights_bytes, size=case.size, steps=self.steps)

    @property
    def module(self) -> Any:
        return getattr(self.pipe, self.case.part)

    def check(self, name: str, ok: bool, detail: str) -> None:
        self.events.check(f"{self.case.name}: {name}", ok, detail)

    def load(self, mode: str, *, shape: bool = True) -> Any:
        """Load the pipeline, and return the outcome."""
        from pipevault import PipelineCache, outcome

        build = FAST_BUILD if self.case.tiny else None
        cache = PipelineCache(self.vault, mode=mode, build_config=build)
        cache.load(self.pipe, call={"num_inference_steps": self.steps} if shape else None)
        return outcome(self.pipe)

    def run(self) -> dict[str, Any]:
        """One call of the pipeline with the default seed."""
        output = self.pipe(num_inference_steps=self.steps)
        self.pipe.outputs.clear()
        return output

    def first_step_s(self) -> float:
        started_s = time.perf_counter()
        self.pipe(num_inference_steps=1)
        synchronize(self.device)
        self.pipe.outputs.clear()
        return time.perf_counter() - started_s

    def time_steps(self) -> dict[str, Any]:
        warm, timed = (1, DRY_STEPS) if self.case.tiny else (WARM_STEPS, TIMED_STEPS)
        self.pipe.step_s.clear()
        self.pipe(num_inference_steps=warm + timed)
        self.pipe.outputs.clear()
        times_s = self.pipe.step_s[warm:]
        return {"median_s": statistics.median(times_s), "all_s": [round(second, 7) for second in times_s]}

    def reset_peak(self) -> None:
        if self.device.type == "cuda":
            import torch

            torch.cuda.reset_peak_memory_stats(self.device)

    def tell_peak(self, name: str) -> None:
        if self.device.type == "cuda":
            import torch

            self.events.figures(**{name: torch.cuda.max_memory_allocated(self.device)})
        else:
            self.events.skipped(f"{self.case.name}: {name}", "needs CUDA")

    def frozen_calls(self) -> tuple[int, int]:
        """How many calls of the part ran a graph, and how many eager code."""
        from pipevault.graphs.part import FrozenPart, part_state

        if not isinstance(self.module, FrozenPart):
            return 0, 0
        uses = part_state(self.module).uses
        return uses["frozen"], uses["eager"]

    def compared(self, expected: Any, actual: Any) -> Any:
        from pipevault.graphs.check import compare_trees, pipeline_tolerance

        return compare_trees(expected, actual, tolerance=pipeline_tolerance([self.module]))

    # the process that compiles

    def eager_first(self) -> bool:
        self.reset_peak()
        self.events.figures(eager_first_step_s=self.first_step_s())
        self.output = self.run()
        self.tell_peak("peak_eager_bytes")
        self.events.figures(weights_sum=weights_sum(self.module))
        return True

    def cold_load(self) -> bool:
        started_s = time.perf_counter()
        outcome = self.load("compile")
        cold_load_s = time.perf_counter() - started_s
        runs = [output_digest(output) for output in self.pipe.outputs]
        self.pipe.outputs.clear()
        part = outcome.parts[self.case.part]
        self.check(
            "a cold load compiles the model into the vault",
            outcome.status == "miss" and part.status == "frozen" and part.graphs > 0 and outcome.stored,
            f"outcome {outcome.status}, {self.case.part} {part.status}, {part.graphs} graphs {part.reason}".strip(),
        )
        self.events.figures(
            cold_load_s=cold_load_s,
            cold_load_steps_s={name: round(second, 3) for name, second in outcome.seconds.items()},
            vault_bytes=sum(path.stat().st_size for path in self.vault.rglob("*") if path.is_file()),
        )
        # The rehearsal in a load runs the pipeline eagerly, and then frozen, compiling on the way.
        if len(runs) > 1:
            self.events.figures(sha256_compiling_run=runs[1])
        return True

    def frozen(self) -> bool:
        before = self.frozen_calls()
        output = self.run()
        after = self.frozen_calls()
        ran = (after[0] - before[0], after[1] - before[1])
        ok = ran == (self.steps, 0)
        self.check("every step runs the graph", ok, f"{ran[0]} frozen calls, {ran[1]} eager, of {self.steps} steps")
        found = self.compared(self.output, output)
        detail = found.failure or f"distance {found.distance:.3g}, tolerance {found.tolerance:.3g}"
        self.check("frozen equals eager within tolerance", found.passed, detail)
        if found.passed:
            self.events.figures(distance=found.distance, tolerance=found.tolerance)
        self.events.figures(sha256_second_call=output_digest(output))
        return True

    # the process that hits

    def ready(self) -> bool:
        started_s = time.perf_counter()
        import pipevault.cache.pipeline_cache  # noqa: F401

        imported_s = time.perf_counter()
        self.reset_peak()
        outcome = self.load("require")
        loaded_s = time.perf_counter()
        first_step_s = self.first_step_s()
        self.events.figures(
            import_s=imported_s - started_s,
            hit_load_s=loaded_s - imported_s,
            hit_first_step_s=first_step_s,
            hit_ready_s=loaded_s - imported_s + first_step_s,
        )
        ok = outcome.status == "hit"
        self.check("a fresh process hits", ok, f"outcome {outcome.status} {outcome.reason}".strip())
        return True

    def bits(self) -> bool:
        self.output = self.run()
        self.tell_peak("peak_frozen_bytes")
        digest = output_digest(self.output)
        self.events.figures(sha256_fresh_process=digest)
        runs = {
            "compiling run": self.known.get("sha256_compiling_run"),
            "second call": self.known.get("sha256_second_call"),
            "fresh process": digest,
        }
        short = ", ".join(f"{name} {sha256[:12] if sha256 else 'not run'}" for name, sha256 in runs.items())
        digests = [sha256 for sha256 in runs.values() if sha256]
        self.check("the same bits in every run", len(digests) > 1 and len(set(digests)) == 1, short)
        if (before := self.known.get("weights_sum")) is not None:
            same = weights_sum(self.module) == before
            self.check("both processes have the same weights", same, "sums are equal" if same else "sums differ")
        return True

    def refusal(self) -> bool:
        """A vault from another type of machine: in mode ``require`` an error that says so, and no graph runs."""
        from pipevault import unload
        from pipevault.errors import MissError, UnfrozenCallError

        unload(self.pipe)
        with another_machine(self.device) as field_name:
            try:
                answer = f"it was loaded: {self.load('require').status}"
                refused = False
            except MissError as error:
                answer = _described(error)
                refused = field_name in answer
            ran = self.frozen_calls()[0]
            self.check(f"a graph for another {field_name} is refused by a load", refused and ran == 0, answer)
            unload(self.pipe)
            try:
                self.load("require", shape=False)
                self.pipe(num_inference_steps=1)
                answer, refused = "the call was answered", False
            except (MissError, UnfrozenCallError) as error:
                answer, refused = _described(error), True
            ran = self.frozen_calls()[0]
            self.check(f"a graph for another {field_name} is refused by a call", refused and ran == 0, answer)
            self.pipe.outputs.clear()
        unload(self.pipe)
        status = self.load("require").status
        same = output_digest(self.run()) == output_digest(self.output)
        self.check(
            "on its own machine the same entry hits again",
            status == "hit" and same,
            f"outcome {status}, {'the same' if same else 'other'} bits",
        )
        return True

    def steps_frozen_and_eager(self) -> bool:
        """Times of steps: frozen at the default level, with all that pipevault does around it, and eager without."""
        from pipevault import unload

        frozen = self.time_steps()
        unload(self.pipe)
        eager = self.time_steps()
        self.events.figures(**{f"steps_{self.events.kind}": {"frozen": frozen, "eager": eager}})
        return True

    def offloaded(self) -> bool:
        """Weights that accelerate keeps on the CPU: moved as a whole before each call, then tensor by tensor."""
        from accelerate import cpu_offload, cpu_offload_with_hook
        from accelerate.hooks import remove_hook_from_module

        from pipevault import unload

        for name in ("cpu_offload_with_hook", "cpu_offload"):
            unload(self.pipe)
            module = self.module
            if name == "cpu_offload":
                cpu_offload(module, execution_device=self.device)
            else:
                cpu_offload_with_hook(module, self.device)
            self.load("require")
            before = self.frozen_calls()
            output = self.run()
            after = self.frozen_calls()
            ran = (after[0] - before[0], after[1] - before[1])
            found = self.compared(self.output, output)
            same = output_digest(output) == output_digest(self.output)
            right = found.failure or f"distance {found.distance:.3g}, {'the same' if same else 'other'} bits"
            self.check(
                f"frozen under accelerate's {name}",
                found.passed and ran == (self.steps, 0),
                f"{right}; {ran[0]} frozen calls, {ran[1]} eager, of {self.steps} steps",
            )
            unload(self.pipe)
            remove_hook_from_module(module, recurse=True)
            module.to(self.device)
        return True

    # the process that compares with torch.compile

    def all_step_times(self) -> bool:
        self.load("require")
        self.first_step_s()
        return self.steps_frozen_and_eager()

    def torch_compile(self) -> bool:
        """Inductor's caches are empty, so the first call compiles; CUDA's libraries are warm from the steps before."""
        import torch

        from pipevault import unload

        unload(self.pipe)
        expected = self.run()
        setattr(self.pipe, self.case.part, torch.compile(self.module))
        first_s = self.first_step_s()
        found = self.compared(expected, self.run())
        self.events.figures(
            torch_compile_first_call_s=first_s,
            torch_compile_distance=found.distance if found.passed else None,
            steps_torch_compile=self.time_steps(),
        )
        return True

    def stages(self, kind: str) -> list[Stage]:
        need = 0.0 if self.case.tiny else 5.0
        if kind == "freeze":
            least_s = 0.0 if self.case.tiny else NEED_S[self.case.model]["freeze"] / 2
            return [
                Stage("eager", need, self.eager_first),
                Stage("cold load", least_s, self.cold_load, after="eager"),
                Stage("frozen", need, self.frozen, after="cold load"),
            ]
        if kind == "speed":
            least_s = NEED_S[self.case.model]["speed"] / 2
            return [
                Stage("steps", need, self.all_step_times),
                Stage("torch.compile", least_s, self.torch_compile, after="steps"),
            ]
        offload = [Stage("offload to the CPU", 2 * need, self.offloaded, after="bits")] if self.offload else []
        return [
            Stage("ready", need, self.ready),
            Stage("bits", need, self.bits, after="ready"),
            Stage("step times", need, self.steps_frozen_and_eager, after="ready"),
            Stage("refusal", need, self.refusal, after="bits"),
            *offload,
        ]


@contextmanager
def another_machine(device: Any) -> Iterator[str]:
    """Read this machine's type, or what a package says of it on a CPU, as another; yield the field that differs."""
    from unittest.mock import patch

    from pipevault.fingerprint import machine

    if device.type == "cuda":
        with patch.object(machine, "_aoti_compute_capability", return_value="52"):
            yield "AOTI_COMPUTE_CAPABILITY"
    else:
        with patch.object(machine, "recorded_isa", return_value="AVX4096"):
            yield "AOTI_CPU_ISA"


def run_child(options: argparse.Namespace) -> int:
    case = Case(options.case[0], options.case[1], tiny=options.dry_run)
    events = Events(options.events, f"{case.name}: ", options.child)
    budget = Budget(options.budget_s)
    events.began("building the model")
    bench = Bench(case, options.dir, events, json.loads(options.known), offload=options.offload)
    run_stages(bench.stages(options.child), budget, events, events.prefix)
    return 0


# --- the run


class Results:
    """The document that is written: what was measured, checked and skipped so far."""

    def __init__(self, out: Path | None, head: Mapping[str, Any]) -> None:
        self.out = out
        self.document: dict[str, Any] = {**head, "cases": {}, "checks": [], "skipped": []}
        self._started_s = time.monotonic()
        self.write()

    def figures(self, case: str) -> dict[str, Any]:
        figures: dict[str, Any] = self.document["cases"].setdefault(case, {})
        return figures

    def check(self, name: str, ok: bool, detail: str) -> None:
        self.document["checks"].append({"name": name, "ok": ok, "detail": detail})
        self.write()

    def skipped(self, what: str, why: str) -> None:
        self.document["skipped"].append({"what": what, "why": why})
        self.write()

    def began(self, stage: str) -> None:
        print(f"{stage} …", file=sys.stderr, flush=True)

    def done(self, stage: str) -> None:
        self.write()

    def absorb(self, case: str, lines: Iterable[str]) -> list[dict[str, Any]]:
        """Take in what a process told; the events are returned."""
        events = [json.loads(line) for line in lines]
        for event in events:
            self.figures(case).update(event.get("figures", {}))
            if "check" in event:
                self.document["checks"].append(event["check"])
            if "skipped" in event:
                self.document["skipped"].append(event["skipped"])
        if events:
            self.write()
        return events

    @property
    def ok(self) -> bool:
        return bool(self.document["checks"]) and all(check["ok"] for check in self.document["checks"])

    def write(self) -> None:
        self.document["elapsed_s"] = round(time.monotonic() - self._started_s, 1)
        if self.out is None:
            return
        self.out.parent.mkdir(parents=True, exist_ok=True)
        beside = self.out.with_name(f".{self.out.name}.part")
        beside.write_text(json.dumps(self.document, indent=1) + "\n", encoding="utf-8")
        os.replace(beside, self.out)


class Runner:
    """Starts a process for each part of the work, and follows what it tells."""

    def __init__(self, results: Results, budget: Budget, folder: Path, *, dry_run: bool, offload: str) -> None:
        self.results, self.budget, self.folder = results, budget, folder
        self.dry_run, self.offload = dry_run, offload

    def stages(self, cases: Sequence[Case]) -> list[Stage]:
        """What to do in which order: the models in their first dtype, then the rest."""
        kinds = ("freeze", "hit") if self.dry_run else ("freeze", "hit", "speed")
        first = [case for case in cases if case.dtype != "float16"]
        small = [case for case in first if case.model in SMALL_MODELS]
        others = [case for case in first if case not in small] + [case for case in cases if case not in first]
        order = [(kind, case) for case in small for kind in kinds if kind != "speed"]
        order += [(kind, case) for case in small for kind in kinds if kind == "speed"]
        order += [(kind, case) for case in others for kind in kinds]
        return [self._stage(kind, case) for kind, case in order]

    def _stage(self, kind: str, case: Case) -> Stage:
        after = "" if kind == "freeze" else f"{case.name} freeze"
        need_s = 5.0 if self.dry_run else NEED_S[case.model][kind]
        return Stage(f"{case.name} {kind}", need_s, lambda: self.follow(kind, case), after)

    def follow(self, kind: str, case: Case) -> bool:
        """Run one process to its end, or to that of the budget. Return whether what it was started for was done."""
        name = f"{case.name}-{kind}"
        events, errors = self.folder / f"{name}.jsonl", self.folder / f"{name}.stderr"
        events.touch()
        told: list[dict[str, Any]] = []
        with events.open(encoding="utf-8") as tail, errors.open("wb") as stderr:
            child = subprocess.Popen(
                self.command(kind, case, events),
                env=environment(self.folder, name),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=stderr,
                start_new_session=True,
            )
            rest = ""
            try:
                while child.poll() is None and self.budget.left_s() > 0:
                    time.sleep(POLL_S)
                    rest = self._read(tail, rest, case, told)
            finally:
                stopped = child.poll() is None
                end_process(child)
                self._read(tail, rest, case, told)
        finished = {event["done"] for event in told if "done" in event}
        last = [event["began"] for event in told if "began" in event][-1:] or ["its start"]
        if stopped:
            self.results.skipped(f"{case.name}: {last[0]}", f"stopped in {kind}: the budget ran out")
        elif child.returncode != 0:
            text = errors.read_text("utf-8", "replace").strip()[-1500:]
            ended = f"ended with {child.returncode} in {last[0]}"
            self.results.check(f"{case.name}: the process of {kind} ends well", False, f"{ended}: {text}")
        return REQUIRED[kind] in finished

    def _read(self, tail: Any, rest: str, case: Case, told: list[dict[str, Any]]) -> str:
        *lines, rest = (rest + tail.read()).split("\n")
        told += self.results.absorb(case.name, lines)
        return rest

    def command(self, kind: str, case: Case, events: Path) -> list[str]:
        known = {
            name: value
            for name, value in self.results.figures(case.name).items()
            if name.startswith("sha256_") or name == "weights_sum"
        }
        vault = self.folder / "vaults" / case.name
        command = [sys.executable, str(Path(__file__).resolve()), "--child", kind, "--case", case.model, case.dtype]
        command += ["--dir", str(vault), "--events", str(events), "--known", json.dumps(known)]
        command += ["--budget-s", f"{self.budget.left_s():.1f}"]
        command += ["--dry-run"] if self.dry_run else []
        return command + (["--offload"] if case.name == self.offload and kind == "hit" else [])


def end_process(child: subprocess.Popen[bytes]) -> None:
    """End a process that still runs, and the compile workers that it started."""
    if child.poll() is None:
        with suppress(ProcessLookupError):  # it ended just now
            os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def environment(folder: Path, name: str) -> dict[str, str]:
    """Of the processes: no settings from outside, empty caches of compilers, nothing asked of the network."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("PIPEVAULT_")}
    caches = folder / "caches" / name
    return {
        **kept,
        "HF_HUB_OFFLINE": "1",
        "XDG_CONFIG_HOME": str(folder / "config"),
        "TORCHINDUCTOR_CACHE_DIR": str(caches / "inductor"),
        "TRITON_CACHE_DIR": str(caches / "triton"),
    }


def machine_facts(*, dry_run: bool) -> dict[str, Any]:
    """The card, its driver and this machine; nothing that names the host."""
    from pipevault.fingerprint.machine import machine_record

    facts: dict[str, Any] = {"card": None, "driver": None}
    if not dry_run:
        import torch

        properties = torch.cuda.get_device_properties(0)
        facts |= {
            "card": properties.name,
            "compute_capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "card_memory_bytes": properties.total_memory,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),  # type: ignore[no-untyped-call]
        }
    record = machine_record()
    return {**facts, "driver": record.pop("nvidia_driver", None), **record}


def versions() -> dict[str, str | None]:
    from importlib.metadata import PackageNotFoundError, version

    from pipevault import __version__

    found: dict[str, str | None] = {"pipevault": __version__}
    for name in ("torch", "triton", "diffusers", "transformers", "accelerate", "onediff", "onediffx"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


# --- the table


def markdown(document: Mapping[str, Any]) -> str:
    """The results as Markdown: a table of what was measured, the checks that failed, what was skipped."""
    head = (
        "model",
        "parameters",
        "cold load",
        "distance (tolerance)",
        "hit: load",
        "hit: ready",
        "eager: first step",
        "torch.compile: first call",
        "step eager",
        "step frozen",
        "step torch.compile",
        "peak eager",
        "peak frozen",
    )
    lines = [f"| {' | '.join(head)} |", "| --- |" + " ---: |" * (len(head) - 1)]
    for name, figures in document["cases"].items():
        lines.append(f"| {' | '.join([name, *table_cells(figures)])} |")
    machine = {name: value for name, value in document["machine"].items() if value is not None}
    told = {**machine, **{name: value for name, value in document["versions"].items() if value is not None}}
    lines += ["", "Machine: " + ", ".join(f"{name} {value}" for name, value in told.items()) + "."]
    if document["dry_run"]:
        lines.append("A dry run with tiny models on the CPU: its times tell nothing of a GPU.")
    checks = document["checks"]
    failed = [check for check in checks if not check["ok"]]
    lines += ["", f"{len(checks) - len(failed)} of {len(checks)} checks ok, {document['elapsed_s']} s."]
    lines += [f"- **not ok** {check['name']}: {check['detail']}" for check in failed]
    lines += [f"- skipped {item['what']}: {item['why']}" for item in document["skipped"]]
    return "\n".join(lines)


def table_cells(figures: Mapping[str, Any]) -> list[str]:
    """What was measured of one model. Times of steps come from one process: that of ``torch.compile`` if there was."""
    steps = figures.get("steps_speed") or figures.get("steps_hit") or {}
    distance = NOT_MEASURED
    if "distance" in figures:
        distance = f"{figures['distance']:.1e} ({figures['tolerance']:.0e})"

    def cell(value: float | None, unit: str, factor: float = 1.0) -> str:
        if value is None:
            return NOT_MEASURED
        scaled = factor * value
        return f"{scaled:.0f} {unit}" if scaled >= 100 else f"{scaled:.3g} {unit}"

    def step(times: Mapping[str, Any] | None) -> str:
        return cell(times["median_s"] if times else None, "ms", 1e3)

    return [
        cell(figures.get("parameters"), "M", 1e-6),
        cell(figures.get("cold_load_s"), "s"),
        distance,
        cell(figures.get("hit_load_s"), "s"),
        cell(figures.get("hit_ready_s"), "s"),
        cell(figures.get("eager_first_step_s"), "s"),
        cell(figures.get("torch_compile_first_call_s"), "s"),
        step(steps.get("eager")),
        step(steps.get("frozen")),
        step(figures.get("steps_torch_compile")),
        cell(figures.get("peak_eager_bytes"), "GB", 1e-9),
        cell(figures.get("peak_frozen_bytes"), "GB", 1e-9),
    ]


def default_out(card: str) -> Path:
    """Where the results of a card go, such as ``gpu-nvidia-h100-80gb-hbm3.json``."""
    return RESULTS_DIR / f"gpu-{re.sub(r'[^a-z0-9]+', '-', card.lower()).strip('-')}.json"


def planned(models: Sequence[str], *, dry_run: bool) -> list[Case]:
    """The models in the order of :data:`MODELS`: bfloat16 each, float16 for Stable Diffusion 1.5 too."""
    chosen = [model for model in MODELS if model in models]
    if dry_run:
        return [Case(model, "float32", tiny=True) for model in chosen]
    return [*(Case(m, "bfloat16") for m in chosen), *(Case(m, "float16") for m in chosen if m == "sd15")]


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), help="default: all")
    parser.add_argument("--budget-s", type=float, default=480.0, help="seconds that the run may take (480)")
    parser.add_argument("--out", type=Path, help="JSON; default scripts/results/gpu-<card>.json, none for a dry run")
    parser.add_argument("--dry-run", action="store_true", help="tiny models on the CPU")
    parser.add_argument("--child", choices=sorted(REQUIRED), help=argparse.SUPPRESS)
    parser.add_argument("--case", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--dir", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--events", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--known", default="{}", help=argparse.SUPPRESS)
    parser.add_argument("--offload", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def run_all(options: argparse.Namespace) -> int:
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # so that no process stays behind
    budget = Budget(options.budget_s)
    facts = machine_facts(dry_run=options.dry_run)
    out = options.out or (None if options.dry_run else default_out(facts["card"]))
    head = {"dry_run": options.dry_run, "budget_s": options.budget_s, "machine": facts, "versions": versions()}
    results = Results(out, head)
    cases = planned(options.models, dry_run=options.dry_run)
    if options.dry_run:
        results.skipped("float16, bfloat16", "needs CUDA")
        results.skipped("torch.compile", "needs CUDA; in a dry run each model is compiled once")
        results.skipped("another compute capability is refused", "needs CUDA; another instruction set stands for it")
    offload = next((case.name for model in SMALL_MODELS for case in cases if case.model == model), "")
    if offload and results.document["versions"]["accelerate"] is None:
        results.skipped(f"{offload}: offload to the CPU", "accelerate is not installed")
        offload = ""
    elif not offload:
        results.skipped("offload to the CPU", f"none of {', '.join(SMALL_MODELS)} was asked for")
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as folder:
        runner = Runner(results, budget, Path(folder), dry_run=options.dry_run, offload=offload)
        try:
            run_stages(runner.stages(cases), budget, results)
        finally:
            results.write()
    print(markdown(results.document))
    return 0 if results.ok else 1


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse_arguments(arguments)
    if options.child:
        return run_child(options)
    if not options.dry_run:
        import torch

        if not torch.cuda.is_available():
            print("This machine has no CUDA device that torch can use. --dry-run needs none.", file=sys.stderr)
            return 2
    return run_all(options)


if __name__ == "__main__":
    sys.exit(main())
