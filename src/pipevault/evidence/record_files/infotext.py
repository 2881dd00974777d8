"""The text about an image that A1111's webui writes and Civitai, ComfyUI nodes and viewers parse.

https://github.com/AUTOMATIC1111/stable-diffusion-webui/blob/master/modules/infotext_utils.py reads it: the prompt, a
line ``Negative prompt: …`` if there is one, and a last line ``Steps: 12, Sampler: DDIMScheduler, …`` whose values stand
in double quotes where they hold a comma, colon or line feed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

from pipevault.calls.samples import prompt_of_sample, recorded_samples
from pipevault.errors import SettingsError
from pipevault.runtime.record import RunRecord

_CONTROLS = dict.fromkeys(set(range(32)) - {ord("\n"), ord("\t")})


def parameters_text(record: RunRecord, *, index: int, count: int, size: tuple[int, int]) -> str:
    """Return the text about sample ``index`` of ``count``; ``size`` is (width, height) of the image itself, in pixels.

    ``Seed`` is that of this very sample, or of the one generator of the whole batch, where ``Batch size`` and ``Batch
    pos`` tell which image it is. :class:`SettingsError` if the batch is smaller.
    """
    if not 0 <= index < count:
        raise SettingsError(f"The batch has {count} samples, counted from 0; there is none with the index {index}.")
    call = record.call
    lines = [prompt_of_sample(call, "prompt", index, count, pipeline=record.pipeline["class"])]
    if negative := prompt_of_sample(call, "negative_prompt", index, count, pipeline=record.pipeline["class"]):
        lines.append(f"Negative prompt: {negative}")
    values = {
        "Steps": _number(call, "num_inference_steps"),
        "Sampler": record.pipeline.get("scheduler"),
        "CFG scale": _number(call, "guidance_scale"),
        "Seed": _seed(record, index, count),
        "Size": f"{size[0]}x{size[1]}",
        "Model": _model(record.pipeline["model"]),
        **({"Batch size": count, "Batch pos": index} if 1 < count > len(record.seeds["samples"]) else {}),
        "Version": f"pipevault {record.versions['pipevault']}" if record.versions.get("pipevault") else None,
    }
    lines.append(", ".join(f"{name}: {_quoted(str(value))}" for name, value in values.items() if value is not None))
    return "\n".join(lines).translate(_CONTROLS)


def asked_samples(record: RunRecord) -> int:
    """Return how many samples the call asked for, as far as its seeds and arguments show; at least 1."""
    return max(len(record.seeds["samples"]), recorded_samples(record.call, pipeline=record.pipeline["class"]).count)


def _seed(record: RunRecord, index: int, count: int) -> int | None:
    """Return the seed of a sample; ``None`` if the record does not tell: frames of several videos in a list, say."""
    samples: list[int] = record.seeds["samples"]
    if len(samples) > 1:
        return samples[index] if len(samples) == count else None
    root: int | None = record.seeds["root"]
    return samples[0] if samples else root


def _number(call: Mapping[str, Any], name: str) -> int | float | None:
    value = call.get(name)
    return value if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def _model(model: str | None) -> str | None:
    """Return a repository id as it is, of a path the last part alone: folders of a machine concern no one else."""
    if model is None:
        return None
    path = PurePath(model)
    return path.name if path.is_absolute() or model.startswith((".", "~")) else model


def _quoted(value: str) -> str:
    return json.dumps(value, ensure_ascii=False) if any(mark in value for mark in ",:\n") else value
