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

from pipevault.determinism.record import RunRecord
from pipevault.errors import SettingsError

_CONTROLS = dict.fromkeys(set(range(32)) - {ord("\n"), ord("\t")})


def parameters_text(record: RunRecord, *, index: int, count: int, size: tuple[int, int]) -> str:
    """The text about sample ``index`` of ``count``; ``size`` is (width, height) of the image itself, in pixels.

    ``Seed`` is that of this very sample. Where the whole batch was drawn from one generator it is that generator's,
    and ``Batch size`` and ``Batch pos`` tell which image it is. :class:`SettingsError` if the batch is smaller.
    """
    if not 0 <= index < count:
        raise SettingsError(f"The batch has {count} samples, counted from 0; there is none with the index {index}.")
    call = record.call
    lines = [_prompt(call.get("prompt"), index, count)]
    if negative := _prompt(call.get("negative_prompt"), index, count):
        lines.append(f"Negative prompt: {negative}")
    values = {
        "Steps": _number(call, "num_inference_steps"),
        "Sampler": record.pipeline.get("scheduler"),
        "CFG scale": _number(call, "guidance_scale"),
        "Seed": _seed(record, index),
        "Size": f"{size[0]}x{size[1]}",
        "Model": _model(record.pipeline["model"]),
        **_place_in_batch(record, index, count),
        "Version": f"pipevault {record.versions['pipevault']}" if record.versions.get("pipevault") else None,
    }
    lines.append(", ".join(f"{name}: {_quoted(str(value))}" for name, value in values.items() if value is not None))
    return "\n".join(lines).translate(_CONTROLS)


def asked_samples(record: RunRecord) -> int:
    """How many samples the call asked for, as far as its seeds and prompts show; at least 1."""
    prompt = record.call.get("prompt")
    prompts = len(prompt) if isinstance(prompt, list) else 1
    per_prompt = record.call.get("num_images_per_prompt") or record.call.get("num_videos_per_prompt") or 1
    drawn = prompts * per_prompt if isinstance(per_prompt, int) else prompts
    return max(len(record.seeds["samples"]), drawn, 1)


def _seed(record: RunRecord, index: int) -> int | None:
    """``None`` if the record does not tell."""
    samples: list[int] = record.seeds["samples"]
    if len(samples) > 1:
        return samples[index] if index < len(samples) else None
    root: int | None = record.seeds["root"]
    return samples[0] if samples else root


def _place_in_batch(record: RunRecord, index: int, count: int) -> dict[str, int]:
    shared = count > 1 and len(record.seeds["samples"]) < count
    return {"Batch size": count, "Batch pos": index} if shared else {}


def _prompt(prompt: Any, index: int, count: int) -> str:
    """The prompt of sample ``index``: diffusers repeats each prompt of a list for its images, one after the other."""
    if isinstance(prompt, list) and prompt:
        prompt = prompt[index * len(prompt) // count]
    return prompt if isinstance(prompt, str) else ""


def _number(call: Mapping[str, Any], name: str) -> int | float | None:
    value = call.get(name)
    return value if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def _model(model: str | None) -> str | None:
    """A repository id as it is; of a path its last part alone, for folders of a machine concern no one else."""
    if model is None:
        return None
    path = PurePath(model)
    return path.name if path.is_absolute() or model.startswith((".", "~")) else model


def _quoted(value: str) -> str:
    return json.dumps(value, ensure_ascii=False) if any(mark in value for mark in ",:\n") else value
