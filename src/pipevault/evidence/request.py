"""One generation as a person asks for it, and how a pipeline is loaded and called for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from pipevault.calls.call import SHAPELESS, parameters, takes_any_name
from pipevault.calls.sample_roles import REPEATS
from pipevault.calls.samples import samples_of
from pipevault.demo import DEFAULT_GUIDANCE_SCALE, DEFAULT_STEPS
from pipevault.errors import BadCallError
from pipevault.opening import DEMO_MODEL
from pipevault.pipeline import Pipeline


@dataclass(frozen=True)
class Request:
    """A generation. ``None`` leaves an argument to the pipeline; without prompts it is one sample of one that takes
    none. ``arguments`` are further keyword arguments of the call.
    """

    prompts: tuple[str, ...] = ()
    seed: int = 0
    steps: int | None = None
    guidance_scale: float | None = None
    height: int | None = None
    width: int | None = None
    num_frames: int | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)

    def with_defaults_of(self, model: str) -> Request:
        """Return the request with the demo's own steps and guidance scale; other models have their pipeline's."""
        if model != DEMO_MODEL:
            return self
        return replace(
            self,
            steps=DEFAULT_STEPS if self.steps is None else self.steps,
            guidance_scale=DEFAULT_GUIDANCE_SCALE if self.guidance_scale is None else self.guidance_scale,
        )

    def call_arguments(self, pipe: Pipeline) -> dict[str, Any]:
        """Return the keyword arguments of ``pipe(...)`` but for the seed. :class:`BadCallError` for an unknown one."""
        prompt = list(self.prompts) if len(self.prompts) > 1 else next(iter(self.prompts), None)
        chosen = {
            "prompt": prompt,
            "num_inference_steps": self.steps,
            "guidance_scale": self.guidance_scale,
            "height": self.height,
            "width": self.width,
            "num_frames": self.num_frames,
        }
        arguments = {name: value for name, value in chosen.items() if value is not None} | dict(self.arguments)
        accepted = parameters(pipe)
        open_ended = takes_any_name(pipe, accepted)
        if unknown := [name for name in arguments if name not in accepted and not open_ended]:
            raise BadCallError(f"{type(pipe).__name__} takes no {unknown[0]!r}. It takes {', '.join(accepted)}.")
        return arguments

    def load_arguments(self, pipe: Pipeline) -> dict[str, Any]:
        return load_arguments(self.call_arguments(pipe), pipeline=type(pipe))

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "prompts": list(self.prompts), "arguments": dict(self.arguments)}


def load_arguments(arguments: Mapping[str, Any], *, pipeline: str | type = "") -> dict[str, Any]:
    """Return keyword arguments of :meth:`~pipevault.PipelineCache.load` that freeze a call with these ``arguments``."""
    scale = arguments.get("guidance_scale")
    loaded: dict[str, Any] = {
        name: arguments[name] for name in ("height", "width", "num_frames") if arguments.get(name) is not None
    }
    loaded["batch_size"] = samples_of(arguments, pipeline=pipeline).prompts
    if scale is not None:
        loaded["guidance"] = max(scale if isinstance(scale, (list, tuple)) else [scale]) > 1.0
    shaping = {
        name: value
        for name, value in arguments.items()
        if value is not None and (name not in SHAPELESS or name in REPEATS)
    }
    if arguments.get("output_type") == "latent":
        shaping["output_type"] = "latent"
    return {**loaded, "call": shaping} if shaping else loaded
