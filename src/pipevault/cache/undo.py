"""A load that fails leaves the pipeline as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from pipevault.cache.loaded import attach_state, loaded_state
from pipevault.graphs import parts as graph_parts
from pipevault.pipeline import Pipeline


@contextmanager
def unchanged_on_error(pipe: Pipeline) -> Iterator[None]:
    """Leave the pipeline exactly as it was if a load fails: its parts, its class, what was loaded before."""
    state = loaded_state(pipe)
    frozen = graph_parts.frozen_parts(pipe)
    places = {name: part.place() for name, part in frozen.items()}
    modules = {name: graph_parts.get_part(pipe, name) for name in frozen}
    try:
        yield
    except BaseException:  # whatever it was goes on
        for name in tuple(graph_parts.frozen_parts(pipe)):
            if name not in frozen:
                graph_parts.detach(pipe, [name])
        for name, part in frozen.items():
            if (now := graph_parts.get_part(pipe, name)) is not modules[name]:
                graph_parts.replace_part(pipe, now, modules[name])
            part.put_back(places[name])
        if state is not None:
            attach_state(pipe, state)
        raise
