"""The one-line form: construct a diffusers pipeline and load it frozen."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pipevault.manager.cache import PipelineCache
from pipevault.manager.outcome import Progress

Pipeline = TypeVar("Pipeline")


def from_pretrained(
    pipeline_class: type[Pipeline],
    path: str | Path,
    *,
    height: int | None = None,
    width: int | None = None,
    num_frames: int | None = None,
    batch_size: int = 1,
    guidance: bool | None = None,
    call: Mapping[str, Any] | Callable[[Any], Any] | None = None,
    shapes: Sequence[Mapping[str, Any]] | None = None,
    parts: Sequence[str] | None = None,
    device: Any = None,
    dir: str | Path | None = None,
    mode: str | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> Pipeline:
    """``pipeline_class.from_pretrained(path, **options)``, moved to ``device``, with frozen graphs.

    The arguments before ``device`` are those of :meth:`PipelineCache.load`, which lists the errors;
    ``dir``, ``mode`` and ``progress`` those of :class:`PipelineCache`.
    """
    cache = PipelineCache(dir, mode=mode, progress=progress)
    pipe = pipeline_class.from_pretrained(path, **options)  # type: ignore[attr-defined]
    if device is not None:
        pipe = pipe.to(device)
    loaded: Pipeline = cache.load(
        pipe,
        height=height,
        width=width,
        num_frames=num_frames,
        batch_size=batch_size,
        guidance=guidance,
        call=call,
        shapes=shapes,
        parts=parts,
    )
    return loaded
