"""The one-line form: construct a diffusers pipeline and load it frozen."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from pipevault.cache.outcome import Progress
from pipevault.cache.pipeline_cache import PipelineCache
from pipevault.calls.call_shapes import LoadFields, ShapeFields
from pipevault.runtime.recorded_weights import note_origins
from pipevault.settings import Settings
from pipevault.settings.arguments import SettingsFields, field_names, refuse_misspelt, spelled_out

AnyPipeline = TypeVar("AnyPipeline")


@spelled_out(SettingsFields, LoadFields, ShapeFields)
def from_pretrained(
    pipeline_class: type[AnyPipeline],
    path: str | Path,
    *,
    device: Any = None,
    dir: str | Path | None = None,
    settings: Settings | None = None,
    build_config: Mapping[str, bool | int | float | str] | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> AnyPipeline:
    """Return ``pipeline_class.from_pretrained(path, **options)``, moved to ``device``, with frozen graphs.

    The fields of the settings are those of :class:`PipelineCache`; shapes and ``parts`` are those of
    :meth:`PipelineCache.load`, which lists the errors. All other ``options`` go to the pipeline's class; one that
    is nearly a name of ours is a :class:`SettingsError`.
    """
    settings_names, load_names = set(field_names(SettingsFields)), {*field_names(LoadFields), *field_names(ShapeFields)}
    of_the_class = inspect.signature(pipeline_class).parameters  # the components, which a caller may hand over
    refuse_misspelt([name for name in options if name not in of_the_class], sorted(settings_names | load_names))
    fields = {name: options.pop(name) for name in settings_names & options.keys()}
    load = {name: options.pop(name) for name in load_names & options.keys()}
    cache = PipelineCache(dir, settings=settings, build_config=build_config, progress=progress, **fields)
    pipe = pipeline_class.from_pretrained(path, **options)  # type: ignore[attr-defined]
    if device is not None:
        pipe = pipe.to(device)
    note_origins(pipe, options)
    loaded: AnyPipeline = cache.load(pipe, **load)
    return loaded
