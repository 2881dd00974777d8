"""Which modules of a pipeline are parts, and driving them through onediffx.

Parts that onediffx lists go through its ``compile_pipe``, ``save_pipe`` and ``load_pipe``; those that it does not know
(a second transformer, a third text encoder, Pyramid-Flow's ``dit``) through ``onediff.infer_compiler.compile`` and
their own ``save_graph`` and ``load_graph``, with the same backend.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import onediffx
from onediff.infer_compiler import compile as onediff_compile
from onediffx.compilers.diffusion_pipeline_compiler import _PARTS as ONEDIFFX_PARTS
from torch import nn

from pipevault.errors import CorruptEntryError, SettingsError
from pipevault.graphs.backend import NAME
from pipevault.graphs.document import part_bytes
from pipevault.graphs.part import FrozenPart, part_state, unfrozen
from pipevault.graphs.state import PartOptions, PartState

# compile_pipe patches the image processor beside compiling; a pipeline's own post-processing stays as it is.
IMAGE_PROCESSOR = "image_processor"
NEVER_PARTS = frozenset({"safety_checker", "feature_extractor", "watermark"})


def pipeline_modules(pipe: Any) -> dict[str, nn.Module]:
    """The top-level modules of a pipeline by name: diffusers components, or module attributes of other pipelines."""
    names = tuple(pipe.components if hasattr(pipe, "components") else vars(pipe))
    modules = {name: getattr(pipe, name, None) for name in names}
    return {name: module for name, module in modules.items() if isinstance(module, nn.Module)}


def find_parts(pipe: Any, wanted: Sequence[str] | None = None) -> dict[str, nn.Module]:
    """Every part by its dotted name. Raises :class:`SettingsError` if ``wanted`` names one that is not there."""
    parts = dict(_candidates(pipe))
    if wanted is None:
        return parts
    if unknown := [name for name in wanted if name not in parts]:
        raise SettingsError(
            f"{type(pipe).__name__} has no part {', '.join(unknown)}. Its parts: {', '.join(parts) or 'none'}."
        )
    return {name: parts[name] for name in parts if name in wanted}


def _candidates(pipe: Any) -> Iterator[tuple[str, nn.Module]]:
    covered = set()
    for name in ONEDIFFX_PARTS:
        module = get_part(pipe, name)
        if isinstance(module, nn.Module):
            covered.add(name.partition(".")[0])
            yield name, module
    for name, module in pipeline_modules(pipe).items():
        if name in covered or name in NEVER_PARTS:
            continue
        if hasattr(module, "decode"):
            for side in ("decoder", "encoder"):
                if isinstance(getattr(module, side, None), nn.Module):
                    yield f"{name}.{side}", getattr(module, side)
        else:
            yield name, module


def get_part(pipe: Any, name: str) -> Any:
    value = pipe
    for attribute in name.split("."):
        value = getattr(value, attribute, None)
    return value


def set_part(pipe: Any, name: str, module: nn.Module) -> None:
    owner, _, attribute = name.rpartition(".")
    setattr(get_part(pipe, owner) if owner else pipe, attribute, module)


def attach(pipe: Any, names: Sequence[str], options: PartOptions) -> dict[str, PartState]:
    """Make frozen parts of ``names``, without graphs yet, through onediffx and OneDiff."""
    ignores = (*(part for part in ONEDIFFX_PARTS if part not in names), IMAGE_PROCESSOR)
    if any(part in names for part in ONEDIFFX_PARTS):
        onediffx.compile_pipe(pipe, backend=NAME, options=options, ignores=ignores)
    for name in names:
        if name not in ONEDIFFX_PARTS:
            set_part(pipe, name, onediff_compile(get_part(pipe, name), backend=NAME, options=options))
    states = {name: part_state(get_part(pipe, name)) for name in names}
    for name, state in states.items():
        state.name = name
    return states


def detach(pipe: Any, names: Sequence[str]) -> None:
    """Give the pipeline its eager modules back."""
    for name in names:
        module = get_part(pipe, name)
        if isinstance(module, FrozenPart):
            set_part(pipe, name, unfrozen(module))


def frozen_parts(pipe: Any) -> dict[str, PartState]:
    return {name: part_state(m) for name, m in find_parts(pipe).items() if isinstance(m, FrozenPart)}


def save(pipe: Any, folder: Path, names: Sequence[str]) -> None:
    """Write a document for each part, and the files it names, to ``folder``."""
    ignores = (*(part for part in ONEDIFFX_PARTS if part not in names), IMAGE_PROCESSOR)
    onediffx.save_pipe(pipe, dir=str(folder), ignores=ignores)
    for name in names:
        if name not in ONEDIFFX_PARTS:
            get_part(pipe, name).save_graph(folder / name)
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise CorruptEntryError(f"save_pipe wrote nothing for {', '.join(missing)}.", folder)


def load(pipe: Any, folder: Path, graphs: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """Write the documents of a manifest to ``folder`` and load them.

    ``load_pipe`` passes over what it does not find without a word, so afterwards every part is looked at: raises
    :class:`CorruptEntryError` unless each has the graphs that ``graphs`` lists.
    """
    for name, documents in graphs.items():
        (folder / name).write_bytes(part_bytes(documents))
    ignores = (*(part for part in ONEDIFFX_PARTS if part not in graphs), IMAGE_PROCESSOR)
    onediffx.load_pipe(pipe, dir=str(folder), ignores=ignores)
    for name in graphs:
        if name not in ONEDIFFX_PARTS:
            get_part(pipe, name).load_graph(folder / name)
    for name, documents in graphs.items():
        part = get_part(pipe, name)
        loaded = (
            {g.document.package for g in part_state(part).graphs.values()} if isinstance(part, FrozenPart) else set()
        )
        if missing := [document["package"] for document in documents if document["package"] not in loaded]:
            raise CorruptEntryError(f"load_pipe did not load {len(missing)} graphs of {name}.", folder / name)
