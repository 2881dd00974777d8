"""The call that is frozen: its shape, which is part of the key, and the warm-up inputs that make it.

Warm-up inputs are found from the signature of the pipeline's ``__call__``; a pipeline that needs more gets them from
the caller as a mapping of keyword arguments or as a function of the pipeline.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from pipevault.digest import digest_bytes
from pipevault.errors import BadCallError

Call: TypeAlias = "Mapping[str, Any] | Callable[[Any], Any] | None"

WARM_UP_PROMPT = "a photograph of a lighthouse at dusk"
WARM_UP_STEPS = 4

# Arguments that change values or repetitions, but no shape that a part sees beyond what the factors below say.
SHAPELESS = frozenset(
    {
        *(
            "prompt",
            "prompt_2",
            "prompt_3",
            "negative_prompt",
            "negative_prompt_2",
            "negative_prompt_3",
            "generator",
        ),
        *(
            "num_inference_steps",
            "guidance_scale",
            "eta",
            "strength",
            "output_type",
            "return_dict",
            "callback",
        ),
        *("callback_on_step_end", "callback_on_step_end_tensor_inputs", "callback_steps", "height", "width"),
        *("num_frames", "batch_size", "num_images_per_prompt", "num_videos_per_prompt", "class_labels"),
    }
)


@dataclass(frozen=True)
class CallShape:
    """The shape of one call. Sizes are in pixels; ``None`` means the pipeline's default.

    ``guidance`` tells whether classifier-free guidance doubles the batch; ``None`` takes the pipeline's default.
    ``call`` gives further keyword arguments, or a function that runs the pipeline.
    """

    height: int | None = None
    width: int | None = None
    num_frames: int | None = None
    batch_size: int = 1
    guidance: bool | None = None
    call: Call = None

    def __post_init__(self) -> None:
        for name in ("height", "width", "num_frames", "batch_size"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise BadCallError(f"{name} must be a whole number above 0, not {value!r}.")
        if self.call is not None and not isinstance(self.call, Mapping) and not callable(self.call):
            raise BadCallError(f"call must be a mapping of keyword arguments or a function, not {self.call!r}.")


def resolve_shape(pipe: Any, shape: CallShape) -> CallShape:
    """``shape`` with the pipeline's defaults filled in and sizes checked against what its VAE needs."""
    arguments = dict(shape.call) if isinstance(shape.call, Mapping) else {}
    height = shape.height or arguments.get("height") or default_size(pipe, "height")
    width = shape.width or arguments.get("width") or default_size(pipe, "width")
    factor = getattr(pipe, "vae_scale_factor", None)
    # diffusers' image pipelines ask for multiples of 8 even where the VAE scales by less.
    multiple = max(int(factor), 8) if isinstance(factor, int) and "height" in parameters(pipe) else 1
    for name, size in (("height", height), ("width", width)):
        if size is not None and size % multiple:
            lower = size - size % multiple
            raise BadCallError(
                f"{name}={size} does not suit {type(pipe).__name__}: it must be divisible by {multiple}. "
                f"Use {lower or multiple} or {lower + multiple}."
            )
    return CallShape(
        height=height,
        width=width,
        num_frames=shape.num_frames or arguments.get("num_frames") or _default(pipe, "num_frames"),
        batch_size=_batch_size(shape, arguments),
        guidance=_guidance(pipe, shape, arguments),
        call=shape.call,
    )


def shape_factors(shape: CallShape) -> dict[str, Any]:
    """The ``call`` group of the key: what decides the signatures of the parts, in readable form."""
    factors: dict[str, Any] = {
        "height": shape.height,
        "width": shape.width,
        "num_frames": shape.num_frames,
        "batch_size": shape.batch_size,
        "guidance": shape.guidance,
    }
    if isinstance(shape.call, Mapping):
        extra = {name: _kind(value) for name, value in sorted(shape.call.items()) if name not in SHAPELESS}
        factors.update({"arguments": extra} if extra else {})
    elif shape.call is not None:
        factors["function"] = _function_identity(shape.call)
    return factors


def warm_up_arguments(pipe: Any, shape: CallShape) -> dict[str, Any]:
    """Keyword arguments of a short run of ``pipe`` at ``shape``. Raises :class:`BadCallError` for an input that
    cannot be made up.
    """
    given = dict(shape.call) if isinstance(shape.call, Mapping) else {}
    accepted = parameters(pipe)
    offered: dict[str, Any] = {
        "prompt": [WARM_UP_PROMPT] * shape.batch_size if shape.batch_size > 1 else WARM_UP_PROMPT,
        "num_inference_steps": WARM_UP_STEPS,
        "height": shape.height,
        "width": shape.width,
        "num_frames": shape.num_frames,
        "output_type": "np",
    }
    if "prompt" not in accepted:
        offered["batch_size"] = shape.batch_size
        offered["class_labels"] = [0] * shape.batch_size
    if shape.guidance is not None:
        default = _default_guidance_scale(pipe)
        offered["guidance_scale"] = (default if default > 1.0 else 4.0) if shape.guidance else 1.0
    arguments = {name: value for name, value in offered.items() if name in accepted and value is not None}
    if "prompt_embeds" in given:
        arguments.pop("prompt", None)
    for name, parameter in accepted.items():
        needed = parameter.default is inspect.Parameter.empty or name in {
            "image",
            "mask_image",
            "control_image",
        }
        if name in arguments or name in given or not needed or parameter.kind is parameter.VAR_KEYWORD:
            continue
        made = _made_up(pipe, name, shape)
        if made is not None:
            arguments[name] = made
        elif parameter.default is inspect.Parameter.empty:
            raise BadCallError(
                f"{type(pipe).__name__} needs {name!r}, which cannot be made up. Pass call={{{name!r}: ...}}."
            )
    return {**arguments, **given}


def parameters(pipe: Any) -> dict[str, inspect.Parameter]:
    signature = inspect.signature(type(pipe).__call__)
    return {name: parameter for name, parameter in signature.parameters.items() if name != "self"}


def default_size(pipe: Any, side: str) -> int | None:
    """Pixels of ``side`` (``height`` or ``width``) that the pipeline draws by default, where that can be told."""
    if default := _default(pipe, side):
        return default
    factor = getattr(pipe, "vae_scale_factor", 1)
    for name in ("unet", "transformer"):
        config = getattr(getattr(pipe, name, None), "config", None)
        size = getattr(config, "sample_size", None)
        if isinstance(size, int) and isinstance(factor, int) and side in parameters(pipe):
            return size * factor
    return None


def _default(pipe: Any, name: str) -> int | None:
    parameter = parameters(pipe).get(name)
    return parameter.default if parameter is not None and isinstance(parameter.default, int) else None


def _made_up(pipe: Any, name: str, shape: CallShape) -> Any:
    """An image, mask or batch of them for image-to-image pipelines; their images must have the frozen size."""
    if name not in {"image", "mask_image", "control_image"} or not (shape.height and shape.width):
        return None
    import numpy as np
    from PIL import Image

    ramp = np.add.outer(np.arange(shape.height), np.arange(shape.width)) % 256
    if name == "mask_image":
        image = Image.fromarray(((ramp > 127) * 255).astype(np.uint8), mode="L")
    else:
        image = Image.fromarray(np.stack([ramp] * 3, axis=-1).astype(np.uint8))
    return [image] * shape.batch_size if shape.batch_size > 1 else image


def _batch_size(shape: CallShape, arguments: Mapping[str, Any]) -> int:
    prompt = arguments.get("prompt")
    batch_size = len(prompt) if isinstance(prompt, (list, tuple)) else shape.batch_size
    repeats = arguments.get("num_images_per_prompt", arguments.get("num_videos_per_prompt", 1))
    return int(batch_size * (repeats or 1))


def _guidance(pipe: Any, shape: CallShape, arguments: Mapping[str, Any]) -> bool | None:
    if shape.guidance is not None:
        return shape.guidance
    if "guidance_scale" not in parameters(pipe):
        return None
    return float(arguments.get("guidance_scale", _default_guidance_scale(pipe))) > 1.0


def _default_guidance_scale(pipe: Any) -> float:
    parameter = parameters(pipe).get("guidance_scale")
    if parameter is None or not isinstance(parameter.default, (int, float)):
        return 1.0
    return float(parameter.default)


def _kind(value: Any) -> Any:
    """A readable description of an argument's shape; values only where they are plain."""
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"{value.dtype}{list(value.shape)}"
    if hasattr(value, "size") and hasattr(value, "mode"):
        return f"{value.mode} image {value.size[0]}x{value.size[1]}"
    if isinstance(value, (list, tuple)):
        return [_kind(item) for item in value]
    if isinstance(value, Mapping):
        return {str(name): _kind(item) for name, item in sorted(value.items())}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return f"{type(value).__module__}.{type(value).__qualname__}"


def _function_identity(function: Callable[[Any], Any]) -> str:
    code = getattr(function, "__code__", None)
    body = digest_bytes(code.co_code + repr(code.co_consts).encode()).short if code else ""
    return f"{getattr(function, '__qualname__', type(function).__qualname__)} {body}".strip()
