"""The call of a record, checked before any of it is used: a record is data from a stranger."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from pipevault.calls.call import parameters, takes_any_name
from pipevault.calls.describe import describe
from pipevault.calls.samples import recorded_samples
from pipevault.determinism.layers import parse_state, unpack
from pipevault.errors import BadCallError, BadRecordError
from pipevault.graphs.adapters import generating_methods, main_method
from pipevault.pipeline import Pipeline
from pipevault.runtime.record import RunRecord

REPLAY_LIMITS: Mapping[str, int] = {
    **{f"{stage}num_inference_steps": 10_000 for stage in ("", "prior_", "decoder_", "video_")},
    **dict.fromkeys(("height", "width", "max_sequence_length"), 16_384),
    **dict.fromkeys(("num_frames", "video_length"), 4_096),
    "temp": 512,
    **{f"num_{what}_per_prompt": 1_024 for what in ("images", "videos", "waveforms")},
    "batch_size": 1_024,
    **dict.fromkeys(("audio_length_in_s", "audio_end_in_s"), 3_600),
}
"""The largest number that a replay takes for an argument, or for an item of one that is a list of numbers, such as the
steps of each stage; a generation of one's own may go beyond.
"""

SAMPLES_LIMIT = 1_024
_DEPTH_LIMIT = 16
_ITEMS_LIMIT = 10_000
_TEXT_LIMIT = 100_000
_NUMBER_LIMIT = 2**64
_SHOWN = 40
_WORD = re.compile(r"[A-Za-z0-9_ +-]{0,64}")
"""What an option looks like, such as ``latent``: no name of a file with a suffix, no path, no address."""


def check_limits(record: RunRecord) -> None:
    """Raise :class:`BadRecordError` for a call that is beyond all limits: it names the field and the limit."""
    for number, (field, value, depth) in enumerate(_walk(record.call, "call", 0)):
        if number > _ITEMS_LIMIT:
            raise _beyond("call", f"more than {_ITEMS_LIMIT} values", f"at most {_ITEMS_LIMIT}")
        if depth > _DEPTH_LIMIT:
            raise _beyond(field, "lists in lists", f"at most {_DEPTH_LIMIT} deep")
        if isinstance(value, str) and len(value) > _TEXT_LIMIT:
            raise _beyond(field, f"a text of {len(value)} characters", f"at most {_TEXT_LIMIT}")
        if isinstance(value, (int, float)) and not -_NUMBER_LIMIT < value < _NUMBER_LIMIT:
            raise _beyond(field, value, "numbers below 2**64")
    for name, limit in REPLAY_LIMITS.items():
        given = record.call.get(name)
        for value in given if isinstance(given, list) else [] if given is None else [given]:
            is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not is_number or (isinstance(value, float) and not name.endswith("_s")) or not 0 <= value <= limit:
                raise _beyond(f"call.{name}", given, f"a number from 0 to {limit}")
    if (count := len(record.seeds["samples"])) > SAMPLES_LIMIT:
        raise _beyond("seeds.samples", f"{count} seeds", f"at most {SAMPLES_LIMIT}")
    if (drawn := recorded_samples(record.call, pipeline=record.pipeline["class"]).count) > SAMPLES_LIMIT:
        raise _beyond("call", f"about {drawn} samples", f"at most {SAMPLES_LIMIT}")


def _walk(value: Any, field: str, depth: int) -> Iterator[tuple[str, Any, int]]:
    """Yield a value and all that it holds, with its field and depth; what is deeper than the limit is cut off."""
    yield field, value, depth
    if depth > _DEPTH_LIMIT:
        return
    if isinstance(value, Mapping):
        for name, item in value.items():
            yield from _walk(item, f"{field}.{str(name)[:_SHOWN]}", depth + 1)
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _walk(item, f"{field}[{index}]", depth + 1)


def _beyond(field: str, value: Any, limit: str) -> BadRecordError:
    shown = str(value)
    shown = shown if len(shown) <= _SHOWN else f"{shown[: _SHOWN - 1]}…"
    return BadRecordError(f"Field {field!r} of the run record is {shown}, and a replay takes {limit}.", field)


def recorded_method(record: RunRecord, pipe: Pipeline) -> str:
    """Return the method that was called. :class:`BadRecordError` unless it is one that generates."""
    method = record.pipeline.get("method", "__call__")
    if method not in generating_methods(type(pipe)) or not callable(getattr(type(pipe), method, None)):
        raise BadRecordError(
            f"The record names {str(method)[:_SHOWN]!r} as what was called, which generates nothing.",
            "pipeline.method",
        )
    return str(method)


def recorded_arguments(record: RunRecord, pipe: Pipeline, inputs: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of the call but for its generators; ``inputs`` are those that it holds by digest only."""
    accepted = parameters(pipe)
    is_checked = recorded_method(record, pipe) == main_method(type(pipe)) and not takes_any_name(pipe, accepted)
    if is_checked and (unknown := [name for name in record.call if name not in accepted]):
        raise BadCallError(f"{type(pipe).__name__} takes no {', '.join(unknown)[:_SHOWN]}, which the record has.")
    arguments: dict[str, Any] = {}
    for name, value in record.call.items():
        if name == "generator":
            continue
        if name in inputs:
            given = inputs.pop(name)
            if describe(given) != value:
                raise BadCallError(f"{name} is not what was recorded: {describe(given)}, and the record has {value}.")
            arguments[name] = given
        elif may_name_a_file(name, value):
            raise BadRecordError(
                f"Field 'call.{name}' of the run record is {str(value)[:_SHOWN]!r}, which may be a file or an address "
                f"that a pipeline would open. Give it as an input if you trust it: {name}=….",
                f"call.{name}",
            )
        elif any(isinstance(item, Mapping) and "kind" in item for _, item, _ in _walk(value, name, 0)):
            raise BadCallError(f"The record holds {name} by its digest only. Give it as an input: {name}=….")
        else:
            arguments[name] = value
    if inputs:
        raise BadCallError(
            f"The recorded call has no {', '.join(inputs)}. It has {', '.join(record.call) or 'nothing'}."
        )
    return arguments


def may_name_a_file(name: str, value: Any) -> bool:
    """Return whether a text is given where no prompt is: pipelines open paths and fetch addresses of images."""
    texts = (item for _, item, _ in _walk(value, name, 0) if isinstance(item, str))
    return "prompt" not in name and not all(map(_WORD.fullmatch, texts))


def recorded_streams(record: RunRecord) -> dict[str, Any]:
    """Return the states of the program's own streams that were drawn from, by layer, for the layers that are here."""
    return {name: parse_state(name, state) for name, state in record.seeds["streams"].items()}


def recorded_noise(record: RunRecord) -> dict[str, Any]:
    """Return ``seed=`` or ``generator=`` as the call was given; nothing where it drew from the program's
    own streams.
    """
    seeds = record.seeds
    if seeds["source"] != "generator":
        if seeds["root"] is not None and not seeds["streams"]:
            return {"seed": seeds["root"]}
        if record.results["noise"] is not None and not seeds["streams"]:
            raise BadRecordError("The record does not tell where its noise came from.", "seeds.streams")
        return {}
    described = record.call.get("generator")
    if not described:
        raise BadRecordError("The record tells of generators that it does not describe.", "call.generator")
    listed = described if isinstance(described, list) else [described]
    made = [_generator(one) for one in listed]
    return {"generator": made if isinstance(described, list) else made[0]}


def _generator(described: Any) -> torch.Generator:
    field = "call.generator"
    described = described if isinstance(described, Mapping) else {}
    seed, device = described.get("seed"), described.get("device")
    is_device = isinstance(device, str) and re.fullmatch(r"[a-z]{2,8}(:[0-9]{1,2})?", device)
    if type(seed) is not int or not 0 <= seed < 2**64 or not is_device:
        raise BadRecordError(f"Field {field!r} of the run record describes no generator.", field)
    try:
        generator = torch.Generator(device).manual_seed(seed)
        if described.get("fresh") is not True:
            generator.set_state(unpack(described.get("state"), field))
    except RuntimeError as error:  # a device that is not here, or bytes that hold no state
        reason = str(error).splitlines()[0]
        raise BadRecordError(
            f"Field {field!r} of the run record cannot be made a generator: {reason}.", field
        ) from error
    return generator
