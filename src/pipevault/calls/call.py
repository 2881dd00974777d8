"""The call that is frozen: its shape, which is part of the key, and the warm-up inputs that make it.

Warm-up inputs are found from the signature of the pipeline's ``__call__``; what else it needs the caller gives.
"""

from __future__ import annotations

import difflib
import enum
import functools
import inspect
import math
import os
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import PurePath
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import nn

from pipevault.calls.describe import Inside, plain_json
from pipevault.calls.sample_roles import NEGATIVE_PROMPTS, PROMPTS, REPEATS
from pipevault.calls.samples import given_prompts, repeats_of
from pipevault.digest import digest_json
from pipevault.errors import BadCallError
from pipevault.fingerprint.classes import class_identity, function_identity, qualified_name
from pipevault.graphs.adapters import adapter_of, main_method
from pipevault.pipeline import Pipeline

Call: TypeAlias = "Mapping[str, Any] | Callable[[Any], Any] | None"

# Short, so that no tokenizer cuts it and warns of a prompt that the user never typed.
WARM_UP_PROMPT = "a"
WARM_UP_STEPS = 3

IMAGES = ("image", "mask_image", "control_image")
SIZES = ("height", "width", "num_frames")
RANGED = (*SIZES, "batch_size")

# Arguments that change values or repetitions, but no shape that a part sees beyond what the factors below say.
SHAPELESS = frozenset(
    [
        *(*PROMPTS, *NEGATIVE_PROMPTS, *REPEATS, *SIZES, "batch_size", "class_labels", "generator"),
        *("num_inference_steps", "guidance_scale", "eta", "strength", "output_type", "return_dict"),
        *("callback_steps", "callback_on_step_end_tensor_inputs"),
    ]
)
# What diffusers takes as **kwargs; it drops other names without a word.
_UNLISTED_BY_DIFFUSERS = frozenset({"callback", "callback_steps", "prior_callback", "prior_callback_steps"})


@dataclass(frozen=True)
class CallShape:
    """The shape of one call. Sizes are in pixels; ``None`` means the pipeline's default. ``batch_size`` counts prompts;
    in a resolved shape it counts what one call makes, all repeats of a prompt included. ``guidance`` tells whether
    classifier-free guidance doubles the batch. ``call`` gives further keyword arguments, or a function that runs the
    pipeline.
    """

    height: int | None = None
    width: int | None = None
    num_frames: int | None = None
    batch_size: int = 1
    guidance: bool | None = None
    call: Call = None

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON. ``call`` is the names of a mapping as a list, the word ``function`` for a function."""
        call = "function" if callable(self.call) else None if self.call is None else sorted(self.call)
        sizes = {name: getattr(self, name) for name in (*RANGED, "guidance")}
        return {**sizes, "call": call}

    def __post_init__(self) -> None:
        for name in RANGED:
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise BadCallError(f"{name} must be a whole number above 0, not {value!r}.")
        if self.call is not None and not isinstance(self.call, Mapping) and not callable(self.call):
            raise BadCallError(f"call must be a mapping of keyword arguments or a function, not {self.call!r}.")


def resolve_shape(pipe: Pipeline, shape: CallShape) -> CallShape:
    """Return ``shape`` with the pipeline's defaults filled in and sizes checked against what its VAE needs. Raises
    :class:`BadCallError` for an argument that the pipeline does not take, and for one that is given twice.
    """
    arguments = _given(shape)
    if not callable(shape.call):
        _check_names(pipe, shape, arguments)
    sizes: dict[str, Any] = {}
    for name in SIZES:
        chosen, argument = getattr(shape, name), arguments.get(name)
        if chosen is not None and argument is not None and chosen != argument:
            raise BadCallError(f"{name}={chosen!r} is given, which disagrees with the call's {argument!r}. Give one.")
        sizes[name] = chosen or argument or _default_size(pipe, name)
    multiple = size_multiple(pipe)
    for name in ("height", "width"):
        size = sizes[name]
        if size is not None and size % multiple:
            lower = size - size % multiple
            raise BadCallError(
                f"{name}={size} does not suit {type(pipe).__name__}: it must be divisible by {multiple}. "
                f"Use {lower or multiple} or {lower + multiple}."
            )
    batch_size, guidance = _batch_size(pipe, shape, arguments), _guidance(pipe, shape, arguments)
    return replace(shape, **sizes, batch_size=batch_size, guidance=guidance)


def _given(shape: CallShape) -> dict[str, Any]:
    return dict(shape.call) if isinstance(shape.call, Mapping) else {}


def size_multiple(pipe: Pipeline) -> int:
    """Return the number of pixels by which height and width must be divisible."""
    factor = getattr(pipe, "vae_scale_factor", None)
    # diffusers' image pipelines ask for multiples of 8 even where the VAE scales by less.
    return max(int(factor), 8) if isinstance(factor, int) and "height" in parameters(pipe) else 1


def shape_factors(shape: CallShape) -> dict[str, Any]:
    """The ``call`` group of the key: what decides the signatures of the parts, in readable form."""
    arguments = _given(shape)
    factors: dict[str, Any] = {
        **{name: getattr(shape, name) for name in RANGED},
        "prompts": _prompt_count(shape),  # text encoders see prompts, and not how often each is drawn
        "images_per_prompt": repeats_of(arguments),
        "guidance": shape.guidance,
        "output": "latent" if arguments.get("output_type") == "latent" else "decoded",
    }
    if callable(shape.call):
        factors["function"] = callable_identity(shape.call)
    elif extra := {name: described(value) for name, value in sorted(arguments.items()) if name not in SHAPELESS}:
        factors["arguments"] = extra
    return factors


def has_optional_images(pipe: Pipeline, shape: CallShape) -> bool:
    """Return whether the call takes an image that is neither given nor required: image-to-image pipelines mark theirs
    as optional and refuse a call without; editing pipelines draw from the prompt.
    """
    given = _given(shape)
    return any(
        name in IMAGES and name not in given and parameter.default is not parameter.empty
        for name, parameter in parameters(pipe).items()
    )


def warm_up_arguments(pipe: Pipeline, shape: CallShape, *, images: bool = True) -> dict[str, Any]:
    """Return keyword arguments of a short run of ``pipe`` at a resolved ``shape``; with ``images``, optional ones too.
    Raises :class:`BadCallError` for an input that cannot be made up.
    """
    given = _given(shape)
    accepted = parameters(pipe)
    prompts = _prompt_count(shape)
    offered: dict[str, Any] = {
        "prompt": _repeated(WARM_UP_PROMPT, prompts),
        "num_inference_steps": _warm_up_steps(pipe, given),
        "output_type": "np",
    }
    if "prompt" not in accepted:
        offered["batch_size"] = shape.batch_size
        offered["class_labels"] = [0] * shape.batch_size
    arguments = {name: value for name, value in offered.items() if name in accepted}
    chosen: dict[str, Any] = {name: getattr(shape, name) for name in SIZES}
    if shape.guidance is not None:
        default = float(_default(pipe, "guidance_scale") or 1.0)
        chosen["guidance_scale"] = (default if default > 1.0 else 4.0) if shape.guidance else 1.0
    open_ended = takes_any_name(pipe, accepted)
    arguments.update((n, v) for n, v in chosen.items() if v is not None and (open_ended or n in accepted))
    if "prompt_embeds" in given:
        arguments.pop("prompt", None)
    for name, parameter in accepted.items():
        required = parameter.default is parameter.empty and parameter.kind not in _VARIADIC
        if name in arguments or name in given or not (required or (images and name in IMAGES)):
            continue
        made = _made_up(name, shape, prompts)
        if made is not None:
            arguments[name] = made
        elif required:
            raise BadCallError(
                f"{type(pipe).__name__} needs {name!r}, which cannot be made up. Pass call={{{name!r}: ...}}."
            )
    for name in (*PROMPTS, *NEGATIVE_PROMPTS):
        if isinstance(given.get(name), str):
            given[name] = _repeated(given[name], prompts)
    return {**arguments, **given}


def _warm_up_steps(pipe: Pipeline, given: Mapping[str, Any]) -> int:
    """Enough steps for a low ``strength``, of which image-to-image pipelines run that share alone, to leave some."""
    strength = given.get("strength")
    if strength is None:
        strength = _default(pipe, "strength")
    if not isinstance(strength, (int, float)) or not 0.0 < strength < 1.0:
        return WARM_UP_STEPS
    return max(WARM_UP_STEPS, math.ceil(2 / strength))


_VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def parameters(pipe: Pipeline) -> dict[str, inspect.Parameter]:
    """The parameters of the pipeline's main method, ``__call__`` unless an adapter says another, after ``self``."""
    return dict(_parameters(getattr(type(pipe), main_method(type(pipe)))))


@functools.lru_cache(maxsize=32)
def _parameters(call: Callable[..., Any]) -> tuple[tuple[str, inspect.Parameter], ...]:
    return tuple(inspect.signature(call).parameters.items())[1:]


def takes_any_name(pipe: Pipeline, accepted: Mapping[str, inspect.Parameter]) -> bool:
    """Return True if the call has ``**kwargs`` for the caller; diffusers drops what it does not know without a word."""
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in accepted.values()):
        return False
    module = getattr(inspect.unwrap(getattr(type(pipe), main_method(type(pipe)))), "__module__", None) or ""
    return module.partition(".")[0] != "diffusers"


def _check_names(pipe: Pipeline, shape: CallShape, arguments: Mapping[str, Any]) -> None:
    accepted = parameters(pipe)
    if takes_any_name(pipe, accepted):
        return
    names = [name for name, parameter in accepted.items() if parameter.kind not in _VARIADIC]
    hidden = _UNLISTED_BY_DIFFUSERS if len(names) < len(accepted) else frozenset()
    chosen: list[str] = []
    adapter = adapter_of(pipe)
    if adapter is None or adapter.call is None:  # else the adapter makes of them what the method takes
        # An image that is made up has the size.
        sizes = ("num_frames",) if any(name in accepted for name in IMAGES) else SIZES
        chosen = [name for name in sizes if getattr(shape, name) is not None]
        if shape.guidance is not None:
            chosen.append("guidance_scale")
    for name in (*arguments, *chosen):
        if name in names or name in hidden:
            continue
        close = difflib.get_close_matches(name, names, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else f". It takes {', '.join(names) or 'no arguments'}."
        raise BadCallError(f"{type(pipe).__name__} takes no {name!r}{hint}")


def _default_size(pipe: Pipeline, name: str) -> int | None:
    default: int | None = _default(pipe, name)
    if default or name == "num_frames":
        return default
    factor = getattr(pipe, "vae_scale_factor", 1)
    for part in ("unet", "transformer"):
        size = getattr(getattr(getattr(pipe, part, None), "config", None), "sample_size", None)
        if isinstance(size, int) and isinstance(factor, int) and name in parameters(pipe):
            return size * factor
    return None


def _default(pipe: Pipeline, name: str) -> Any:
    parameter = parameters(pipe).get(name)
    return parameter.default if parameter is not None and isinstance(parameter.default, (int, float)) else None


def _made_up(name: str, shape: CallShape, count: int) -> Any:
    """An image, mask or batch of them for image-to-image pipelines; their images must have the frozen size."""
    if name not in IMAGES or not (shape.height and shape.width):
        return None
    from PIL import Image

    ramp = np.add.outer(np.arange(shape.height), np.arange(shape.width)) % 256
    pixels = (ramp > 127) * 255 if name == "mask_image" else np.stack([ramp] * 3, axis=-1)
    return _repeated(Image.fromarray(pixels.astype(np.uint8)), count)


def _repeated(value: Any, count: int) -> Any:
    return [value] * count if count > 1 else value


def _batch_size(pipe: Pipeline, shape: CallShape, arguments: Mapping[str, Any]) -> int:
    repeats = repeats_of(arguments)
    prompts = given_prompts(arguments, pipeline=type(pipe))
    if prompts is None:
        return shape.batch_size * repeats
    if shape.batch_size not in (1, prompts, prompts * repeats):
        raise BadCallError(
            f"batch_size={shape.batch_size} is given, which disagrees with the call's {prompts} prompts. Give one."
        )
    return prompts * repeats


def _prompt_count(shape: CallShape) -> int:
    return max(1, shape.batch_size // repeats_of(_given(shape)))


def _guidance(pipe: Pipeline, shape: CallShape, arguments: Mapping[str, Any]) -> bool | None:
    given = arguments.get("guidance_scale")
    if given is None:
        if shape.guidance is not None or "guidance_scale" not in parameters(pipe):
            return shape.guidance
        return bool((_default(pipe, "guidance_scale") or 1.0) > 1.0)
    try:
        guidance = max(float(scale) for scale in (given if isinstance(given, (list, tuple)) else [given])) > 1.0
    except (TypeError, ValueError) as error:
        raise BadCallError(f"guidance_scale must be a number, not {given!r}.") from error
    if shape.guidance not in (None, guidance):
        raise BadCallError(
            f"guidance={shape.guidance} is given, which disagrees with the call's guidance_scale={given!r}. Give one."
        )
    return guidance


def described(value: Any, inside: Inside = ()) -> Any:
    """Return a JSON form of an argument or a setting: plain values themselves, of all else the kind and the shape. The
    same in every process; where a file lies does not count.
    """

    def text(value: str) -> str:
        return "a path" if os.path.isabs(value) else str(value)

    return plain_json(value, _describe_object, text=text, is_object=_has_kind, inside=inside)


def callable_identity(function: Callable[..., Any]) -> str:
    """Return the name of a function or callable object, with a digest of its code and of the values that it holds."""
    named = function.func if isinstance(function, functools.partial) else function
    return f"{qualified_name(named)} {digest_json(_describe_callable(function, ())).hex}"


def _is_array(value: Any) -> bool:
    return hasattr(value, "shape") and hasattr(value, "dtype")


def _has_kind(value: Any) -> bool:
    """Return whether ``value`` counts by its kind and its shape, though it may be a container: an array or an image."""
    return _is_array(value) or (hasattr(value, "size") and hasattr(value, "mode"))


def _describe_object(value: Any, inside: Inside) -> Any:
    if isinstance(value, enum.Enum):
        return f"{qualified_name(type(value))}.{value.name}"
    if isinstance(value, PurePath):
        return "a path"
    if isinstance(value, (float, torch.dtype)):
        return str(value)
    if _is_array(value):
        return f"{value.dtype}{list(value.shape)}"
    if _has_kind(value):
        return f"{value.mode} image {value.size[0]}x{value.size[1]}"
    if isinstance(value, type):
        return qualified_name(value)
    if isinstance(value, (types.FunctionType, types.MethodType, functools.partial)):
        return _describe_callable(value, inside)
    return qualified_name(type(value))


def _describe_callable(function: Any, inside: Inside) -> Any:
    if id(function) in inside:
        return "itself"
    inside = (*inside, id(function))
    if isinstance(function, functools.partial):
        held = [described(list(function.args), inside), described(function.keywords, inside)]
        return ["partial", _describe_callable(function.func, inside), *held]
    if isinstance(function, types.MethodType):
        return [_describe_callable(function.__func__, inside), _describe_callable(function.__self__, inside)]
    if isinstance(function, (types.FunctionType, types.BuiltinFunctionType)):
        return function_identity(function)
    if isinstance(function, type):
        return class_identity(function)
    wrapped = inspect.unwrap(function)
    if wrapped is not function:
        return [qualified_name(type(function)), _describe_callable(wrapped, inside)]
    attributes = {} if isinstance(function, nn.Module) else getattr(function, "__dict__", {})
    return [class_identity(type(function)), described(dict(attributes), inside)]
