"""Regions: freezing the repeated blocks of a part instead of the part.

A transformer is one block many times over. One graph for each kind of block, bound to the weights of each, takes a
fraction of the time that the whole takes to compile, and what lies outside the blocks runs eagerly. A block is a part
like any other: its graphs lie on the shelf of its architecture, so that models with the same block share them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from pipevault.errors import SettingsError
from pipevault.fingerprint.classes import original_class
from pipevault.fingerprint.model import Architecture, architecture
from pipevault.graphs.parts import get_part
from pipevault.pipeline import Pipeline

_LEAST_BLOCKS = 8
_LEAST_PER_KIND = 4
_LEAST_SHARE = 0.75
"""``auto`` takes the blocks where there are that many, that many of each kind on average, and that share of the part's
weights in them: elsewhere what stays eager costs more than compiling it does.
"""


@dataclass(frozen=True)
class Regions:
    """The blocks of a part, by their names in the pipeline, and the architecture of each."""

    blocks: Mapping[str, nn.Module]
    architectures: Mapping[str, Architecture]

    def __str__(self) -> str:
        """Return how many there are of each class, such as ``19 FluxTransformerBlock``."""
        counts = Counter(original_class(block).__name__ for block in self.blocks.values())
        return ", ".join(f"{count} {name}" for name, count in counts.items())


def choose_regions(pipe: Pipeline, parts: Sequence[str], regions: str) -> dict[str, Regions]:
    """Return the regions of those ``parts`` that are frozen by blocks; ``regions`` is the setting of that name.

    Raises :class:`SettingsError` if ``blocks`` are asked for and no part has any.
    """
    if regions == "off":
        return {}
    found = {name: _regions(name, get_part(pipe, name), always=regions == "blocks") for name in parts}
    chosen = {name: its for name, its in found.items() if its is not None}
    if regions == "blocks" and parts and not chosen:
        raise SettingsError(
            f"regions is 'blocks', and {', '.join(parts)} of {type(pipe).__name__} have no repeated blocks. "
            "Use regions='auto' or 'off'."
        )
    return chosen


def _regions(name: str, part: nn.Module, *, always: bool) -> Regions | None:
    if name.endswith("decoder") or getattr(getattr(part, "config", None), "use_cache", False):
        return None  # latents are noted where a decoder is called; blocks of language models share a cache
    blocks = dict(repeated_blocks(part))
    if not blocks or not (always or _is_worth_it(part, blocks)):
        return None
    named = {f"{name}.{path}": block for path, block in blocks.items()}
    architectures = {path: architecture(block) for path, block in named.items()}
    kinds = {its.digest for its in architectures.values()}
    if not always and len(kinds) * _LEAST_PER_KIND > len(named):
        return None
    return Regions(named, architectures)


def _is_worth_it(part: nn.Module, blocks: Mapping[str, nn.Module]) -> bool:
    kinds = {_kind(block) for block in blocks.values()}
    if len(blocks) < _LEAST_BLOCKS or len(kinds) * _LEAST_PER_KIND > len(blocks):
        return False
    embedded = {id(child.weight) for child in part.modules() if isinstance(child, nn.Embedding)}
    inside = sum(p.numel() for block in blocks.values() for p in block.parameters())
    return inside >= _LEAST_SHARE * sum(p.numel() for p in part.parameters() if id(p) not in embedded)


def repeated_blocks(part: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield path and module of each repeated block of ``part``: those that diffusers names for it, else the members of
    its lists of modules that are there more than once.

    None lies inside another one, and none has two places.
    """
    listed = frozenset(getattr(original_class(part), "_repeated_blocks", None) or ())
    if not (blocks := list(_blocks(part, "", listed))):
        return
    places = Counter(id(module) for _, module in part.named_modules(remove_duplicate=False))
    yield from ((path, block) for path, block in blocks if places[id(block)] == 1)


def _blocks(owner: nn.Module, prefix: str, listed: frozenset[str]) -> Iterator[tuple[str, nn.Module]]:
    children = dict(owner.named_children())
    kinds: dict[str, Any] = {}
    if isinstance(owner, nn.ModuleList) and not listed:
        classes = Counter(map(original_class, children.values()))
        # Most lists have one module of each class, whose weights need no look.
        kinds = {name: _kind(child) for name, child in children.items() if classes[original_class(child)] > 1}
    counts = Counter(kinds.values())
    for name, child in children.items():
        if listed:
            is_block = original_class(child).__name__ in listed
        else:
            is_block = name in kinds and counts[kinds[name]] > 1 and any(True for _ in child.children())
        if is_block:
            yield f"{prefix}{name}", child
        else:
            yield from _blocks(child, f"{prefix}{name}.", listed)


def _kind(module: nn.Module) -> tuple[Any, ...]:
    """Class and weights, which equal blocks have in common; their architecture, which takes longer to tell, decides."""
    weights = tuple((name, tuple(tensor.shape), tensor.dtype) for name, tensor in module.named_parameters())
    return original_class(module), weights
