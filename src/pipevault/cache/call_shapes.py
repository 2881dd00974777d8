"""The shapes that one load freezes, from the arguments of :meth:`~pipevault.PipelineCache.load`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from pipevault.cache.call import CallShape
from pipevault.errors import SettingsError


def call_shapes(
    height: int | None,
    width: int | None,
    num_frames: int | None,
    batch_size: int | None,
    guidance: bool | None,
    call: Mapping[str, Any] | Callable[[Any], Any] | None,
    shapes: Sequence[Mapping[str, Any]] | None,
) -> list[CallShape]:
    """Each of ``shapes`` over the other arguments, or those alone; none if nothing was given.

    :class:`SettingsError` for what is no shape.
    """
    given = (height, width, num_frames, batch_size, guidance, call)
    base = CallShape(height, width, num_frames, 1 if batch_size is None else batch_size, guidance, call)
    if shapes is None:
        return [] if all(value is None for value in given) else [base]
    if not shapes:
        raise SettingsError("shapes is empty: give at least one mapping such as {'height': 512, 'width': 512}.")
    try:
        return [replace(base, **shape) for shape in shapes]
    except TypeError as error:
        raise SettingsError(
            f"shapes takes mappings with height, width, num_frames, batch_size, guidance, call: {error}."
        ) from error
