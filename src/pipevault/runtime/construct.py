"""The one-line form: construct a diffusers pipeline and load it frozen."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

from pipevault.cache.outcome import Progress
from pipevault.cache.pipeline_cache import PipelineCache
from pipevault.calls.call_shapes import AskedSize
from pipevault.runtime.recorded_weights import note_origins
from pipevault.settings import Tier

Pipeline = TypeVar("Pipeline")


def from_pretrained(
    pipeline_class: type[Pipeline],
    path: str | Path,
    *,
    height: AskedSize = None,
    width: AskedSize = None,
    num_frames: AskedSize = None,
    batch_size: AskedSize = None,
    guidance: bool | None = None,
    call: Mapping[str, Any] | Callable[[Any], Any] | None = None,
    dynamic: bool = False,
    shapes: Sequence[Mapping[str, Any]] | None = None,
    parts: Sequence[str] | Literal["auto"] | None = None,
    device: Any = None,
    dir: str | Path | None = None,
    mode: str | None = None,
    backend: str | None = None,
    weights: str | None = None,
    on_unfrozen: str | None = None,
    lock_timeout_s: float | None = None,
    turn_timeout_s: float | None = None,
    on_lock_timeout: str | None = None,
    level: str | None = None,
    tiers: Sequence[str | Path | Tier | Mapping[str, Any]] | None = None,
    tier_timeout_s: float | None = None,
    max_size: int | str | None = None,
    signature: str | None = None,
    trusted_keys: Sequence[str | Path] | None = None,
    trusted_users: Sequence[str | int] | None = None,
    trusted_groups: Sequence[str | int] | None = None,
    allow_group_write: bool | None = None,
    shared: str | None = None,
    regions: str | None = None,
    jobs: int | None = None,
    compile_profile: str | None = None,
    build_config: Mapping[str, bool | int | float | str] | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> Pipeline:
    """``pipeline_class.from_pretrained(path, **options)``, moved to ``device``, with frozen graphs.

    The arguments before ``device`` are those of :meth:`PipelineCache.load`, which lists the errors;
    those after it are those of :class:`PipelineCache`; ``options`` go to ``pipeline_class.from_pretrained``.
    """
    cache = PipelineCache(
        dir,
        mode=mode,
        backend=backend,
        weights=weights,
        on_unfrozen=on_unfrozen,
        lock_timeout_s=lock_timeout_s,
        turn_timeout_s=turn_timeout_s,
        on_lock_timeout=on_lock_timeout,
        level=level,
        tiers=tiers,
        tier_timeout_s=tier_timeout_s,
        max_size=max_size,
        signature=signature,
        trusted_keys=trusted_keys,
        trusted_users=trusted_users,
        trusted_groups=trusted_groups,
        allow_group_write=allow_group_write,
        shared=shared,
        regions=regions,
        jobs=jobs,
        compile_profile=compile_profile,
        build_config=build_config,
        progress=progress,
    )
    pipe = pipeline_class.from_pretrained(path, **options)  # type: ignore[attr-defined]
    if device is not None:
        pipe = pipe.to(device)
    note_origins(pipe, options)
    loaded: Pipeline = cache.load(
        pipe,
        height=height,
        width=width,
        num_frames=num_frames,
        batch_size=batch_size,
        guidance=guidance,
        call=call,
        dynamic=dynamic,
        shapes=shapes,
        parts=parts,
    )
    return loaded
