"""The shapes that one load freezes, from the arguments of :meth:`~pipevault.PipelineCache.load`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from pipevault.errors import SettingsError
from pipevault.manager.call import CallShape


def call_shapes(
    height: int | None,
    width: int | None,
    num_frames: int | None,
    batch_size: int,
    guidance: bool | None,
    call: Mapping[str, Any] | Callable[[Any], Any] | None,
    shapes: Sequence[Mapping[str, Any]] | None,
) -> list[CallShape]:
    """Each of ``shapes`` over the other arguments, or those alone. :class:`SettingsError` for what is no shape."""
    base = CallShape(height, width, num_frames, batch_size, guidance, call)
    if shapes is None:
        return [base]
    if not shapes:
        raise SettingsError("shapes is empty: give at least one mapping such as {'height': 512, 'width': 512}.")
    try:
        return [replace(base, **shape) for shape in shapes]
    except TypeError as error:
        raise SettingsError(
            f"shapes takes mappings with height, width, num_frames, batch_size, guidance, call: {error}."
        ) from error
